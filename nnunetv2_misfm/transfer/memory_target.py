"""Patch and batch size of a configuration for a given amount of GPU memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.architectures.plan_entry import is_own_network
from nnunetv2_misfm.architectures.resolution import total_strides
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.run_settings import BLOCK

_SMALLEST_BATCH = 2
_SMALLEST_PATCH_AXIS = 16


def fit_to_memory(plans: dict[str, Any], configuration: str, dataset_json: Mapping[str, Any], gigabytes: float) -> str:
    """Change a configuration's batch size, patch size and activation checkpointing until a training step fits.

    The batch goes down to 2 first, as in nnU-Net; then checkpointing goes on; then the patch shrinks along the axis
    that covers most of the median image, in steps of the network's total stride.

    Returns:
        One sentence with the choice and its estimated memory.

    Raises:
        PlanError: if not even the smallest patch fits.
    """
    if not 0 < gigabytes < float("inf"):
        raise PlanError(f"-gpu_memory_target {gigabytes} must be a number of gigabytes above 0.")
    entry = plans["configurations"][configuration]
    strides = total_strides(entry["architecture"]["arch_kwargs"]["strides"])[-1]
    entry["patch_size"] = [-(-n // s) * s for n, s in zip(entry["patch_size"], strides, strict=True)]
    manager = PlansManager(plans)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    channels = determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json)
    architecture = entry["architecture"]
    build = partial(
        get_network_from_plans,
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        heads,
        allow_init=False,
        deep_supervision=True,
    )
    setting = plans[BLOCK]["checkpointing"]
    checkpointing = setting == "on"

    def needed() -> float:
        shape = (entry["batch_size"], channels, *entry["patch_size"])
        return estimate_training_memory(build, shape, checkpointing=checkpointing, autocast=True).total / 2**30

    while needed() > gigabytes:
        if entry["batch_size"] > _SMALLEST_BATCH:
            entry["batch_size"] -= 1
        elif not checkpointing and setting == "auto" and is_own_network(architecture):
            checkpointing = True
        else:
            _shrink(entry, strides, gigabytes, needed())
    plans[BLOCK]["checkpointing"] = "on" if checkpointing else setting
    return (
        f"{configuration}: patch size {entry['patch_size']}, batch size {entry['batch_size']}, activation checkpointing"
        f" {'on' if checkpointing else 'off'}: about {needed():.1f} of {gigabytes:g} GB under mixed precision."
    )


def _shrink(entry: dict[str, Any], strides: tuple[int, int, int], gigabytes: float, needed: float) -> None:
    patch, median = entry["patch_size"], entry["median_image_size_in_voxels"]
    axes = [axis for axis in range(3) if patch[axis] - strides[axis] >= min(_SMALLEST_PATCH_AXIS, median[axis])]
    if not axes:
        raise PlanError(
            f"Not even patch size {patch} with batch size {entry['batch_size']} fits into {gigabytes:g} GB (about "
            f"{needed:.1f} GB). Give more with -gpu_memory_target or a smaller network with -features_per_stage."
        )
    axis = max(axes, key=lambda a: patch[a] / median[a])
    patch[axis] -= strides[axis]
