"""Patch and batch size of a configuration for a given amount of GPU memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.architectures.resolution import total_strides
from nnunetv2_misfm.errors import PlanError, first_line
from nnunetv2_misfm.plans.checks import build_network, build_on_meta
from nnunetv2_misfm.plans.files import nnunet_folder
from nnunetv2_misfm.plans.network_entry import (
    enlarged_patch,
    is_own_network,
    leaves_a_single_value,
    patch_to_augment,
)
from nnunetv2_misfm.plans.run_settings import BLOCK

_SMALLEST_BATCH = 2
_SMALLEST_PATCH_AXIS = 16


def fit_to_memory(plans: dict[str, Any], configuration: str, dataset_json: Mapping[str, Any], gigabytes: float) -> str:
    """Choose a configuration's patch size, batch size and activation checkpointing for an amount of memory.

    Networks of this package get the patch that nnU-Net's planner would take at this memory target, and as large a batch
    as fits, see `MisFMPlanner`. Other networks, whose topology depends on the patch, keep that of their plan; it only
    shrinks if it has to.

    Returns:
        One sentence with the choice and its estimated memory.

    Raises:
        PlanError: if the network cannot be built, not even the smallest patch fits, the plans do not know the median
            image, or the fingerprint or raw dataset, which nnU-Net's planners read, is missing.
    """
    if not 0 < gigabytes < float("inf"):
        raise PlanError(f"-gpu_memory_target {gigabytes} must be a number of gigabytes above 0.")
    entry = plans["configurations"][configuration]
    if not isinstance(entry.get("median_image_size_in_voxels"), (list, tuple)):
        raise PlanError(
            f"-gpu_memory_target needs median_image_size_in_voxels, which {configuration} lacks. Plan the dataset with "
            f"nnU-Net again."
        )
    manager = PlansManager(plans)
    heads = manager.get_label_manager(dict(dataset_json)).num_segmentation_heads
    channels = determine_num_input_channels(manager, manager.get_configuration(configuration), dict(dataset_json))
    build_on_meta(entry["architecture"], channels, heads)
    budget = MemoryBudget(gigabytes, entry["architecture"], channels, heads, plans[BLOCK]["checkpointing"])
    if is_own_network(entry["architecture"]):
        needed = {
            nnunet_folder("nnUNet_raw") / plans["dataset_name"] / "dataset.json": "Put the raw dataset back.",
            nnunet_folder("nnUNet_preprocessed") / plans["dataset_name"] / "dataset_fingerprint.json": "Run "
            f"nnUNetv2_extract_fingerprint -d {plans['dataset_name']}.",
        }
        for path, remedy in needed.items():
            if not path.is_file():
                raise PlanError(f"-gpu_memory_target needs {path}, which does not exist. {remedy}")
        planner = MisFMPlanner(plans["dataset_name"], budget)
        sized = planner.sizes_for(entry)
    else:
        sized = deepcopy(entry)
        budget.shrink_to_fit(sized)
    entry.update(patch_size=sized["patch_size"], batch_size=sized["batch_size"])
    plans[BLOCK]["checkpointing"] = budget.checkpointing
    checkpointing = "on" if budget.checkpointing == "on" else "off"
    return (
        f"{configuration}: patch size {entry['patch_size']}, batch size {entry['batch_size']}, activation "
        f"checkpointing {checkpointing}: an estimated {budget.needed(entry):.1f} of {gigabytes:g} GB under mixed "
        f"precision."
    )


class MemoryBudget:
    """How much memory there is, and what a training step of a network needs of it.

    Args:
        gigabytes: how much there is; 1 GB is 2**30 bytes.
        architecture: the network's entry in a configuration of the plans.
        input_channels, num_classes: of the network.
        checkpointing: "auto", "on" or "off"; "auto" becomes "on" when nothing else keeps the patch from shrinking.
    """

    def __init__(
        self,
        gigabytes: float,
        architecture: Mapping[str, Any],
        input_channels: int,
        num_classes: int,
        checkpointing: str,
    ):
        self.gigabytes = gigabytes
        self.checkpointing = checkpointing
        self._architecture = architecture
        self.strides = total_strides(architecture["arch_kwargs"]["strides"])[-1]
        self._channels = input_channels
        self._can_checkpoint = is_own_network(architecture)
        self._build = partial(build_network, architecture, input_channels, num_classes)

    def needed(self, entry: Mapping[str, Any]) -> float:
        """GB of a training step with the patch and batch size of a configuration."""
        shape = (entry["batch_size"], self._channels, *entry["patch_size"])
        on = self.checkpointing == "on" and self._can_checkpoint
        try:
            return estimate_training_memory(self._build, shape, checkpointing=on, autocast=True).total / 2**30
        except RuntimeError as error:
            raise PlanError(
                f"-gpu_memory_target: this network does not take the patch size {entry['patch_size']} "
                f"({first_line(error)}). Leave it out, and choose patch and batch size for the network yourself."
            ) from None

    def shrink_to_fit(self, entry: dict[str, Any]) -> None:
        """Round the patch up to the network's strides, then shrink batch and patch of a configuration until it fits.

        The batch goes down to 2 first, as in nnU-Net; then checkpointing goes on; then the patch shrinks along the axis
        that covers most of the median image.

        Raises:
            PlanError: if not even the smallest patch fits.
        """
        entry["patch_size"] = enlarged_patch(entry, self._architecture, self.strides)
        while (needed := self.needed(entry)) > self.gigabytes:
            if entry["batch_size"] > _SMALLEST_BATCH:
                entry["batch_size"] -= 1
            elif self.checkpointing == "auto" and self._can_checkpoint:
                self.checkpointing = "on"
            else:
                self._shrink_patch(entry, needed)

    def grow_batch(self, entry: dict[str, Any], largest: int) -> None:
        """The largest batch of up to `largest` samples that fits; never less than there is."""
        while entry["batch_size"] < largest:
            entry["batch_size"] += 1
            if self.needed(entry) > self.gigabytes:
                entry["batch_size"] -= 1
                return

    def _shrink_patch(self, entry: dict[str, Any], needed: float) -> None:
        patch, median = entry["patch_size"], entry["median_image_size_in_voxels"]
        axes = [
            a
            for a in range(3)
            if patch[a] - self.strides[a] >= min(_SMALLEST_PATCH_AXIS, median[a])
            and patch_to_augment(self._architecture, self._shrunk(patch, a)) == self._shrunk(patch, a)
            and not leaves_a_single_value(self._architecture, self._shrunk(patch, a), entry["batch_size"])
        ]
        if not axes:
            raise PlanError(
                f"Not even patch size {patch} with batch size {entry['batch_size']} fits into {self.gigabytes:g} GB "
                f"(about {needed:.1f} GB). Give more with -gpu_memory_target or a smaller network with "
                f"-features_per_stage."
            )
        axis = max(axes, key=lambda a: patch[a] / median[a])
        entry["patch_size"] = self._shrunk(patch, axis)

    def _shrunk(self, patch: Sequence[int], axis: int) -> list[int]:
        return [n - self.strides[a] if a == axis else n for a, n in enumerate(patch)]


class MisFMPlanner(ExperimentPlanner):
    """nnU-Net's planner with the memory of the network that is trained instead of a plain U-Net's.

    nnU-Net's patch for the memory target is the largest that is considered; the batch then takes what memory is left,
    up to 5 % of the dataset's voxels as in nnU-Net.

    Args:
        dataset_name_or_id: of a dataset with a fingerprint.
        budget: memory and network.
    """

    def __init__(self, dataset_name_or_id: str | int, budget: MemoryBudget):
        super().__init__(dataset_name_or_id, budget.gigabytes)
        self.budget = budget

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """As in nnU-Net, but without changing the number of threads, which fails where nnUNet_n_proc_DA is 0."""
        with torch.device("meta"):
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        return int(network.compute_conv_feature_map_size(patch_size))

    def sizes_for(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """A 3D configuration as nnU-Net plans it for its spacing; patch and batch fit the budget's network."""
        median = configuration["median_image_size_in_voxels"]
        voxels = float(np.prod(median, dtype=np.float64)) * self.dataset_json["numTraining"]
        name = configuration["data_identifier"]
        plan: dict[str, Any] = self.get_plans_for_configuration(configuration["spacing"], median, name, voxels, {})
        plan["batch_size"] = _SMALLEST_BATCH
        self.budget.shrink_to_fit(plan)
        self.budget.grow_batch(plan, round(voxels * self.max_dataset_covered / np.prod(plan["patch_size"])))
        return plan
