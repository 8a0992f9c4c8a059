"""How two plans files would train differently."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import INTENSITIES, WINDOW, check_complete, configuration_3d, ct_windows
from nnunetv2_misfm.plans.files import weights_of
from nnunetv2_misfm.plans.normalisation import CT
from nnunetv2_misfm.plans.run_settings import BLOCK, RUNS, RunSettings, pretrain_info
from nnunetv2_misfm.plans.settings import Settings, as_of_today, declared, write_settings

_OF_THE_DATA = ("patch_size", "batch_size", "spacing", "data_identifier")
# What a network's outputs depend on, besides its weights and its arguments.
_OF_ITS_INPUT = (
    "patch_size",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "transpose_forward",
    "ct_intensities",
)
_PREPROCESSING_KEYS = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "preprocessor_name",
)


def preprocessing_key(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Everything in a plan that the preprocessed arrays of a configuration depend on."""
    resolved = configuration_3d(plans, configuration)
    key = {name: resolved.get(name) for name in _PREPROCESSING_KEYS}
    key["transpose_forward"] = plans["transpose_forward"]
    key["image_reader_writer"] = plans["image_reader_writer"]
    if CT in resolved["normalization_schemes"]:
        key["intensities"] = plans[INTENSITIES]
    return key


def run_changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    configuration: str,
    run: RunSettings | None = None,
    **groups: Settings,
) -> dict[str, tuple[Any, Any]]:
    """What differs in network, patch, batch, spacing, data and settings, by name: the value then and the one now.

    Args:
        before, now: plans that both have the configuration.
        configuration: its name.
        run: the defaults of the run's settings, if they are not those declared.
        groups: the defaults of nested groups, by name. A setting that plans of another version lack has its default.
    """
    old, new = (_everything(plans, configuration, run, groups) for plans in (before, now))
    names = sorted({*old, *new}, key=lambda name: ("." not in name, name))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def what_a_run_must_keep(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    configuration: str,
    run: RunSettings | None = None,
    **groups: Settings,
) -> list[str]:
    """What differs although a run that goes on must keep it, one line each; empty if nothing does."""
    changed = run_changes(before, now, configuration, run, **groups)
    if "task" in changed:  # the settings of one task say nothing about another
        changed = {"task": changed["task"]}
    free = _may_change((now.get(BLOCK) or {}).get("task"), groups)
    if weights := weights_then_and_now(before, now):
        changed["pretrained weights"] = weights
    return _then_and_now({name: values for name, values in changed.items() if name not in free})


def what_a_model_must_keep(before: Mapping[str, Any], now: Mapping[str, Any], configuration: str) -> list[str]:
    """What differs in network and images, one line each, by which a trained model would predict wrongly."""
    changed = run_changes(before, now, configuration)
    kept = {name for name in changed if name in _OF_ITS_INPUT or name.partition(".")[0] == "network"}
    return _then_and_now({name: values for name, values in changed.items() if name in kept})


