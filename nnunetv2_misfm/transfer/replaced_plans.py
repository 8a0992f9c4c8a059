"""Fine-tuning plans that take the place of others under the same name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.compare import run_changes
from nnunetv2_misfm.plans.run_settings import PRETRAIN_INFO


def what_changes(
    path: Path, replaced: Mapping[str, Any], plans: Mapping[str, Any], configurations: Collection[str]
) -> list[str]:
    """What a training with the new plans does otherwise, one line each.

    Args:
        path: of the plans file.
        replaced: what it holds.
        plans: what it will hold.
        configurations: that are planned anew; others stay.

    Raises:
        PlanError: if the old ones start from weights and the new ones from none.
    """
    before, now = (one.get(PRETRAIN_INFO) or {} for one in (replaced, plans))
    weights = before.get("checkpoint_path"), now.get("checkpoint_path")
    if weights[0] is not None and weights[1] is None:
        raise PlanError(
            f"{path} starts from {weights[0]}, and would start from nothing. Give -pretrained_weights again (with "
            f"--from_scratch for the baseline, which has plans of its own), or another -overwrite_plans_name."
        )
    changed = [f"weights: {weights[0]} becomes {weights[1]}"] if weights[0] != weights[1] else []
    if weights[0] == weights[1] and before.get("sha256") != now.get("sha256"):
        changed.append(f"weights: {weights[1]} has been written anew")
    kept = [name for name in replaced["configurations"] if name not in configurations]
    if kept:
        changed.append(f"the plans that are replaced also had {', '.join(kept)}, which stay as they are")
    for name in configurations:
        if name not in replaced["configurations"]:
            continue
        changes = run_changes(replaced, plans, name).items()
        changed += [f"{name}: {key} {old} becomes {new}" for key, (old, new) in changes]
    if replaced["dataset_name"] != plans["dataset_name"]:
        changed.append(f"dataset: {replaced['dataset_name']} becomes {plans['dataset_name']}")
    return changed
