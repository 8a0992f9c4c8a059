"""Checks of plans before anything is written: names, files that are not ours, complete entries, networks that build."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import read_json
from nnunetv2_misfm.plans.normalisation import CT
from nnunetv2_misfm.plans.run_settings import BLOCK, pretext_task_of
from nnunetv2_misfm.plans.settings import is_number

_CALL = (
    "nnU-Net calls a network with the arch_kwargs of the plans (strides among them), input_channels, num_classes and "
    "deep_supervision. A class of yours around this one can take them: docs/own_networks.md."
)
NEEDS_TRAINER = "these plans are not for this trainer: use -tr MisFMTrainer"
_OLD_INTENSITIES = "foreground_intensity_properties_by_modality"
INTENSITIES = "foreground_intensity_properties_per_channel"
WINDOW = ("percentile_00_5", "percentile_99_5", "mean", "std")
"""What of a channel's intensities nnU-Net clips and scales CT by."""
_PLANS_KEYS = (
    "dataset_name",
    "plans_name",
    "transpose_forward",
    "transpose_backward",
    "image_reader_writer",
    INTENSITIES,
)
_CONFIGURATION_KEYS = (
    "data_identifier",
    "patch_size",
    "batch_size",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
)
# How plans of before nnU-Net 2.4 describe a network in place of `architecture`; nnU-Net translates them.
_OLD_ARCHITECTURE = "UNet_class_name"
_OLD_ARCHITECTURE_KEYS = (
    "UNet_base_num_features",
    "unet_max_num_features",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
    "num_pool_per_axis",
    "pool_op_kernel_sizes",
    "conv_kernel_sizes",
)
_OTHER_FILES = ("dataset", "dataset_fingerprint", "splits_final")  # what nnU-Net keeps beside plans


def check_plans_name(name: str) -> None:
    """Raise a PlanError unless `name` can be the name of plans: of a file and, within '__', of results folders."""
    if re.fullmatch(r"\w[\w.-]*", name) is None or "__" in name or name in _OTHER_FILES:
        raise PlanError(
            f"{name!r} cannot be a plans name: use letters, digits, dots, dashes and single underscores (nnU-Net "
            f"splits results folders at '__'). Choose another -overwrite_plans_name."
        )


def check_replaceable(path: Path, task: str, configurations: Collection[str]) -> dict[str, Any] | None:
    """The plans at `path` if they are ours for this task, None if there is no file.

    Args:
        path: of the plans.
        task: of the run settings that they must have.
        configurations: those that are replaced and have to be complete; others may be the user's own.

    Raises:
        PlanError: if the file is anything else, which must not be overwritten.
    """
    if not path.exists():
        return None
    remedy = "Remove it to have it written anew, or choose another -overwrite_plans_name."
    content = read_json(path, remedy)
    block = content.get(BLOCK)
    if not isinstance(block, Mapping) or block.get("task") != task:
        other = pretext_task_of(content)
        why = "was not written by this command" if other is None else f"is for the pretext task {other}, not for {task}"
        raise PlanError(f"{path} exists and {why}. Choose another -overwrite_plans_name.")
    check_complete(content, path, remedy, configurations)
    return content


def check_complete(plans: Mapping[str, Any], path: Path, remedy: str, wanted: Collection[str] | None = None) -> None:
    """Raise one PlanError naming everything that a plans file lacks.

    Args:
        plans: what the file holds.
        path: of the file.
        remedy: the end of the message.
        wanted: the configurations that will be used; those that they inherit from count too. None for all.
    """
    missing = [key for key in _PLANS_KEYS if key not in plans]
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping):
        missing.append("configurations")
        configurations = {}
    for name in _with_ancestors(configurations, wanted):
        configuration = configurations[name]
        if not isinstance(configuration, Mapping):
            missing.append(f"configurations.{name}")
        elif "inherits_from" not in configuration:
            missing += [f"configurations.{name}.{key}" for key in _keys(configuration) if key not in configuration]
            missing += [f"configurations.{name}.{entry}" for entry in _unusable_entries(configuration)]
            missing += _windows_missing(plans, configuration)
        elif not _has_ancestor(configurations, name):
            missing.append(f"configurations.{name}.inherits_from that names another configuration")
    if BLOCK in plans and not isinstance(plans[BLOCK], Mapping):
        missing.append(f"an object under {BLOCK}")
    if missing:
        lacks = ", ".join(dict.fromkeys(missing))
        raise PlanError(f"{path} is not a complete plans file; it lacks: {lacks}. {remedy}")


