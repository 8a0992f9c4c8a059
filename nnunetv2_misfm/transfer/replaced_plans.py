"""Fine-tuning plans that take the place of others under the same name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.transfer.pretrained import PRETRAIN_INFO


def what_changes(path: Path, replaced: Mapping[str, Any], plans: Mapping[str, Any]) -> list[str]:
    """What a training with the new plans does otherwise, one line each.

    Args:
        path: of the plans file.
        replaced: what it holds.
        plans: what it will hold.

    Raises:
        PlanError: if the old ones start from weights and the new ones from none.
    """
    before, now = ((one.get(PRETRAIN_INFO) or {}).get("checkpoint_path") for one in (replaced, plans))
    if before is not None and now is None:
        raise PlanError(
            f"{path} starts from {before}, and would start from nothing. Give -pretrained_weights again (with "
            f"--from_scratch for the baseline, which has plans of its own), or another -overwrite_plans_name."
        )
    changed = [f"weights {before} become {now}"] if before != now else []
    earlier = replaced.get("configurations", {})
    for name, configuration in plans["configurations"].items():
        if name in earlier:
            old, new = _choices(earlier[name]), _choices(configuration)
            changed += [f"{name}: {key} {old[key]} becomes {new[key]}" for key in old if old[key] != new[key]]
    gone = sorted(set(earlier) - set(plans["configurations"]))
    if gone:
        changed.append(f"the plans that are replaced also had {', '.join(gone)}; name them with -c to keep them")
    return changed


def _choices(configuration: Mapping[str, Any]) -> dict[str, Any]:
    network = configuration["architecture"]["network_class_name"].rpartition(".")[2]
    return {"network": network, **{name: configuration[name] for name in ("spacing", "patch_size", "batch_size")}}
