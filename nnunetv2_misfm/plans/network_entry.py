"""The `architecture` entry of a plans file: which networks there are, their arguments, and the sizes they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nnunetv2_misfm import architectures
from nnunetv2_misfm.architectures.resolution import AnySizeNetwork, strides_of, total_strides
from nnunetv2_misfm.errors import PlanError, first_line
from nnunetv2_misfm.plans.checks import (
    build_on_meta,
    check_sizes,
    configuration_3d,
    with_present_names,
    without_trainer,
)
from nnunetv2_misfm.plans.run_settings import BLOCK, RunSettings, is_ours
from nnunetv2_misfm.plans.settings import write_settings

# nnU-Net blurs with a sigma of up to 1 voxel, and mirrors 3 voxels at the border for it.
_FEWEST_VOXELS_TO_BLUR = 4
STEM, ENCODER, DECODER = "stem", "encoder", "decoder"
"""The parts of a network that pretraining can train."""
# nnU-Net's usual network, the constructor arguments of its U-Nets that are classes, and those that its planners give
# every one of them and no weights tell.
PLAIN_UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
UNET_CLASSES = ("conv_op", "norm_op", "dropout_op", "nonlin")
UNET_ARGUMENTS: dict[str, Any] = {
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
NETWORKS = {
    "pctnet": "nnunetv2_misfm.architectures.PCTNet",
    "fmunet": "nnunetv2_misfm.architectures.FMUNet",
}


def architecture_entry(network: str, anisotropy: int, **arch_kwargs: Any) -> dict[str, Any]:
    """What a plan's configuration holds under `architecture`.

    Args:
        network: a key of `NETWORKS`.
        anisotropy: degree of anisotropy, 0 to 2.
        arch_kwargs: constructor arguments that differ from the network's defaults.

    Raises:
        ValueError: if the network is unknown.
    """
    if network not in NETWORKS:
        raise ValueError(f"network {network!r} is not one of {', '.join(NETWORKS)}")
    return {
        "network_class_name": NETWORKS[network],
        "arch_kwargs": {"strides": strides_of(anisotropy), **arch_kwargs},
        "_kw_requires_import": [],
    }


def is_own_network(architecture: Mapping[str, Any]) -> bool:
    """Whether a plan's `architecture` entry names a network of this package."""
    return architecture["network_class_name"] in NETWORKS.values()


def own_network_name(class_name: str) -> str | None:
    """The key of `NETWORKS` for a class as plans name it; None for a network that is not of this package."""
    return next((name for name, path in NETWORKS.items() if path == class_name), None)


def own_class(class_name: str) -> type[AnySizeNetwork]:
    """A class of `NETWORKS` by its path or its bare name, looked up among the networks of this package only."""
    found: type[AnySizeNetwork] = getattr(architectures, class_name.rpartition(".")[2])
    return found