def _with_ancestors(configurations: Mapping[str, Any], wanted: Collection[str] | None) -> list[str]:
    """Names of the configurations that are wanted, as far as they are there, and of those that they build on."""
    found: list[str] = []
    waiting = list(configurations if wanted is None else wanted)
    while waiting:
        name = waiting.pop(0)
        if isinstance(name, str) and name in configurations and name not in found:
            found.append(name)
            if isinstance(configurations[name], Mapping):
                waiting += [configurations[name].get(link) for link in ("inherits_from", "previous_stage")]
    return found


def _keys(configuration: Mapping[str, Any]) -> tuple[str, ...]:
    is_old = _OLD_ARCHITECTURE in configuration and "architecture" not in configuration
    return (*_CONFIGURATION_KEYS, *(_OLD_ARCHITECTURE_KEYS if is_old else ("architecture",)))


def _unusable_entries(configuration: Mapping[str, Any]) -> list[str]:
    """Entries that are there but hold something of another kind."""
    found = [
        f"{key} (a list with numbers or names)"
        for key in ("patch_size", "spacing", "normalization_schemes")
        if key in configuration and not (isinstance(configuration[key], (list, tuple)) and configuration[key])
    ]
    if not found and "spacing" in configuration and "patch_size" in configuration:
        spacing = configuration["spacing"]
        if len(spacing) != len(configuration["patch_size"]) or not all(is_number(mm) and mm > 0 for mm in spacing):
            found.append("spacing (as many mm above 0 as the patch has axes)")
    if "architecture" in configuration or "pool_op_kernel_sizes" in configuration:
        of_old_plans = {"arch_kwargs": {"strides": configuration.get("pool_op_kernel_sizes")}}
        architecture = configuration.get("architecture", of_old_plans)
        arguments = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
        strides = arguments.get("strides") if isinstance(arguments, Mapping) else None
        if not isinstance(strides, (list, tuple)) or not all(isinstance(stride, (list, tuple)) for stride in strides):
            found.append("architecture.arch_kwargs.strides (a list for each stage)")
    return found


