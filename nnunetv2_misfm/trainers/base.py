"""What both trainers share: the network in the plans, optimiser and schedule, memory, checkpoint files."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from nnunetv2_misfm.architectures.checkpointing import set_checkpointing
from nnunetv2_misfm.architectures.resolution import total_strides
from nnunetv2_misfm.cpu_threads import training_threads
from nnunetv2_misfm.errors import PlanError, UserError, first_line
from nnunetv2_misfm.files import TRAINING_LOCK, format_bytes, locked
from nnunetv2_misfm.run_changes import what_a_run_must_keep
from nnunetv2_misfm.run_settings import BLOCK, RunSettings, run_settings
from nnunetv2_misfm.trainers.checkpoint_files import (
    LATEST,
    PREVIOUS,
    put_aside,
    read_latest_or_previous,
    remove_half_written,
    reopen,
)
from nnunetv2_misfm.trainers.distributed import check_batch_size, device_of_process, wrap
from nnunetv2_misfm.trainers.memory_fit import fit_into_memory
from nnunetv2_misfm.trainers.own_network import with_own_network
from nnunetv2_misfm.trainers.schedules import StagedSchedule, parameter_groups
from nnunetv2_misfm.transfer.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    checkpoint_info,
    installed_versions,
    network_weights,
    preprocessing_of,
    write_checkpoint,
)
from nnunetv2_misfm.transfer.transfer import part_of

_FIRST_LOSSES = 5
_SMALL_FILES = 10**6  # bytes of plans, log and plot
CUDA = torch.device("cuda")  # nnU-Net's default device


class BaseTrainer(nnUNetTrainer):
    """nnU-Net's trainer for a network the plans name, with settings from the plans' `misfm` block."""

    SETTINGS: ClassVar[type[RunSettings]]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        plans = with_own_network(plans, configuration, self.SETTINGS)
        # Read before anything is created, so that a bad value leaves no half-made results folder behind.
        self.settings = run_settings(plans, self.SETTINGS)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.was_initialized: bool
        if device.type == "cpu":
            torch.set_num_threads(training_threads())  # nnUNetv2_train has taken all cores
        if self.is_ddp:
            self.device = device_of_process(device)
            if self.device.type != "cuda":
                self.grad_scaler = None
        self.num_epochs = self.settings.num_epochs
        self.num_iterations_per_epoch = self.settings.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.num_val_iterations_per_epoch
        self.initial_lr = self.settings.initial_lr
        self.weight_decay = self.settings.weight_decay
        self._steps_done = 0
        self._continues = False
        self.save_every = min(50, max(1, self.num_epochs // 20))

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        # nnU-Net configures the optimiser before it wraps the network, so `is_ddp` alone does not tell.
        network = self.network.module if isinstance(self.network, DDP) else self.network
        return getattr(network, "_orig_mod", network)

    # ---------------------------------------------------------------- randomness

    def initialize(self) -> None:
        """As in nnU-Net, with the initial weights drawn from the run's seed, on any kind and number of machines.

        Overridden whole because nnU-Net has no hook around the wrapper for several processes, which takes the number
        of a process for that of its GPU and needs one.

        Raises:
            PlanError: if the network or batch cannot be trained in that many processes.
        """
        if self.was_initialized:
            raise RuntimeError("initialize() was called twice")
        torch.manual_seed(self.settings.seed)
        if self.is_ddp:
            check_batch_size(self.configuration_manager.batch_size)
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        self.network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        if self._do_i_compile():
            self.print_to_log_file("Using torch.compile...")
            self.network = torch.compile(self.network)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if self.is_ddp:
            self.network = wrap(self.network, self.device, some_unused=self._some_parameters_unused())
        self.loss = self._build_loss()
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True
        names = ("initial_lr", "weight_decay", "num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
        parameters = {name: getattr(self, name) for name in (*names, "enable_deep_supervision")}
        parameters["batch_size"] = self.configuration_manager.batch_size
        self.logger.update_config({"hparas": parameters})

    def _some_parameters_unused(self) -> bool:
        """Whether parameters go without a gradient in some iterations."""
        return False

    def on_epoch_start(self) -> None:
        """As in nnU-Net; each epoch has random streams of its own, so that a resumed run draws what it would have."""
        rank_seed = np.random.SeedSequence([self.settings.seed, self.current_epoch, self.local_rank])
        torch_seed, numpy_seed, python_seed = (int(n) for n in rank_seed.generate_state(3))
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed)  # nnU-Net's loader draws from it when it runs in this process
        random.seed(python_seed)
        super().on_epoch_start()

    # ---------------------------------------------------------------- outputs and loss

    def _network_strides(self) -> list[tuple[int, int, int]]:
        """Stride of each deep-supervision output relative to the input, finest first."""
        strides = self.configuration_manager.pool_op_kernel_sizes
        # One output per stage but the coarsest, in our networks as in nnU-Net's.
        return total_strides(strides)[:-1]

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        return [[1 / s for s in stride] for stride in self._network_strides()]

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        return self._with_deep_supervision(loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss)

    def _with_deep_supervision(self, loss: nn.Module) -> nn.Module:
        if not self.enable_deep_supervision:
            return loss
        # nnU-Net leaves the coarsest output untrained; here all are (1, 1/2, 1/4, 1/8 in the published recipe).
        weights = np.array([0.5**i for i in range(len(self._network_strides()))])
        return DeepSupervisionWrapper(loss, weights / weights.sum())

    # ---------------------------------------------------------------- optimiser and schedule

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, StagedSchedule]:
        """The optimiser of the settings, and the schedule that steers its groups."""
        named = parameter_groups(self.bare_network, **self._group_options())
        common: dict[str, Any] = {"lr": self.initial_lr, "weight_decay": self.weight_decay}
        if self.settings.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(named, momentum=0.99, nesterov=True, **common)
        elif self.settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(named, **common)
        else:
            optimizer = torch.optim.Adam(named, **common)
        return optimizer, StagedSchedule(optimizer, self.settings.schedule, self.initial_lr, self.num_epochs)

    def _group_options(self) -> dict[str, float]:
        """Which learning rates differ from one part of the network to another; see `parameter_groups`."""
        return {}

    def on_train_epoch_start(self) -> None:
        """As in nnU-Net; a frozen encoder keeps its BatchNorm statistics too."""
        super().on_train_epoch_start()
        stage = self.lr_scheduler.stage
        self.print_to_log_file(f"Stage: {stage.name}")
        if stage.encoder_frozen:
            for name, module in self.bare_network.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and part_of(name + ".") in ("stem", "encoder"):
                    module.eval()

    def train_step(self, batch: Any) -> dict:
        """As in nnU-Net; the first losses are printed, because a first epoch can take long."""
        result = self._optimise(batch)
        self._steps_done += 1
        if self._steps_done <= _FIRST_LOSSES:
            self.print_to_log_file(f"Iteration {self._steps_done}: loss {float(result['loss']):.4f}")
        return result

    def _optimise(self, batch: Any) -> dict:
        return super().train_step(batch)

    def run_training(self) -> None:
        """As in nnU-Net; a second run in the same folder is refused.

        Raises:
            LockedError: if another process trains there.
        """
        if self.local_rank != 0:
            super().run_training()
            return
        folder = Path(self.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / TRAINING_LOCK, 0.0, "another process trains in this results folder"):
            super().run_training()

    def on_train_start(self) -> None:
        """As in nnU-Net, after making sure that a checkpoint fits on the disk and a training step into memory.

        Raises:
            UserError: if one of them does not, or if a run is to go on under plans that would make it another one.
        """
        if not self.was_initialized:
            self.initialize()
        if self._continues:
            self._check_same_run()
        self._check_disk()
        self._fit_into_memory()
        self._load_pretrained_weights()
        if self.local_rank == 0:
            self._clear_results_folder()
        super().on_train_start()

    def _check_same_run(self) -> None:
        differing = self._changes_since(self.my_init_kwargs["plans"])
        if differing:
            raise PlanError(
                f"{self.output_folder} was trained with other plans than {self.plans_manager.plans_name} is now:"
                f"{differing}\nPlan as then to continue it, or give the new plans a name of their own "
                f"(-overwrite_plans_name). Without --c a new run starts; the checkpoints of this one are kept."
            )

    def _changes_since(self, plans: Mapping[str, Any]) -> str:
        changes = what_a_run_must_keep(plans, self.plans_manager.plans, self.configuration_name)
        return "".join(f"\n  {line}" for line in changes)

    def _clear_results_folder(self) -> None:
        """Leave no checkpoint that `--c` would take for one of this run."""
        folder = Path(self.output_folder)
        remove_half_written(folder)
        if not self._continues:
            if earlier := put_aside(folder):
                self.print_to_log_file(
                    f"This run starts anew; earlier ones have left {', '.join(earlier)}. To continue one of those "
                    f"instead, stop this run, take 'earlier_N_' off its name, and use --c with the plans it was "
                    f"trained with."
                )
        elif self.current_epoch < self.num_epochs:
            reopen(folder)

    def _load_pretrained_weights(self) -> None:
        """What a trainer that starts from weights of others does before its first epoch."""

    # ---------------------------------------------------------------- memory and disk

    def _check_disk(self) -> None:
        """Before nnU-Net opens the plans.json of an earlier run for writing, which a full disk would leave empty."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        weights = sum(value.numel() * value.element_size() for value in self.bare_network.state_dict().values())
        copies = 2 if self.settings.optimizer == "sgd" else 3  # with the optimiser's one or two moments
        needed, free = copies * weights + _SMALL_FILES, shutil.disk_usage(self.output_folder).free
        if free < needed:
            raise UserError(
                f"{self.output_folder}: its disk has only {format_bytes(free)} of space left, a checkpoint takes about "
                f"{format_bytes(needed)}. Make room and start again; what was finished is kept."
            )

    def _fit_into_memory(self) -> None:
        if not hasattr(self.bare_network, "checkpointing"):
            return
        if self.settings.checkpointing != "auto":
            set_checkpointing(self.bare_network, self.settings.checkpointing == "on")
            return
        shape = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
        fit_into_memory(
            self.bare_network, self._same_network, shape, self.device, self._memory_remedy, self.print_to_log_file
        )

    def _same_network(self) -> nn.Module:
        manager: ConfigurationManager = self.configuration_manager
        return get_network_from_plans(
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            allow_init=False,
            deep_supervision=True,
        )

    def _memory_remedy(self, gigabytes: float) -> str:
        """What to do when a training step does not fit."""
        raise TypeError(f"{type(self).__name__} has to define _memory_remedy")

    # ---------------------------------------------------------------- checkpoint files

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint as plain data, complete or not at all.

        Overridden whole because nnU-Net offers no hook around the file: its own holds numpy numbers, which only an
        unrestricted unpickler reads, and is written in place, so that a crash loses the previous one.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self._epochs_finished(),
            "init_args": self.my_init_kwargs,
            "trainer_name": self.__class__.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            **self._more_to_save(),
        }
        is_latest = Path(filename).name == LATEST
        write_checkpoint(checkpoint, self._describe(), filename, keep_as=PREVIOUS if is_latest else None)

    def _epochs_finished(self) -> int:
        return self.current_epoch + 1  # nnU-Net saves at the end of an epoch, before it counts on

    def _more_to_save(self) -> dict[str, Any]:
        """What a kind of training keeps in its checkpoints besides nnU-Net's keys."""
        return {}

    def _describe(self) -> CheckpointInfo:
        manager: ConfigurationManager = self.configuration_manager
        return CheckpointInfo(
            task=self.SETTINGS.TASK,
            network_class_name=manager.network_arch_class_name,
            arch_kwargs=dict(manager.network_arch_init_kwargs),
            input_channels=self.num_input_channels,
            num_classes=self.label_manager.num_segmentation_heads,
            preprocessing=preprocessing_of(self.plans_manager.plans, manager.configuration),
            training={**self.plans_manager.plans.get(BLOCK, {}), "epochs_done": self._epochs_finished()},
            versions=installed_versions(),
        )

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint of this trainer, without unpickling code.

        Overridden whole because nnU-Net's own method unpickles whatever the file holds.

        Raises:
            CheckpointError: if the file cannot be read or belongs to another network.
        """
        if not self.was_initialized:
            self.initialize()
        name = filename_or_checkpoint if isinstance(filename_or_checkpoint, str) else "the given checkpoint"
        if isinstance(filename_or_checkpoint, (str, os.PathLike)):
            checkpoint = read_latest_or_previous(
                Path(filename_or_checkpoint), self.print_to_log_file, repair=self.local_rank == 0
            )
        else:
            checkpoint = filename_or_checkpoint
        if checkpoint_info(checkpoint, name) is None:
            raise CheckpointError(f"{name} was not written by {self.__class__.__name__}; it cannot be continued by it.")
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        try:
            self.bare_network.load_state_dict(network_weights(checkpoint, name))
        except RuntimeError as error:
            why = self._changes_since(checkpoint["init_args"]["plans"]) or first_line(error)
            raise CheckpointError(f"{name} does not fit the network of this run's plans: {why}") from None
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self._load_more(checkpoint)
        self._continues = True

    def _load_more(self, checkpoint: Mapping[str, Any]) -> None:
        """Take back what `_more_to_save` gave."""

    def on_train_end(self) -> None:
        """As in nnU-Net, which removes the latest checkpoint when the final one is written."""
        super().on_train_end()
        if self.local_rank == 0:
            Path(self.output_folder).joinpath(PREVIOUS).unlink(missing_ok=True)
