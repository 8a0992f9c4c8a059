"""Fine-tuning plans: an nnU-Net dataset's plans with our network, run settings and pretrained weights.

Works on the dicts of plans files. Data that nnU-Net preprocessed under another plan is never touched: every plan
written here has data folders of its own (`data_identifier`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.architectures.resolution import total_strides
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import build_on_meta, check_plans_name, configuration_3d, with_trainer
from nnunetv2_misfm.plans.network_entry import (
    NETWORKS,
    architecture_entry,
    degree_for_spacing,
    degree_of_anisotropy,
    enlarge_for_augmentation,
    is_own_network,
    set_sizes,
)
from nnunetv2_misfm.plans.run_settings import BLOCK, PRETRAIN_INFO, SEGMENTATION, FinetuningSettings
from nnunetv2_misfm.plans.settings import write_settings
from nnunetv2_misfm.transfer.pretrained import Source, portable_path
from nnunetv2_misfm.transfer.transfer import TransferReport, transfer

# Constructor arguments that belong to the target or to a run, not to the weights.
_NOT_TAKEN_OVER = ("strides", "stems", "deep_supervision", "checkpointing")
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


@dataclass(frozen=True)
class PlanRequest:
    """What a fine-tuning plan should be.

    Attributes:
        plans_name: of the new plans.
        configurations: 3D configurations to plan.
        network: a name of `NETWORKS`, or "plan" for the network that the dataset's own plans name; None for the
            checkpoint's, PCT-Net without one.
        settings: of the run.
        arch_kwargs: constructor arguments of the network that the user chose.
        spacing: "dataset" keeps the plan's, "pretrained" takes the checkpoint's; or mm in the order of the images'
            axes, before the plans transpose them.
        ct_intensities: "pretrained" clips and scales CT as in pretraining, "dataset" as the dataset's plans do.
        patch_size, batch_size: instead of the plan's; None keeps them.
        from_scratch: plan for a source but do not load it: the fair baseline.
        kept: other configurations of the plans that are replaced, which stay as they are.
    """

    plans_name: str
    configurations: tuple[str, ...]
    network: str | None
    settings: FinetuningSettings
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    spacing: str | tuple[float, float, float] = "dataset"
    ct_intensities: str = "pretrained"
    patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None
    from_scratch: bool = False
    kept: Mapping[str, Any] = field(default_factory=dict)


def check_name(plans_name: str, base: Mapping[str, Any]) -> None:
    """Raise a PlanError unless new plans can have this name beside those they are made from."""
    check_plans_name(plans_name)
    if plans_name == base["plans_name"]:
        raise PlanError(
            f"-p and -overwrite_plans_name are both {plans_name!r}; the new plans need a name of their own."
        )


def finetuning_plans(
    base: Mapping[str, Any], request: PlanRequest, source: Source | None
) -> tuple[dict[str, Any], list[str]]:
    """The plans for a request, and remarks the user should see.

    Args:
        base: the dataset's plans as nnU-Net wrote them.
        request: what to plan.
        source: the pretrained checkpoint, if any.

    Raises:
        PlanError: if a configuration is missing, not 3D, or the checkpoint has no network to take over.
    """
    if request.spacing != "dataset" and len(request.configurations) > 1:
        raise PlanError(
            f"-spacing would give {' and '.join(request.configurations)} the same spacing. Plan them one after the "
            f"other, each with its own -c and -spacing; what is planned under the name stays."
        )
    plans = deepcopy(dict(base))
    plans["plans_name"] = request.plans_name
    remarks: list[str] = []
    plans["configurations"] = {
        name: _configuration(base, name, request, source, remarks) for name in request.configurations
    }
    _keep_normalisation(plans, source, request.ct_intensities, remarks)
    plans[BLOCK] = {"task": SEGMENTATION, **write_settings(request.settings)}
    plans[PRETRAIN_INFO] = _pretrain_info(source, request, plans)
    plans["configurations"] |= deepcopy(dict(request.kept))
    _link_stages(plans["configurations"])
    return plans, remarks


def _link_stages(configurations: Mapping[str, Any]) -> None:
    """Let each first stage of a cascade name the stages that need its predictions, which nnU-Net then makes."""
    for name, configuration in configurations.items():
        first = configurations.get(configuration.get("previous_stage"))
        if first is not None:
            named = first.get("next_stage") or []
            named = [named] if isinstance(named, str) else named
            if name not in named:
                first["next_stage"] = [*named, name]


def check_fit(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    source: Source | None,
    min_coverage: float | None = None,
) -> TransferReport | None:
    """Make sure that a planned network can be built and, if there are weights, that they cover what is asked for.

    Args:
        plans, configuration, dataset_json: what is planned.
        source: the weights, if any.
        min_coverage: instead of the one in the plans.

    Returns:
        What the transfer would do; None without weights.

    Raises:
        PlanError: if the network cannot be built.
        TransferError: if the weights do not fit it.
    """
    manager = PlansManager(dict(plans))
    channels = determine_num_input_channels(manager, manager.get_configuration(configuration), dict(dataset_json))
    heads = manager.get_label_manager(dict(dataset_json)).num_segmentation_heads
    architecture = plans["configurations"][configuration]["architecture"]
    network = build_on_meta(architecture, channels, heads)
    if source is None:
        return None
    settings = plans[BLOCK]
    return transfer(
        source.weights,
        str(source.path),
        network.to_empty(device="cpu"),
        source_arguments=source.arch_kwargs,
        source_images=source.num_images,
        num_images=num_images(dataset_json),
        encoder_only=settings["encoder_only"],
        mix_input_channels=settings["mix_input_channels"],
        min_coverage=settings["min_coverage"] if min_coverage is None else min_coverage,
    )[1]


def num_images(dataset_json: Mapping[str, Any]) -> int:
    """Image channels of a dataset, without the label channels that a cascade adds to the network's input."""
    return len(dataset_json.get("channel_names") or dataset_json["modality"])


