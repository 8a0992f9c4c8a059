"""MisFMTrainer: nnU-Net training of any network that plans name, from scratch or from pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnunetv2_misfm.checkpoints.names import names_of
from nnunetv2_misfm.checkpoints.source import load_source
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import json_or_nothing, write_json
from nnunetv2_misfm.plans.checks import channel_names, check_is_finetuning, check_labels, without_memory
from nnunetv2_misfm.plans.compare import is_complete, weights_then_and_now, what_a_model_must_keep
from nnunetv2_misfm.plans.files import check_dataset_of_plans, plans_with_weights, weights_of
from nnunetv2_misfm.plans.run_settings import (
    DEFAULT_FINETUNING_PLANS,
    PRETRAIN_INFO,
    FinetuningSettings,
    pretrain_info,
)
from nnunetv2_misfm.trainers.base import CUDA, BaseTrainer
from nnunetv2_misfm.trainers.run_page import TRANSFER_REPORT, update_run_page
from nnunetv2_misfm.trainers.schedules import parameter_groups
from nnunetv2_misfm.transfer.arrays import check_data_unchanged
from nnunetv2_misfm.transfer.transfer import TransferError, transfer


class MisFMTrainer(BaseTrainer):
    """Trains the network a plan names; with an ordinary nnU-Net plan, a PCT-Net derived from it.

    If the plan has a `pretrain_info` block with a checkpoint, its weights are transferred when training starts, not
    when it resumes or validates. The table of what was transferred goes to the log and to transfer_report.json.
    """

    SETTINGS = FinetuningSettings
    settings: FinetuningSettings

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        check_dataset_of_plans(plans, dataset_json)
        check_is_finetuning(plans, configuration)
        check_labels(dataset_json, Path(plans["dataset_name"], "dataset.json"))
        super().__init__(plans, configuration, fold, dataset_json, device)

    def _check_data(self) -> None:
        folder = Path(self.preprocessed_dataset_folder)
        try:
            check_data_unchanged(folder, self.plans_manager.plans, self.configuration_name)
        except PlanError as error:
            if not self._continues:
                raise
            self.print_to_log_file(f"This run goes on with the data it began with. {error}")
        if not self._continues:
            self._check_other_folds()

    def _check_other_folds(self) -> None:
        """Raise a PlanError if this fold's plans would replace others, by which the folds beside it predict."""
        folder = Path(self.output_folder_base)
        trained = {path.parent.name for path in folder.glob("fold_*/checkpoint_*.pth")} - {f"fold_{self.fold}"}
        before = json_or_nothing(folder / "plans.json")
        if not trained or not is_complete(before, self.configuration_name):
            return
        there = f"{', '.join(sorted(trained))} in {folder}"
        if differing := what_a_model_must_keep(before, self.plans_manager.plans, self.configuration_name):
            lines = "\n  ".join(differing)
            raise PlanError(
                f"{there} were trained with other plans than {self.plans_manager.plans_name} is now, and would predict "
                f"by these:\n  {lines}\nGive the new plans a name of their own (-overwrite_plans_name), or remove "
                f"those folds."
            )
        if weights_then_and_now(before, self.plans_manager.plans):
            self.print_to_log_file(
                f"{there} started from {weights_of(before) or 'random weights'}; this fold does not."
            )

    def initialize(self) -> None:
        """As in the base class; remembers the initial weights, to notice weights that were loaded from outside."""
        super().initialize()
        self._initial_weights = self._weights_checksum()

    def _weights_checksum(self) -> float:
        return sum(float(p.detach().double().abs().sum()) for p in self.bare_network.parameters())

    def _parameter_groups(self) -> list[dict[str, Any]]:
        settings = self.settings
        # Networks are built anew to find segmentation layers that are not declared; nothing else needs that here.
        names = names_of(self.bare_network, self._rebuilt_network if settings.seg_layers_lr_factor != 1 else None)
        groups = parameter_groups(self.bare_network, settings.layer_decay, settings.seg_layers_lr_factor, names)
        there = {group["name"] for group in groups}
        if "encoder" not in there and (settings.layer_decay < 1 or settings.schedule in ("sawtooth", "decoder_only")):
            self.print_to_log_file(
                f"This network does not name its encoder (key_to_encoder), so schedule {settings.schedule} and "
                f"layer_decay {settings.layer_decay} treat all of it alike."
            )
        if "seg_layers" not in there and settings.seg_layers_lr_factor != 1:
            self.print_to_log_file("No segmentation layers were found: seg_layers_lr_factor has no effect.")
        return groups

    def _memory_remedy(self, gigabytes: float) -> str:
        target = f"-gpu_memory_target {max(1, int(gigabytes))}"
        if PRETRAIN_INFO in self.plans_manager.plans:
            return (
                f"Repeat the misfm_plan that made {self.plans_manager.plans_name} with {target} in place of "
                f"-patch_size and -batch_size, and start again."
            )
        return (
            f"Plan for this memory with: misfm_plan -d {self.plans_manager.dataset_name} -c {self.configuration_name} "
            f"-p {self.plans_manager.plans_name} {target}, then train with -p {DEFAULT_FINETUNING_PLANS}."
        )

    def _load_pretrained_weights(self) -> None:
        if self._continues:
            return
        info = pretrain_info(self.plans_manager.plans)
        loaded = self._weights_checksum() != self._initial_weights
        if loaded and info.get("checkpoint_path") is not None:
            raise TransferError(
                f"Weights were given twice: with -pretrained_weights, and in the plans ({info['checkpoint_path']}). "
                f"Leave -pretrained_weights out, or plan with misfm_plan --from_scratch."
            )
        if loaded:
            self.print_to_log_file("Training starts from the weights given with -pretrained_weights.")
            return
        if info.get("checkpoint_path") is None:
            message = f"Training from scratch: the plans {self.plans_manager.plans_name} name no pretrained weights."
            others = plans_with_weights(Path(self.preprocessed_dataset_folder_base))
            if others and PRETRAIN_INFO not in self.plans_manager.plans:  # a -p that was forgotten, not a baseline
                message += f" {', '.join(others)} of this dataset name some: to start from them, stop this and give -p."
            self.print_to_log_file(message)
            return
        weights, report = transfer(
            load_source(info),
            self.bare_network,
            self.settings,
            channel_names(self.dataset_json),
            self._rebuilt_network,
        )
        self.bare_network.load_state_dict(weights)
        self.print_to_log_file(report.table(), add_timestamp=False)
        if self.local_rank == 0:
            Path(self.output_folder).mkdir(parents=True, exist_ok=True)
            write_json(report.as_json(), Path(self.output_folder, TRANSFER_REPORT))
        if self.is_ddp:
            dist.barrier()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As in nnU-Net; then the run's page has its mean Dice.

        Raises:
            PlanError: if the checkpoint that was loaded is of a network, or for images, that the plans no longer name.
        """
        differing = what_a_model_must_keep(
            self.my_init_kwargs["plans"], self.plans_manager.plans, self.configuration_name
        )
        if differing:
            lines = "\n  ".join(differing)
            raise PlanError(
                f"{self.output_folder} was trained with other plans than {self.plans_manager.plans_name} is now:"
                f"\n  {lines}\nPlan as then to validate it, or predict its cases with nnUNetv2_predict, which takes "
                f"the plans of the results folder."
            )
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            update_run_page(Path(self.output_folder), self.print_to_log_file)

    def _rebuilt_network(self, more_channels: int, more_classes: int) -> torch.nn.Module:
        """The same network for other numbers of channels and classes, without memory for its weights."""
        network: torch.nn.Module = without_memory(lambda: self._new_network(more_channels, more_classes))
        return network