def _then_and_now(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {old} then, {new} now" for name, (old, new) in changed.items()]


def weights_then_and_now(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The checkpoints of plans that start from other weights; None for the same, which may have another place."""
    old, new = pretrain_info(before), pretrain_info(now)
    key = "sha256" if old.get("sha256") and new.get("sha256") else "checkpoint_path"
    if old.get(key) == new.get(key):
        return None
    then, today = (one.get("checkpoint_path") or "none" for one in (old, new))
    return then, f"{today}, written anew" if today == then else today


def _may_change(task: str | None, groups: Mapping[str, Settings]) -> set[str]:
    """The settings of a run, and of its groups as `group.name`, that are declared to be free."""
    of_run = {name: kind for kind in RUNS if task in kind.TASKS for name in kind.model_fields}
    free = {name for name, kind in of_run.items() if declared(kind, name, "may_change")}
    for group, settings in groups.items():
        kind = type(settings)
        free |= {f"{group}.{name}" for name in kind.model_fields if declared(kind, name, "may_change")}
    return free


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
        PlanError: if the old ones start from weights and the new ones from none, or if the data of a configuration
            that stays would not be what the plans say.
    """
    if weights_of(replaced) and not weights_of(plans):
        raise PlanError(
            f"The plans in {path} start from {weights_of(replaced)}, those asked for now from no weights. Give "
            f"-pretrained_weights without --from_scratch, or another -overwrite_plans_name."
        )
    weights = weights_then_and_now(replaced, plans)
    changed = [f"weights: {weights[0]} becomes {weights[1]}"] if weights else []
    kept = [name for name in replaced["configurations"] if name not in configurations]
    if kept:
        changed.append(f"the plans that are replaced also had {', '.join(kept)}, which stay as they are")
    for name in kept:
        _check_arrays(path, name, replaced, plans, configurations)
    for name in (one for one in replaced["configurations"] if is_complete(replaced, one)):
        changes = run_changes(replaced, plans, name).items()
        changed += [f"{name}: {key} {old} becomes {new}" for key, (old, new) in changes]
    if replaced["dataset_name"] != plans["dataset_name"]:
        changed.append(f"dataset: {replaced['dataset_name']} becomes {plans['dataset_name']}")
    return changed


def _check_arrays(
    path: Path,
    kept: str,
    replaced: Mapping[str, Any],
    plans: Mapping[str, Any],
    configurations: Collection[str],
) -> None:
    """Raise a PlanError if a configuration that is not planned anew has arrays of its own and would need others."""
    made = {_identifier(plans, name) for name in configurations}
    if not is_complete(replaced, kept) or _identifier(plans, kept) in made:
        return
    before, now = (_preprocessing(one, kept) for one in (replaced, plans))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} {before.get(name)} becomes {now.get(name)}" for name in names)
        raise PlanError(
            f"{path} also has {kept}, whose arrays would no longer be what the plans say: {changes}. Choose another "
            f"-overwrite_plans_name for what is planned now."
        )


def is_complete(plans: Mapping[str, Any], name: str) -> bool:
    """Whether a configuration that was not asked for can be used; it may be its owner's own, half written."""
    try:
        check_complete(plans, Path(), "", [name])
        configuration_3d(plans, name)
    except PlanError:
        return False
    return True


def _identifier(plans: Mapping[str, Any], configuration: str) -> str:
    """The name of the folder with the arrays of a configuration."""
    identifier: str = configuration_3d(plans, configuration)["data_identifier"]
    return identifier


def _preprocessing(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """`preprocessing_key`, of the intensities only what nnU-Net clips and scales CT by."""
    found = preprocessing_key(plans, configuration)
    if found.pop("intensities", None) is not None:
        windows = ct_windows(plans, found["normalization_schemes"]).values()
        found["ct_intensities"] = [{name: (values or {}).get(name) for name in WINDOW} for values in windows]
    return found


def _everything(
    plans: Mapping[str, Any], configuration: str, run: RunSettings | None, groups: Mapping[str, Settings]
) -> dict[str, Any]:
    entry = configuration_3d(plans, configuration)
    architecture, settings = entry["architecture"], dict(plans.get(BLOCK, {}))
    # The volumes of a pool may become more; each is normalised as what it is, and `pool/plan.py` compares how.
    is_pool = settings.pop("pool", None) is not None
    for kind in RUNS:
        if settings.get("task") in kind.TASKS:
            settings = write_settings(run or kind()) | as_of_today(kind, settings)
    for name, defaults in groups.items():
        values = write_settings(defaults) | settings.pop(name, {})
        settings |= {f"{name}.{key}": value for key, value in values.items()}
    found = {
        "network": architecture["network_class_name"].rpartition(".")[2],
        **{f"network.{name}": value for name, value in architecture["arch_kwargs"].items()},
        **{name: entry.get(name) for name in _OF_THE_DATA},
        **settings,
    }
    if not is_pool:
        found |= _preprocessing(plans, configuration)
    as_in_a_file: dict[str, Any] = json.loads(json.dumps(found))
    return as_in_a_file