def same_preprocessing(plans: Mapping[str, Any], base: Mapping[str, Any], configuration: str) -> bool:
    """Whether preprocessing under both plans gives the same arrays."""
    return preprocessing_key(plans, configuration) == preprocessing_key(base, configuration)


def preprocessing_key(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Everything in a plan that the preprocessed arrays of a configuration depend on."""
    resolved = configuration_3d(plans, configuration)
    key = {name: resolved.get(name) for name in _PREPROCESSING_KEYS}
    key["transpose_forward"] = plans["transpose_forward"]
    key["image_reader_writer"] = plans["image_reader_writer"]
    if any(scheme == "CTNormalization" for scheme in resolved["normalization_schemes"]):
        key["intensities"] = plans["foreground_intensity_properties_per_channel"]
    return key


def _configuration(
    base: Mapping[str, Any], name: str, request: PlanRequest, source: Source | None, remarks: list[str]
) -> dict[str, Any]:
    configuration = configuration_3d(base, name)
    for link in ("previous_stage", "next_stage"):
        linked = configuration.get(link)
        linked = [linked] if isinstance(linked, str) else linked or []
        if linked and not set(linked) & {*request.configurations, *request.kept}:
            if link == "previous_stage":
                raise PlanError(
                    f"{name} needs the predictions of {configuration[link]}. Plan both: -c {configuration[link]} {name}"
                )
            del configuration[link]
    configuration["data_identifier"] = f"{request.plans_name}_{name}"
    degree = degree_of_anisotropy(configuration)
    if request.spacing != "dataset":
        wanted = _wanted_spacing(request, source, base["transpose_forward"])
        remarks.append(f"{name}: {_change_spacing(configuration, wanted)}")
        degree = degree_for_spacing(configuration["spacing"])
    configuration["architecture"] = _architecture(configuration, degree, name, request, source, remarks)
    if request.patch_size is None and enlarge_for_augmentation(configuration):
        remarks.append(
            f"{name}: patch size {configuration['patch_size']}, because nnU-Net's augmentation cannot blur or scale "
            f"fewer voxels along an axis; smaller images are padded."
        )
    set_sizes(configuration, request.patch_size, request.batch_size)
    needed = dict(configuration)
    if enlarge_for_augmentation(needed):
        raise PlanError(
            f"-patch_size {' '.join(map(str, configuration['patch_size']))}: nnU-Net's augmentation cannot blur so few "
            f"voxels along an axis. Use -patch_size {' '.join(map(str, needed['patch_size']))}."
        )
    return configuration


def _architecture(
    configuration: Mapping[str, Any],
    degree: int,
    name: str,
    request: PlanRequest,
    source: Source | None,
    remarks: list[str],
) -> dict[str, Any]:
    planned: dict[str, Any] = configuration["architecture"]
    if request.network == "plan":
        if request.arch_kwargs:
            raise PlanError("-features_per_stage changes a network that -network plan keeps as it is. Leave one out.")
        return planned
    network = request.network or _network_of(source)
    if network is None:
        _check_same_kind(planned, source, request)
        return planned
    if source is not None and source.info is not None and _network_of(source) != network:
        held = source.info.network_class_name.rpartition(".")[2]
        raise PlanError(f"{source.path} holds a {held}, which -network {network} cannot use. Leave -network out.")
    later = [list(stride) for stride in planned["arch_kwargs"]["strides"][3:]]
    if any(1 in stride for stride in later) and not is_own_network(planned):
        remarks.append(f"{name}: the plan also pools unevenly later ({later}); {network} pools all axes there.")
    taken_over: dict[str, Any] = {}
    if source is not None:
        if source.info is None:
            raise PlanError(
                f"{source.path} does not say which network it holds (a checkpoint of nnU-Net's own). "
                f"Use -network plan to keep the network of the dataset's plans."
            )
        taken_over = {key: value for key, value in source.info.arch_kwargs.items() if key not in _NOT_TAKEN_OVER}
    return architecture_entry(network, degree, **{**taken_over, **request.arch_kwargs})


def _wanted_spacing(request: PlanRequest, source: Source | None, transpose: Sequence[int]) -> list[float]:
    """In mm, plans axis order."""
    if request.spacing != "pretrained":
        return [float(request.spacing[axis]) for axis in transpose]
    spacing = source.info.preprocessing.get("spacing") if source is not None and source.info is not None else None
    if spacing is None:
        whose = "there are no pretrained weights" if source is None else f"{source.path} does not say what it was"
        raise PlanError(f"-spacing pretrained: {whose}. Give three numbers in mm, or keep the dataset's.")
    return [float(mm) for mm in spacing]


def _change_spacing(configuration: dict[str, Any], spacing: list[float]) -> str:
    """Another spacing, with the median image's size at it, and a patch that is no larger than that; says so."""
    if not all(0 < mm < math.inf for mm in spacing):
        raise PlanError(f"-spacing {spacing} must be three numbers above 0, in mm.")
    before = configuration["spacing"]
    configuration["spacing"] = spacing
    median = configuration.get("median_image_size_in_voxels")
    if median is not None:
        median = [n * old / new for n, old, new in zip(median, before, spacing, strict=True)]
        configuration["median_image_size_in_voxels"] = median
        strides = total_strides(configuration["architecture"]["arch_kwargs"]["strides"])[-1]
        largest = [-(-n // s) * s for n, s in zip(median, strides, strict=True)]
        configuration["patch_size"] = [
            int(min(n, most)) for n, most in zip(configuration["patch_size"], largest, strict=True)
        ]
    return (
        f"spacing {[round(mm, 3) for mm in before]} becomes {[round(mm, 3) for mm in spacing]} mm; "
        f"patch size {configuration['patch_size']}"
    )


def _check_same_kind(planned: Mapping[str, Any], source: Source | None, request: PlanRequest) -> None:
    """Refuse plans for another kind of network of nnU-Net's than the checkpoint holds, which would use little of it."""
    if source is None or source.info is None or request.settings.min_coverage < 1:
        return
    held, wanted = (name.rpartition(".")[2] for name in (source.info.network_class_name, planned["network_class_name"]))
    if held != wanted:
        raise PlanError(
            f"{source.path} holds a {held}, but the dataset's plans name a {wanted}. Plan for a {held} with "
            f"nnUNetv2_plan_experiment (-pl nnUNetPlannerResEncM, L or XL for residual encoders) and give those plans "
            f"with -p, or allow a partial transfer with -min_coverage."
        )


def _network_of(source: Source | None) -> str | None:
    """The name of the checkpoint's network, PCT-Net without one; None for a network that only plans can describe."""
    if source is None or source.info is None:
        return "pctnet"
    names = {class_name: name for name, class_name in NETWORKS.items()}
    return names.get(source.info.network_class_name)


def _keep_normalisation(plans: dict[str, Any], source: Source | None, ct_intensities: str, remarks: list[str]) -> None:
    """Normalise CT as in pretraining if that is wanted; say what changes, and where the two cannot agree."""
    if source is None or source.info is None:
        return
    pretrained = source.info.preprocessing
    before: Sequence[str] = pretrained["normalization_schemes"]
    order, theirs_order = list(plans["transpose_forward"]), pretrained.get("transpose_forward")
    if theirs_order is not None and list(theirs_order) != order:
        remarks.append(
            f"the axes are in the order {order} (transpose_forward), in pretraining {list(theirs_order)}: the network "
            f"meets the body in another orientation. Weights in this one: misfm_pretrain -plans_from "
            f"{plans['dataset_name']}."
        )
    for configuration in plans["configurations"].values():
        for channel, scheme in enumerate(configuration["normalization_schemes"]):
            theirs = before[channel] if channel < len(before) else before[0]
            if scheme != theirs:
                remarks.append(
                    f"channel {channel} is normalised by {scheme}, but pretraining used {theirs}: the features may fit "
                    f"less well. Pretrain on volumes of the same kind if you can."
                )
            elif scheme == "CTNormalization":
                window = pretrained["foreground_intensity_properties_per_channel"]
                properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
                remarks.append(_take_window(properties, window.get(str(channel), window["0"]), ct_intensities))
    remarks[:] = [remark for remark in dict.fromkeys(remarks) if remark]


def _take_window(own: dict[str, float], pretrained: Mapping[str, float], ct_intensities: str) -> str:
    """Let a CT channel be clipped and scaled as in pretraining, if wanted; says how, empty if nothing differs."""
    of_window = ("percentile_00_5", "percentile_99_5", "mean", "std")
    if all(math.isclose(own[name], pretrained[name], rel_tol=1e-6) for name in of_window):
        return ""
    ours, theirs = (
        f"{values['percentile_00_5']:.5g} to {values['percentile_99_5']:.5g} HU" for values in (own, pretrained)
    )
    if ct_intensities == "dataset":
        return (
            f"CT is clipped to {ours}, as the dataset's plans do; pretraining used {theirs}, so the weights meet other "
            f"values than they were made for."
        )
    own.update(pretrained)
    return (
        f"CT is clipped to {theirs} and scaled as in pretraining, instead of {ours} as in the dataset's plans; "
        f"-ct_intensities dataset keeps those."
    )


def require_trainer(plans: dict[str, Any]) -> None:
    """Let the networks of plans be built by our trainer only: others would train without weights and settings."""
    for entry in plans["configurations"].values():
        if "architecture" in entry:
            entry["architecture"] = with_trainer(entry["architecture"])


def _pretrain_info(source: Source | None, request: PlanRequest, plans: Mapping[str, Any]) -> dict[str, Any]:
    # A superset of the keys that nnU-Net's main branch keeps under this name; scratch is a path of null.
    own = is_own_network(next(iter(plans["configurations"].values()))["architecture"])
    info: dict[str, Any] = {
        "checkpoint_path": None,
        "checkpoint_name": None,
        "key_to_encoder": "encoder" if own else "encoder.stages",
        "key_to_stem": "encoder.stems" if own else "encoder.stem",
        "keys_to_in_proj": ["project" if own else "all_modules.0"],
        "key_to_lpe": None,
        "pt_num_in_channels": None,
        "pt_used_patchsize": None,
    }
    if source is None or request.from_scratch:
        return info
    info["checkpoint_path"] = source.hub_name or portable_path(source.path)
    info["checkpoint_name"] = source.path.name
    info["sha256"] = source.sha256
    if source.info is not None:
        info["pt_num_in_channels"] = source.info.input_channels
        info["pt_used_patchsize"] = source.info.preprocessing.get("patch_size")
        info["summary"] = {"task": source.info.task, "kind": source.kind, "training": source.info.training}
    return info
