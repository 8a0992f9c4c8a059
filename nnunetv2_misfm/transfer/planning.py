"""Fine-tuning plans: an nnU-Net dataset's plans with our network, run settings and pretrained weights.

Works on the dicts of plans files. Data that nnU-Net preprocessed under another plan is never touched: every plan
written here has data folders of its own (`data_identifier`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pydoc import locate
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_misfm.checkpoints.described import is_complete_unet
from nnunetv2_misfm.checkpoints.foreign import GENERIC_UNET_CLASS, RESIDUAL_UNET
from nnunetv2_misfm.checkpoints.names import Names, names_in_class
from nnunetv2_misfm.checkpoints.source import Source, portable_path
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import build_on_meta, channel_names, check_plans_name, configuration_3d, with_trainer
from nnunetv2_misfm.plans.network_entry import (
    PLAIN_UNET,
    UNET_CLASSES,
    architecture_entry,
    checked_network,
    degree_for_spacing,
    degree_of_anisotropy,
    enlarged_patch,
    is_own_network,
    own_network_name,
    patch_divisor,
    patch_to_augment,
    set_sizes,
)
from nnunetv2_misfm.plans.run_settings import BLOCK, PRETRAIN_INFO, SEGMENTATION, FinetuningSettings, run_settings
from nnunetv2_misfm.plans.settings import write_settings
from nnunetv2_misfm.transfer.images import (
    about_channels,
    about_spacing,
    change_spacing,
    keep_normalisation,
    wanted_spacing,
)
from nnunetv2_misfm.transfer.report import TransferReport
from nnunetv2_misfm.transfer.transfer import transfer

# Constructor arguments that belong to the target or to a run, not to the weights.
_NOT_TAKEN_OVER = ("strides", "stems", "deep_supervision", "checkpointing")
# How nnU-Net plans for its networks: what to add to nnUNetv2_plan_experiment, and the name of the plans.
_PLANNERS = {
    PLAIN_UNET: ("", "nnUNetPlans"),
    RESIDUAL_UNET: (" -pl nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"),
}
# Where the layers of a network come from that a foreign file describes.
_LAYERS = ("torch.nn.", "dynamic_network_architectures.")
# Networks that differ so little from one of nnU-Net's that its plans take their weights.
_LIKE = {GENERIC_UNET_CLASS: PLAIN_UNET}


@dataclass(frozen=True)
class PlanRequest:
    """What a fine-tuning plan should be.

    Attributes:
        plans_name: of the new plans.
        configurations: 3D configurations to plan.
        network: a name of `NETWORKS`; "plan" for the network that the dataset's own plans name, "pretrained" for the
            checkpoint's with its topology; None for the checkpoint's if it is one of ours, the plans' for others, and
            PCT-Net without one.
        settings: of the run.
        arch_kwargs: constructor arguments of the network that the user chose.
        spacing: "dataset" keeps the plan's, "pretrained" takes the checkpoint's; or mm in the order of the images'
            axes, before the plans transpose them.
        ct_intensities: "pretrained" clips and scales CT as in pretraining, "dataset" as the dataset's plans do.
        patch_size, batch_size: instead of the plan's; None keeps them.
        from_scratch: start from random weights; with a source, as its fair baseline.
        kept: other configurations of the plans that are replaced, which stay as they are.
        channels: names of the dataset's image channels, which are matched with the checkpoint's.
        dataset: its ID or name, for messages.
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
    channels: tuple[str, ...] = ()
    dataset: str = ""


