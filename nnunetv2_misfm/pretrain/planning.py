"""Pretraining plans: which network, patch and settings a run has. Works on the dicts of plans files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunetv2_misfm.architectures.resolution import strides_of, total_strides
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import check_sizes, configuration_3d
from nnunetv2_misfm.plans.network_entry import (
    NETWORKS,
    PLAIN_UNET,
    UNET_ARGUMENTS,
    UNET_CLASSES,
    architecture_entry,
    deepest_voxels,
    degree_for_spacing,
    degree_of_anisotropy,
    is_own_network,
    normalises_over_batch,
    own_network_name,
    set_sizes,
)
from nnunetv2_misfm.plans.run_settings import BLOCK, PRETRAIN_INFO, pretext_task_of
from nnunetv2_misfm.pretrain.tasks import PretextSettings

# Patch and batch of the paper.
PUBLISHED_PATCH_SIZE = (64, 128, 128)
PUBLISHED_BATCH_SIZE = 4
# Values of a channel that BatchNorm should have in the deepest map: with a quarter of them pretraining helped
# fine-tuning less (benchmarks/results/low_label_findings.md).
_ENOUGH_VALUES = 64
# What nnU-Net's planner gives a PlainConvUNet.
_UNET_FEATURES, _UNET_MOST_FEATURES, _UNET_SMALLEST_MAP = 32, 320, 4


@dataclass(frozen=True)
class RunRequest:
    """What a pretraining run should be.

    Attributes:
        network: a name of `NETWORKS`, "plan" for the one the plans name, or None for what our plans have already,
            PCT-Net in others.
        arch_kwargs: constructor arguments of the network that the user chose.
        patch_size, batch_size: None keeps those of earlier plans of the same name for the same data, else those of the
            plan that is started from, or takes the published ones for a new pool (the patch no larger than its median
            volume); the batch grows where patches are too small for BatchNorm.
        pretext: the task and all settings of the run.
    """

    network: str | None
    pretext: PretextSettings
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None


def new_pool_entry(
    spacing: Sequence[float], median_shape: Sequence[float], request: RunRequest
) -> tuple[dict[str, Any], tuple[int, int, int], int]:
    """Network entry, patch size and batch size for a pool that has no plans yet.

    The patch size is the requested one as it is. Without a request it is the published one, along each axis no larger
    than the median shape rounded up to a multiple of the total stride at this spacing, and for the network of nnU-Net's
    plans to what that divides.

    Args:
        spacing: mm, plans axis order.
        median_shape: voxels at that spacing, plans axis order.
        request: the run; its patch and batch size win.
    """
    degree = degree_for_spacing(spacing)
    stride = total_strides(strides_of(degree))[-1]
    patch = request.patch_size or _fitting_patch(median_shape, stride)
    given = request.batch_size
    check_sizes(patch, PUBLISHED_BATCH_SIZE if given is None else given)
    if request.network == "plan":
        if request.patch_size is None:  # nnU-Net's network may halve it more often
            patch = tuple(_unet_topology(spacing, patch)[3])
        entry = plain_unet_entry(spacing, patch)
        _check_arguments(request, entry)
    else:
        entry = _own_entry(request.network or "pctnet", degree, request.arch_kwargs)
    return entry, patch, max(PUBLISHED_BATCH_SIZE, enough_samples(entry, patch)) if given is None else given


def enough_samples(architecture: Mapping[str, Any], patch_size: Sequence[int]) -> int:
    """The smallest batch that gives BatchNorm enough values in the deepest feature map; 1 for networks without it."""
    if not normalises_over_batch(architecture):
        return 1
    return -(-_ENOUGH_VALUES // deepest_voxels(architecture, patch_size))


def run_plans(
    base: Mapping[str, Any], configuration: str, plans_name: str, dataset_name: str, request: RunRequest
) -> dict[str, Any]:
    """Plans for pretraining in a configuration of existing plans, with its spacing, normalisation and axis order.

    The patch size is the requested one, else that of `base`; neither is changed, and the network must divide it.

    Raises:
        PlanError: if the configuration is missing, not 3D, or part of a cascade's second stage, or if arguments are
            given for a network that is taken as it is.
    """
    entry = configuration_3d(base, configuration)
    entry.pop("next_stage", None)
    if entry.pop("previous_stage", None) is not None:
        raise PlanError(f"{configuration!r} takes label channels, which pretraining has not. Use -c 3d_fullres.")
    planned = entry["architecture"]
    keep = request.network is None and "task" in base.get(BLOCK, {})
    if request.network == "plan" or (keep and not is_own_network(planned)):
        _check_arguments(request, planned)
    else:
        network = request.network or own_network_name(planned["network_class_name"]) or "pctnet"
        # A network of ours in the plans keeps what its plan chose, so that the weights fit that plan.
        kept = chosen_arguments(planned) if own_network_name(planned["network_class_name"]) == network else {}
        entry["architecture"] = _own_entry(network, degree_of_anisotropy(entry), {**kept, **request.arch_kwargs})
    set_sizes(entry, request.patch_size, request.batch_size)
    if request.batch_size is None and pretext_task_of(base) is None:
        entry["batch_size"] = max(entry["batch_size"], enough_samples(entry["architecture"], entry["patch_size"]))
    plans = deepcopy(dict(base))
    pool = plans.get(BLOCK, {}).get("pool")
    plans.update(plans_name=plans_name, dataset_name=dataset_name, configurations={configuration: entry})
    plans.pop(PRETRAIN_INFO, None)  # of plans for fine-tuning, whose weights are not loaded here
    plans[BLOCK] = request.pretext.block() | ({"pool": pool} if pool is not None else {})
    return plans


def chosen_arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a plan's network that a plan for other data takes over: all but those that the data decide."""
    return {
        name: value
        for name, value in architecture["arch_kwargs"].items()
        if name not in ("strides", "deep_supervision")
    }