def _windows_missing(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> list[str]:
    """The CT channels of a configuration for which the plans do not say how nnU-Net is to clip and scale them."""
    schemes = configuration.get("normalization_schemes")
    if not isinstance(schemes, (list, tuple)) or not isinstance(plans.get(INTENSITIES), Mapping):
        return []
    return [
        f"{INTENSITIES}.{channel} with {', '.join(WINDOW)}"
        for channel, window in ct_windows(plans, schemes).items()
        if not isinstance(window, Mapping) or not set(WINDOW) <= set(window)
    ]


def ct_windows(plans: Mapping[str, Any], schemes: Sequence[str]) -> dict[int, Any]:
    """What plans say of the intensities of each channel that is normalised as CT; None where they say nothing."""
    return {channel: plans[INTENSITIES].get(str(channel)) for channel, scheme in enumerate(schemes) if scheme == CT}


def _has_ancestor(configurations: Mapping[str, Any], name: str) -> bool:
    """Whether following `inherits_from` ends at a configuration that stands on its own."""
    seen: set[str] = set()
    while isinstance(name, str) and name not in seen and isinstance(configurations.get(name), Mapping):
        seen.add(name)
        if "inherits_from" not in configurations[name]:
            return True
        name = configurations[name]["inherits_from"]
    return False


def configuration_3d(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of a 3D configuration, with what it inherits from others.

    Raises:
        PlanError: if the plans have no such configuration, or it is 2D.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # takes seconds

    of_plans = f"of the plans {plans['plans_name']} of {plans['dataset_name']}"
    if name not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise PlanError(f"There is no configuration {name!r} {of_plans}. Choose one of {known}.")
    try:
        resolved: dict[str, Any] = deepcopy(PlansManager(dict(plans)).get_configuration(name).configuration)
    except RuntimeError as error:  # a network of before nnU-Net 2.4 that nnU-Net cannot translate
        raise PlanError(
            f"The configuration {name!r} {of_plans}: {error}. Plan the dataset with nnU-Net again."
        ) from None
    resolved.pop("inherits_from", None)
    resolved["architecture"] = without_trainer(resolved["architecture"])
    if len(resolved["patch_size"]) != 3:
        raise PlanError(
            f"The configuration {name!r} {of_plans} is 2D (patch size {list(resolved['patch_size'])}); pretraining "
            f"and the networks here are 3D. Use a 3D configuration such as 3d_fullres, or nnU-Net's own trainer for 2d."
        )
    return resolved


def with_present_names(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans, in which an entry that the first releases of nnU-Net v2 named otherwise has its present name too."""
    if _OLD_INTENSITIES in plans:
        plans.setdefault(INTENSITIES, plans[_OLD_INTENSITIES])
    return plans


def with_trainer(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An `architecture` entry that nnU-Net's own trainers refuse with an error that names ours.

    nnU-Net looks for the names in `_kw_requires_import` among the network's arguments when it builds it. Where -tr was
    forgotten, its trainer would train without the pretrained weights and the run's settings, and end with success.
    """
    return {
        **architecture,
        "_kw_requires_import": [*without_trainer(architecture)["_kw_requires_import"], NEEDS_TRAINER],
    }


def without_trainer(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An `architecture` entry without what `with_trainer` adds, as all but nnU-Net's own trainers need it."""
    names = [name for name in architecture.get("_kw_requires_import", ()) if name != NEEDS_TRAINER]
    return {**architecture, "_kw_requires_import": names}


def check_dataset(dataset_json: Mapping[str, Any], path: Path) -> None:
    """Raise a PlanError unless a dataset.json names its channels, its labels and the number of training cases."""
    missing = [] if channel_names(dataset_json) else ["channel_names"]
    labels = dataset_json.get("labels")
    if not (isinstance(labels, Mapping) and labels):
        missing.append("labels")
    if not isinstance(dataset_json.get("numTraining"), int):
        missing.append("numTraining (the number of training cases)")
    if missing:
        raise PlanError(f"{path} lacks: {', '.join(missing)}. Complete it as nnU-Net's documentation describes.")


def channel_names(dataset_json: object) -> tuple[str, ...]:
    """The names of a dataset's image channels, in order; empty if they are not known."""
    channels = (
        dataset_json.get("channel_names") or dataset_json.get("modality") if isinstance(dataset_json, Mapping) else None
    )
    return tuple(map(str, channels.values())) if isinstance(channels, Mapping) else ()


def check_channels(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> None:
    """Raise a PlanError unless a configuration normalises as many channels as a dataset has."""
    channels = channel_names(dataset_json)
    entry = configuration_3d(plans, configuration)
    for key in ("normalization_schemes", "use_mask_for_norm"):
        if len(entry[key]) != len(channels):
            raise PlanError(
                f"{configuration} of the plans {plans['plans_name']} has {len(entry[key])} {key}, but "
                f"{plans['dataset_name']} has {len(channels)} channels ({', '.join(channels)}). "
                f"Plan from plans that were made for this dataset (-p)."
            )


def check_is_finetuning(plans: Mapping[str, Any], configuration: str) -> None:
    """Raise a PlanError for plans of a pretraining, whose names are easily taken for those of a fine-tuning."""
    if (task := pretext_task_of(plans)) is not None:
        raise PlanError(
            f"{plans['plans_name']} are the plans of a pretraining ({task}), and MisFMTrainer fine-tunes. Plan with "
            f"what was pretrained: misfm_plan -d {plans['dataset_name']} -c {configuration} -pretrained_weights "
            f"CHECKPOINT, then train with the -p that it names."
        )


def check_labels(dataset_json: Mapping[str, Any], path: Path) -> None:
    """Raise a PlanError unless a dataset.json has labels that a segmentation can be trained on."""
    labels: Mapping[str, Any] = dataset_json["labels"]
    regions = any(isinstance(label, (list, tuple)) and len(label) > 1 for label in labels.values())
    listed = [label if isinstance(label, (list, tuple)) else [label] for label in labels.values()]
    try:
        values = sorted({int(value) for label in listed for value in label})
    except (TypeError, ValueError):
        raise PlanError(f"{path}: the labels {dict(labels)} must be whole numbers, or lists of them.") from None
    if not set(labels) - {"background", "ignore"}:
        raise PlanError(
            f"{path} names no label besides the background: a segmentation cannot be trained on it. Give a labelled "
            f"dataset with -d; volumes without labels are for misfm_pretrain."
        )
    # Networks with a sigmoid for each region take any numbers; the others have one output for each number from 0.
    if not regions and values != list(range(len(values))):
        raise PlanError(
            f"{path}: the labels {values} are not consecutive numbers from 0, as nnU-Net needs them. Number them 0 to "
            f"{len(values) - 1} in dataset.json and in the label files, and preprocess the dataset again."
        )


def check_sizes(patch_size: object, batch_size: object, divisor: Sequence[int] = (1, 1, 1)) -> None:
    """Raise a PlanError unless both are whole numbers of at least 1, and the patch one that the divisor divides."""
    patch: list[Any] = list(patch_size) if isinstance(patch_size, (list, tuple)) else [patch_size]
    wrong = [str(n) for n in (*patch, batch_size) if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong or len(patch) != 3:
        raise PlanError(f"patch size {patch} and batch size {batch_size} must be whole numbers of at least 1.")
    if any(n % s for n, s in zip(patch, divisor, strict=True)):
        fitting = [-(-n // s) * s for n, s in zip(patch, divisor, strict=True)]
        raise PlanError(
            f"patch size {patch} cannot be halved as often as the network does; each axis must be a multiple of "
            f"{list(divisor)}. Use -patch_size {' '.join(map(str, fitting))}."
        )


def build_network(architecture: Mapping[str, Any], input_channels: int, num_classes: int) -> Any:
    """The network of a plan's `architecture` entry, with deep supervision; raises whatever its class raises."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans  # takes seconds

    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        input_channels,
        num_classes,
        allow_init=False,
        deep_supervision=True,
    )


def build_on_meta(architecture: Mapping[str, Any], input_channels: int, num_classes: int) -> Any:
    """The network of a plan's `architecture` entry without memory for its weights.

    Raises:
        PlanError: if it cannot be built, or not be trained as nnU-Net does.
    """
    features = architecture["arch_kwargs"].get("features_per_stage")
    if isinstance(features, (list, tuple)) and any(not isinstance(n, int) or n < 1 for n in features):
        raise PlanError(f"-features_per_stage {features}: each stage needs at least one channel.")
    name = str(architecture.get("network_class_name")).rpartition(".")[2]
    try:
        network = without_memory(lambda: build_network(architecture, input_channels, num_classes))
    except (TypeError, ValueError, KeyError, ImportError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        own = f" {_CALL}" if isinstance(error, TypeError) else ""
        raise PlanError(f"The network {name} of these plans cannot be built: {error}.{own}") from None
    if not hasattr(getattr(network, "decoder", None), "deep_supervision"):
        raise PlanError(
            f"The network {name} of these plans has no decoder.deep_supervision, by which nnU-Net switches between all "
            f"outputs and the finest one. {_CALL}"
        )
    return network


def without_memory(build: Callable[[], Any]) -> Any:
    """What `build` makes, without memory for its weights unless its constructor looks at their values."""
    import torch

    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:
        return build()