def check_is_new_name(plans_name: str, base: Mapping[str, Any]) -> None:
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

    The patch size is the requested one as it is, which must suit the network and nnU-Net's augmentation. Without a
    request it is that of `base`, cut to the median image where `-spacing` makes that smaller, then enlarged to what
    the checkpoint's network divides with `-network pretrained`, then to what the augmentation needs. Last,
    `-gpu_memory_target`, which goes with no requested size, chooses anew in `memory_target.fit_to_memory`.

    Args:
        base: the dataset's plans as nnU-Net wrote them.
        request: what to plan.
        source: the pretrained checkpoint, if any.

    Raises:
        PlanError: if a configuration is missing, not 3D, or the checkpoint has no network to take over.
    """
    _check(request, source)
    plans = deepcopy(dict(base))
    plans["plans_name"] = request.plans_name
    remarks: list[str] = []
    plans["configurations"] = {
        name: _configuration(base, name, request, source, remarks) for name in request.configurations
    }
    if source is not None:
        remarks += keep_normalisation(plans, source, request.ct_intensities, request.channels)
        remarks += about_channels(source, request.channels)
    remarks = list(dict.fromkeys(remarks))
    plans[BLOCK] = {"task": SEGMENTATION, **write_settings(request.settings)}
    plans[PRETRAIN_INFO] = _pretrain_info(source, request, plans)
    plans["configurations"] |= deepcopy(dict(request.kept))
    _link_stages(plans["configurations"])
    return plans, remarks


def _check(request: PlanRequest, source: Source | None) -> None:
    """Raise a PlanError for what cannot be planned, whatever the dataset."""
    if source is not None:
        source.check_is_3d()
    elif request.network == "pretrained":
        raise PlanError("-network pretrained takes the network of a checkpoint. Name one with -pretrained_weights.")
    if request.network in ("plan", "pretrained") and request.arch_kwargs:
        raise PlanError(
            f"-features_per_stage changes a network that -network {request.network} keeps as it is. Leave one out."
        )
    if request.spacing != "dataset" and len(request.configurations) > 1:
        raise PlanError(
            f"-spacing would give {' and '.join(request.configurations)} the same spacing. Plan them one after the "
            f"other, each with its own -c and -spacing; what is planned under the name stays."
        )


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
    network = checked_network(plans["configurations"][configuration], channels, heads)
    if source is None:
        return None
    settings = run_settings(plans, FinetuningSettings)
    if min_coverage is not None:
        settings = settings.model_copy(update={"min_coverage": min_coverage})
    return transfer(
        source,
        network.to_empty(device="cpu"),
        settings,
        channel_names(dataset_json),
        lambda more_channels, more_classes: build_on_meta(architecture, channels + more_channels, heads + more_classes),
    )[1]


def _configuration(
    base: Mapping[str, Any], name: str, request: PlanRequest, source: Source | None, remarks: list[str]
) -> dict[str, Any]:
    configuration = configuration_3d(base, name)
    first = configuration.get("previous_stage")
    if first and first not in (*request.configurations, *request.kept):
        raise PlanError(f"{name} needs the predictions of {first}. Plan both: -c {first} {name}")
    configuration.pop("next_stage", None)  # `_link_stages` names those that are planned
    configuration["data_identifier"] = f"{request.plans_name}_{name}"
    degree = degree_of_anisotropy(configuration)
    if request.spacing != "dataset":
        wanted = wanted_spacing(request.spacing, source, base["transpose_forward"])
        remarks.append(f"{name}: {change_spacing(configuration, wanted)}")
        degree = degree_for_spacing(configuration["spacing"])
    else:
        remarks += (f"{name}: {remark}" for remark in about_spacing(configuration["spacing"], source))
    configuration["architecture"] = planned = _architecture(configuration, degree, name, request, source, remarks)
    if request.network == "pretrained" and request.patch_size is None:
        configuration["patch_size"] = enlarged_patch(configuration, planned, patch_divisor(planned))
    enough = patch_to_augment(planned, request.patch_size or configuration["patch_size"])
    if request.patch_size is None and enough != configuration["patch_size"]:
        configuration["patch_size"] = enough
        remarks.append(
            f"{name}: patch size {enough}, because nnU-Net's augmentation cannot blur or scale "
            f"fewer voxels along an axis; smaller images are padded."
        )
    set_sizes(configuration, request.patch_size, request.batch_size)
    if configuration["patch_size"] != enough:
        raise PlanError(
            f"-patch_size {' '.join(map(str, configuration['patch_size']))}: nnU-Net's augmentation cannot blur so few "
            f"voxels along an axis. Use -patch_size {' '.join(map(str, enough))}."
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
    network = _network_of(source) if request.network in (None, "pretrained") else request.network
    if network is None and source is not None:
        if request.arch_kwargs:
            raise PlanError(
                f"-features_per_stage is for the networks of this package. {source.path} holds a "
                f"{source.network_name}, whose stages are as in the dataset's plans. Leave -features_per_stage out."
            )
        if request.network == "pretrained":
            return _held_architecture(source)
        _check_same_kind(planned, source, request)
    if network == "plan" and source is not None:
        _check_not_ours(planned, source)
    if network in (None, "plan"):
        remarks += (f"{name}: {remark}" for remark in _about_activations(planned, source))
        return planned
    if source is not None and _network_of(source) != network:
        raise PlanError(
            f"{source.path} holds a {source.network_name}, which -network {network} cannot use. Leave -network out."
        )
    later = [list(stride) for stride in planned["arch_kwargs"]["strides"][3:]]
    if any(1 in stride for stride in later) and not is_own_network(planned):
        remarks.append(f"{name}: the plan also pools unevenly later ({later}); {network} pools all axes there.")
    taken_over: dict[str, Any] = {}
    if source is not None and source.info is not None:
        taken_over = {key: value for key, value in source.info.arch_kwargs.items() if key not in _NOT_TAKEN_OVER}
    return architecture_entry(network, degree, **{**taken_over, **request.arch_kwargs})


def _held_architecture(source: Source) -> dict[str, Any]:
    """The network of a checkpoint with one of nnU-Net's, as plans describe it."""
    info = source.info
    if info is None or not is_complete_unet(info):
        raise PlanError(
            f"{source.path} holds a {source.network_name}, so -network pretrained has no complete U-Net of nnU-Net's "
            f"to plan. Use -network plan, the network of the dataset's plans."
        )
    arguments = {name: value for name, value in info.arch_kwargs.items() if name != "deep_supervision"}
    for name in UNET_CLASSES:
        # nnU-Net imports and calls what is named here: in a foreign file that must not be anything but a layer, and no
        # other module may be imported to find out.
        named = str(arguments.get(name) or "torch.nn.Identity")
        layer = locate(named) if named.startswith(_LAYERS) else None
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise PlanError(f"{source.path} names {arguments[name]!r} as {name}, which is no layer.")
    return {
        "network_class_name": info.network_class_name,
        "arch_kwargs": arguments,
        "_kw_requires_import": list(UNET_CLASSES),
    }