def patch_divisor(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """What each axis of the patch must be a multiple of; networks of this package take any size."""
    return (1, 1, 1) if is_own_network(architecture) else total_strides(architecture["arch_kwargs"]["strides"])[-1]


def patch_to_augment(architecture: Mapping[str, Any], patch_size: Sequence[int]) -> list[int]:
    """The patch with as many voxels along each axis as nnU-Net's augmentation of segmentations needs at least."""
    coarsest = _coarsest_output(architecture)
    return [max(int(n), _FEWEST_VOXELS_TO_BLUR, stride) for n, stride in zip(patch_size, coarsest, strict=True)]


def _coarsest_output(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """Stride of the coarsest output of deep supervision, for which segmentations are scaled down."""
    return total_strides(architecture["arch_kwargs"]["strides"])[-2]


def set_sizes(configuration: dict[str, Any], patch_size: Sequence[int] | None, batch_size: int | None) -> None:
    """Put the sizes that were asked for, if any, into a configuration of a plans file, and check what it then has.

    Raises:
        PlanError: if its network cannot work with its sizes.
    """
    if patch_size is not None:
        configuration["patch_size"] = list(patch_size)
    if batch_size is not None:
        configuration["batch_size"] = batch_size
    architecture, patch, batch = (configuration[key] for key in ("architecture", "patch_size", "batch_size"))
    check_sizes(patch, batch, patch_divisor(architecture))
    coarsest = _coarsest_output(architecture)
    if any(n < stride for n, stride in zip(patch, coarsest, strict=True)):
        enough = " ".join(str(max(n, stride)) for n, stride in zip(patch, coarsest, strict=True))
        raise PlanError(f"patch size {list(patch)} leaves nothing of the coarsest output. Use -patch_size {enough}.")
    if leaves_a_single_value(architecture, patch, batch):
        larger_batch = " or -batch_size" if normalises_over_batch(architecture) else ""
        raise PlanError(
            f"patch size {list(patch)} leaves a single voxel of the deepest feature map, too little for its "
            f"normalisation. Use a larger -patch_size{larger_batch}."
        )


def enlarged_patch(
    configuration: Mapping[str, Any], architecture: Mapping[str, Any], divisor: Sequence[int]
) -> list[int]:
    """A configuration's patch, enlarged to multiples of `divisor` and to what a network can normalise."""
    patch = [-(-int(n) // d) * d for n, d in zip(configuration["patch_size"], divisor, strict=True)]
    if leaves_a_single_value(architecture, patch, configuration["batch_size"]):
        patch[2] += divisor[2]  # nnU-Net pads images that are smaller than the patch
    return patch


def leaves_a_single_value(architecture: Mapping[str, Any], patch_size: Sequence[int], batch_size: int) -> bool:
    """Whether the deepest norm would have one value of a channel, which has no variance."""
    single_voxel = deepest_voxels(architecture, patch_size) == 1
    return single_voxel and (batch_size == 1 or not normalises_over_batch(architecture))


def normalises_over_batch(architecture: Mapping[str, Any]) -> bool:
    """Whether a plan's network has BatchNorm: ours declare it, and of nnU-Net's the plan says so."""
    if is_own_network(architecture):
        return own_class(architecture["network_class_name"]).normalises_over_batch
    return "BatchNorm" in (architecture["arch_kwargs"].get("norm_op") or "")


def deepest_voxels(architecture: Mapping[str, Any], patch_size: Sequence[int]) -> int:
    """Voxels of the deepest feature map of one patch."""
    strides = total_strides(architecture["arch_kwargs"]["strides"])[-1]
    return math.prod(-(-n // stride) for n, stride in zip(patch_size, strides, strict=True))


def checked_network(configuration: Mapping[str, Any], input_channels: int, num_classes: int) -> Any:
    """The network of a configuration without memory for its weights, if it can be trained as nnU-Net does.

    Raises:
        PlanError: if it cannot be built, or does not take the patch or give the outputs that nnU-Net trains.
    """
    architecture = configuration["architecture"]
    network = build_on_meta(architecture, input_channels, num_classes)
    _check_outputs(network, architecture, input_channels, configuration["patch_size"])
    return network


def _check_outputs(network: Any, architecture: Mapping[str, Any], input_channels: int, patch: Sequence[int]) -> None:
    """Raise a PlanError unless a network that is not of this package gives the outputs that nnU-Net trains.

    Args:
        network: with deep supervision, without memory for its weights; one that could not be built so is not looked at.
        architecture: its entry in a plans file.
        input_channels, patch: of its input.
    """
    import torch

    first = next(network.parameters(), None)
    if is_own_network(architecture) or first is None or not first.is_meta:
        return
    name = architecture["network_class_name"].rpartition(".")[2]
    strides = total_strides(architecture["arch_kwargs"]["strides"])[:-1]
    expected = [[n // s for n, s in zip(patch, stride, strict=True)] for stride in strides]
    try:
        with torch.no_grad():
            outputs = network(torch.empty(2, input_channels, *patch, device="meta"))
    except Exception as error:  # whatever a class of the user's own does with the input
        raise PlanError(f"The network {name} does not take the patch size {list(patch)}: {first_line(error)}") from None
    found = [list(output.shape[2:]) for output in outputs] if isinstance(outputs, (list, tuple)) else None
    if found != expected:
        gives = "a single tensor" if found is None else f"outputs of the sizes {found}"
        raise PlanError(
            f"The network {name} gives {gives} for the patch size {list(patch)}. With deep supervision nnU-Net trains "
            f"a list, finest first, with one output for each of its strides but the last: {expected}. See "
            f"docs/own_networks.md."
        )
    _check_single_output(network, name, torch.empty(2, input_channels, *patch, device="meta"))


def _check_single_output(network: Any, name: str, patch: Any) -> None:
    """Raise a PlanError unless a network gives one tensor where nnU-Net switches deep supervision off to predict."""
    import torch

    try:
        network.decoder.deep_supervision = False
        with torch.no_grad():
            output = network(patch)
        network.decoder.deep_supervision = True
        gives = "" if isinstance(output, torch.Tensor) else f"gives a {type(output).__name__}"
    except Exception as error:  # as above
        gives = f"fails ({first_line(error)})"
    if gives:
        raise PlanError(
            f"The network {name} {gives} where `decoder.deep_supervision` is set to False, as nnU-Net does to predict. "
            f"It has to give a single tensor then. See docs/own_networks.md."
        )


def degree_of_anisotropy(configuration: Mapping[str, Any]) -> int:
    """The degree of anisotropy that fits a 3D configuration of a plans file.

    It is the number of (1, 2, 2) entries among the plan's first two poolings.
    """
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    return sum(list(stride) == [1, 2, 2] for stride in strides[1:3])


def degree_for_spacing(spacing: Sequence[float]) -> int:
    """The degree for voxels of `spacing` (mm, plans axis order), by nnU-Net's rule.

    An axis is pooled once its spacing is within a factor of 2 of the finest, so each doubling costs one pooling.
    """
    ratio = spacing[0] / min(spacing[1:])
    return sum(ratio >= threshold for threshold in (2.0, 4.0))


def with_own_network(plans: dict[str, Any], configuration: str, kind: type[RunSettings]) -> dict[str, Any]:
    """A copy of the plans whose configuration names the network to train.

    Plans of ours already do. In ordinary nnU-Net plans the configuration's network is replaced by PCT-Net, its degree
    of anisotropy taken from the plan's poolings and everything else from the defaults.

    Raises:
        PlanError: for a configuration that is missing or not 3D.
    """
    plans = with_present_names(deepcopy(plans))
    resolved = configuration_3d(plans, configuration)
    entry = plans["configurations"][configuration]
    if is_ours(plans):
        for planned in plans["configurations"].values():
            if "architecture" in planned:
                planned["architecture"] = without_trainer(planned["architecture"])
    else:
        resolved["architecture"] = architecture_entry("pctnet", degree_of_anisotropy(resolved))
        entry["architecture"] = resolved["architecture"]
        if (patch_size := patch_to_augment(entry["architecture"], resolved["patch_size"])) != resolved["patch_size"]:
            entry["patch_size"] = patch_size
        plans[BLOCK] = {"task": kind.TASKS[0], **write_settings(kind())}
    return plans