def _check_arguments(request: RunRequest, planned: Mapping[str, Any]) -> None:
    """Refuse arguments for a network that stays as the plans have it."""
    given = [f"-{name}" for name, value in request.arch_kwargs.items() if value is not None]
    if given:
        name, options = planned["network_class_name"].rpartition(".")[2], " and ".join(given)
        raise PlanError(
            f"{options}: the plans' own {name} is kept as it is. Leave {options} out, or choose -network "
            f"{' or '.join(NETWORKS)}."
        )


def _own_entry(network: str, degree: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a network of this package; refuses all stems where there is one, or where slices are thick."""
    stems = arguments.get("stems") or ()
    if stems and network != "pctnet":
        raise PlanError(f"-stems all is for PCT-Net, not for -network {network}.")
    if len(stems) > 1 and degree > 0:  # slices can be merged, not split
        raise PlanError(
            f"-stems all makes anisotropic crops by merging slices, so it needs isotropic ones; these have a degree of "
            f"anisotropy {degree}. Leave -stems all out, or prepare volumes (-i) with an isotropic -spacing "
            f"such as 1.5 1.5 1.5."
        )
    taken = {name: value for name, value in arguments.items() if name != "stems" or network == "pctnet"}
    return architecture_entry(network, degree, **taken)


def plain_unet_stages(
    features: Sequence[int], strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """What a PlainConvUNet is told of its stages, of two convolutions each; all kernels are 3x3x3 if none are given."""
    stages = len(features)
    return {
        "n_stages": stages,
        "features_per_stage": list(features),
        "kernel_sizes": [list(map(int, kernel)) for kernel in kernels or [(3, 3, 3)] * stages],
        "strides": [list(map(int, stride)) for stride in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }


def _unet_topology(spacing: Sequence[float], patch_size: Sequence[int]) -> tuple[Any, ...]:
    """Poolings, strides, kernels, the patch that they divide, and its divisor, as nnU-Net's planner chooses them."""
    topology: tuple[Any, ...] = get_pool_and_conv_props(spacing, patch_size, _UNET_SMALLEST_MAP, 999999)
    return topology


def plain_unet_entry(spacing: Sequence[float], patch_size: Sequence[int]) -> dict[str, Any]:
    """The PlainConvUNet that nnU-Net's planner would choose for this spacing and patch size."""
    _, strides, kernels, _, _ = _unet_topology(spacing, patch_size)
    features = [min(_UNET_MOST_FEATURES, _UNET_FEATURES * 2**i) for i in range(len(strides))]
    return {
        "network_class_name": PLAIN_UNET,
        "arch_kwargs": plain_unet_stages(features, strides, kernels)
        | {
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            **deepcopy(UNET_ARGUMENTS),
        },
        "_kw_requires_import": list(UNET_CLASSES),
    }


def _fitting_patch(median_shape: Sequence[float], stride: Sequence[int]) -> tuple[int, int, int]:
    # No axis larger than half of the volumes has, rounded up to what the network divides.
    sizes = [
        min(published, int(np.ceil(length / s)) * s)
        for published, length, s in zip(PUBLISHED_PATCH_SIZE, median_shape, stride, strict=True)
    ]
    return (sizes[0], sizes[1], sizes[2])