def _about_activations(planned: Mapping[str, Any], source: Source | None) -> Iterator[str]:
    """Remarks where a U-Net's activations or norms are not those that the weights were trained with."""
    held = {} if source is None or source.info is None else source.info.arch_kwargs
    theirs, ours = _after_convolutions(held), _after_convolutions(planned["arch_kwargs"])
    differing = [name for name in theirs if name in held and theirs[name] != ours[name]]
    if differing:
        trained, trains = (", ".join(f"{name} {one[name]}" for name in differing) for one in (theirs, ours))
        yield (
            f"the checkpoint's network was trained with {trained}; this one has {trains}, so its features are not "
            f"those that the weights were trained to give. -network pretrained trains the checkpoint's own."
        )


def _after_convolutions(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What follows the convolutions of a U-Net, apart from the kind of norm, by the constructor's arguments."""
    kwargs = {name: value for name, value in (arguments.get("nonlin_kwargs") or {}).items() if name != "inplace"}
    return {
        "nonlin": arguments.get("nonlin"),
        "nonlin_kwargs": kwargs,
        "nonlin_first": arguments.get("nonlin_first", False),
        "norm_op_kwargs": arguments.get("norm_op_kwargs"),
    }


def _check_same_kind(planned: Mapping[str, Any], source: Source, request: PlanRequest) -> None:
    """Refuse plans for another kind of network of nnU-Net's than the checkpoint holds, which would use little of it."""
    if source.info is None or request.settings.min_coverage < 1:
        return
    kinds = [_LIKE.get(name, name) for name in (source.info.network_class_name, planned["network_class_name"])]
    held, wanted = (name.rpartition(".")[2] for name in kinds)
    if held == wanted or (source.whole and names_in_class(wanted) is None):
        return
    planner = _PLANNERS.get(kinds[0])
    if planner is None:
        raise PlanError(
            f"{source.path} holds a {held}, but the dataset's plans name a {wanted}. Name its class in a plans file, "
            f"and give those plans with -p."
        )
    command, plans_name = planner
    raise PlanError(
        f"{source.path} holds a {held}, but the dataset's plans name a {wanted}. Plan for a {held}: "
        f"nnUNetv2_plan_experiment -d {request.dataset or 'ID'}{command}, then misfm_plan with -p {plans_name}; or "
        f"train the checkpoint's own network with -network pretrained."
    )


def _check_not_ours(planned: Mapping[str, Any], source: Source) -> None:
    """Refuse weights of a network of this package for plans of one of nnU-Net's; a class of one's own may hold ours."""
    wanted = planned["network_class_name"]
    if _network_of(source) and own_network_name(wanted) is None and names_in_class(wanted) is not None:
        raise PlanError(
            f"{source.path} holds a {source.network_name}, which -network plan cannot use: the dataset's plans name a "
            f"{wanted.rpartition('.')[2]}. Leave -network out."
        )


def _network_of(source: Source | None) -> str | None:
    """The name of the checkpoint's network, PCT-Net without one; None for a network that only plans can describe."""
    if source is None:
        return "pctnet"
    return None if source.info is None else own_network_name(source.info.network_class_name)


def pin_trainer(plans: dict[str, Any]) -> None:
    """Let the networks of plans be built by our trainer only: others would train without weights and settings."""
    for entry in plans["configurations"].values():
        if "architecture" in entry:
            entry["architecture"] = with_trainer(entry["architecture"])


def _pretrain_info(source: Source | None, request: PlanRequest, plans: Mapping[str, Any]) -> dict[str, Any]:
    # A superset of the keys that nnU-Net's main branch keeps under this name; scratch is a path of null.
    architecture = next(iter(plans["configurations"].values()))["architecture"]
    names = names_in_class(architecture["network_class_name"]) or Names()
    info: dict[str, Any] = {
        "checkpoint_path": None,
        "checkpoint_name": None,
        "key_to_encoder": (*names.encoder_stages, names.encoder)[0],
        "key_to_stem": names.stem,
        "keys_to_in_proj": list(names.in_proj),
        "key_to_lpe": None,
        "pt_num_in_channels": None,
        "pt_used_patchsize": None,
    }
    if source is None or request.from_scratch:
        return info
    info["checkpoint_path"] = source.hub_name or portable_path(source.path)
    info["checkpoint_name"] = source.path.name
    info["sha256"] = source.sha256
    info["pt_used_patchsize"] = source.preprocessing.get("patch_size")
    if source.info is not None:
        info["pt_num_in_channels"] = source.info.input_channels
        info["summary"] = {"task": source.info.task, "kind": source.network_name, "training": source.info.training}
    return info
