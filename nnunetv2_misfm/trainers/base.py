"""What both trainers share: the network in the plans, its outputs and loss, optimiser and schedule, memory."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunetv2_misfm.architectures.checkpointing import set_checkpointing
from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.architectures.resolution import output_weights
from nnunetv2_misfm.checkpoints.names import names_of
from nnunetv2_misfm.cpu_threads import training_threads
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.network_entry import ENCODER, STEM, with_own_network
from nnunetv2_misfm.plans.run_settings import RunSettings, run_settings
from nnunetv2_misfm.trainers.device_memory import available_memory
from nnunetv2_misfm.trainers.distributed import any_process, check_batch_size, device_of_process, wrap
from nnunetv2_misfm.trainers.metrics_file import METRICS, append_row, as_columns
from nnunetv2_misfm.trainers.resumable import ResumableTrainer
from nnunetv2_misfm.trainers.run_page import update_run_page
from nnunetv2_misfm.trainers.schedules import Stage, StagedSchedule, parameter_groups
from nnunetv2_misfm.trainers.step_guard import StepGuard, TrainingDivergedError

_FIRST_LOSSES = 5
_SECONDS_BETWEEN_DRAWINGS = 60.0
_NARROW = 16  # features of the first stage: as many as a vector of AVX-512 has numbers
# What nnU-Net tells its loggers about a run.
_LOGGED_PARAMETERS = (
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "num_epochs",
    "enable_deep_supervision",
)
CUDA = torch.device("cuda")  # nnU-Net's default device


class BaseTrainer(ResumableTrainer):
    """nnU-Net's trainer for a network the plans name, with settings from the plans' `misfm` block."""

    PLANNED_BY: ClassVar[str] = "misfm_plan"  # the command whose options are the settings

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
        self.settings = self._read_settings(plans)
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
        self.num_processes = dist.get_world_size() if self.is_ddp else 1  # for debug.json
        self._steps_done = 0
        self._iteration = 0  # of the epoch, counted from 1
        self._stage: Stage | None = None
        self._drawn = -math.inf
        self.save_every = min(50, max(1, self.num_epochs // 20))

    def _read_settings(self, plans: Mapping[str, Any]) -> RunSettings:
        return run_settings(plans, self.SETTINGS)

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
            check_batch_size(self.configuration_manager.batch_size, dist.get_world_size())
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        self.network = self._new_network().to(self.device)
        if self.device.type == "cpu":
            _channels_last_if_narrow(self.network)
        if self._do_i_compile():
            self.print_to_log_file("Using torch.compile...")
            self.network = torch.compile(self.network)
        self._make_head()
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if self.is_ddp:
            self._wrap_for_processes()
        self._guard = StepGuard(self._model, self._after_divergence)
        self.loss = self._build_loss()
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True
        parameters = {name: getattr(self, name) for name in _LOGGED_PARAMETERS}
        parameters["batch_size"] = self.configuration_manager.batch_size
        self.logger.update_config({"hparas": parameters})

    def _new_network(self, more_channels: int = 0, more_classes: int = 0) -> nn.Module:
        """A network as `build_network_architecture` makes it; its older signature is taken too, as in nnU-Net."""
        manager: ConfigurationManager = self.configuration_manager
        described: tuple[Any, ...] = (self.plans_manager, manager)
        if "plans_manager" not in inspect.signature(self.build_network_architecture).parameters:
            described = (
                manager.network_arch_class_name,
                manager.network_arch_init_kwargs,
                manager.network_arch_init_kwargs_req_import,
            )
        channels = self.num_input_channels + more_channels
        classes = self.label_manager.num_segmentation_heads + more_classes
        network: nn.Module = self.build_network_architecture(
            *described, channels, classes, self.enable_deep_supervision
        )
        return network

    def _make_head(self) -> None:
        """Make what is trained, the network and what is beside it; the optimiser comes next."""
        self._model: nn.Module = self.network

    def _wrap_for_processes(self) -> None:
        """Wrap what is trained for several processes."""
        self._model = self.network = wrap(self.network, self.device, some_unused=False)

    def on_epoch_start(self) -> None:
        """As in nnU-Net; each epoch has random streams of its own, so that a resumed run draws what it would have."""
        rank_seed = np.random.SeedSequence([self.settings.seed, self.current_epoch, self.local_rank])
        torch_seed, numpy_seed, python_seed = (int(n) for n in rank_seed.generate_state(3))
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed)  # nnU-Net's loader draws from it when it runs in this process
        random.seed(python_seed)
        super().on_epoch_start()

    def on_epoch_end(self) -> None:
        """As in nnU-Net, after a row of metrics.csv.

        progress.png, which takes seconds to draw, and the run's page are written once a minute at most and at the end.
        """
        if self.local_rank == 0:
            seconds = time.time() - self.logger.get_value("epoch_start_timestamps", step=-1)
            row = {
                **self._metrics(),
                "skipped_steps": self._guard.skipped,
                "train_loss": self.logger.get_value("train_losses", step=-1),
                "val_loss": self.logger.get_value("val_losses", step=-1),
                "lr": self.optimizer.param_groups[0]["lr"],
                "stage": self.lr_scheduler.stage.name if isinstance(self.lr_scheduler, StagedSchedule) else None,
                "seconds": seconds,
                "ended": f"{datetime.now():%Y-%m-%dT%H:%M:%S}",
            }
            append_row(Path(self.output_folder) / METRICS, self.current_epoch, row)
            for logger in self.logger.loggers:
                for name, value in as_columns(row).items():
                    if isinstance(value, Real):
                        logger.log(name, value, self.current_epoch)
        is_last = self.current_epoch + 1 == self.num_epochs
        is_due = is_last or time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS
        with nullcontext() if is_due else patch.object(self.logger, "plot_progress_png"):
            super().on_epoch_end()
        if self.local_rank == 0 and is_due:
            update_run_page(Path(self.output_folder), self.print_to_log_file)
            self._drawn = time.monotonic()

    def _metrics(self) -> dict[str, Any]:
        """The scores of an epoch, by their columns of metrics.csv."""
        names = ("dice_per_class_or_region", "mean_fg_dice", "ema_fg_dice")
        return {name: self.logger.get_value(name, step=-1) for name in names}

    # ---------------------------------------------------------------- outputs and loss

    def _build_loss(self) -> nn.Module:
        with np.errstate(invalid="ignore"):  # nnU-Net's weights of a single output, which are not used here
            loss = super()._build_loss()
        if not self.enable_deep_supervision:
            return loss
        bare = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        return DeepSupervisionWrapper(bare, output_weights(len(self._get_deep_supervision_scales())))

    # ---------------------------------------------------------------- optimiser and schedule

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """The optimiser of the settings, and the schedule that steers its groups."""
        named = self._parameter_groups()
        common: dict[str, Any] = {"lr": self.initial_lr, "weight_decay": self.weight_decay}
        if self.settings.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(named, momentum=0.99, nesterov=True, **common)
        elif self.settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(named, **common)
        else:
            optimizer = torch.optim.Adam(named, **common)
        return optimizer, StagedSchedule(optimizer, self.settings.schedule, self.initial_lr, self.num_epochs)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, see `parameter_groups`."""
        return parameter_groups(self.bare_network)

    def on_train_epoch_start(self) -> None:
        """As in nnU-Net; a stage may begin."""
        super().on_train_epoch_start()
        self._iteration, self._stage = 0, None
        self._set_rates(1)  # here too: a derived trainer may have a train_step of its own

    def train_step(self, batch: Any) -> dict:
        """As in nnU-Net, at the iteration's learning rates; prints the first losses, because an epoch can take long."""
        self._iteration += 1
        self._set_rates(self._iteration)
        result = self._optimise(batch)
        self._steps_done += 1
        if self._steps_done <= _FIRST_LOSSES:
            self.print_to_log_file(f"Iteration {self._steps_done}: loss {float(result['loss']):.4f}")
        return result

    def _set_rates(self, iteration: int) -> None:
        """Set the learning rates of an iteration, and begin a stage where one begins.

        An encoder that is frozen in it keeps its BatchNorm statistics too.
        """
        if not isinstance(self.lr_scheduler, StagedSchedule):
            return  # a trainer derived from this one has a schedule of its own
        self.lr_scheduler.step(self.current_epoch, iteration / self.num_iterations_per_epoch)
        before, stage = self._stage, self.lr_scheduler.stage
        self._stage = stage
        if before is not None and before.name == stage.name:
            return
        self.print_to_log_file(f"Stage: {stage.name}")
        was_frozen = before is not None and before.encoder_frozen
        if stage.encoder_frozen != was_frozen:
            names = names_of(self.bare_network)
            for name, module in self.bare_network.named_modules():
                is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                if is_norm and names.part_in_network(name) in (STEM, ENCODER):
                    module.train(not stage.encoder_frozen)

    def _optimise(self, batch: Any) -> dict:
        """nnU-Net's step; what a forward pass that overflowed has left in BatchNorm's statistics is taken back.

        Raises:
            TrainingDivergedError: if the weights are lost too, or after many such steps in a row.
        """
        self._guard.before_step()
        result: dict = super().train_step(batch)
        if not self._guard.accept(torch.as_tensor(result["loss"])) and self.grad_scaler is None:
            raise TrainingDivergedError(f"The loss is not finite. {self._after_divergence()}")
        return result

    def _after_divergence(self) -> str:
        """What to do when steps are not finite any more."""
        lower = f"with a lower -initial_lr of {self.PLANNED_BY}"
        if self._has_saved():
            return f"The last checkpoint is good: continue from it with --c, {lower}."
        return f"Nothing is saved yet: start again {lower}."

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As in nnU-Net, without the losses of steps that did not count."""
        if self._guard.skipped:
            self.print_to_log_file(f"{self._guard.skipped} steps skipped so far, they were not finite")
        counted = [output for output in train_outputs if np.isfinite(output["loss"])]
        super().on_train_epoch_end(counted or train_outputs)

    def _more_to_save(self) -> dict[str, Any]:
        return super()._more_to_save() | {"skipped_steps": self._guard.skipped}

    def _load_more(self, checkpoint: Mapping[str, Any]) -> None:
        super()._load_more(checkpoint)
        self._guard.skipped = checkpoint.get("skipped_steps", 0)

    def on_train_start(self) -> None:
        """As in nnU-Net, after making sure that a checkpoint fits on the disk and a training step into memory.

        Raises:
            UserError: if one of them does not, or if a run is to go on under plans that would make it another one.
        """
        if not self.was_initialized:
            self.initialize()
        if self._continues:
            self._check_same_run()
        self._check_data()
        self._check_disk()
        self._fit_into_memory()
        self._load_pretrained_weights()
        if self.local_rank == 0:
            self._open_results_folder()
        with self._plans_of_an_earlier_run_stay():
            super().on_train_start()

    def _check_data(self) -> None:
        """Raise a UserError if the preprocessed data are not those that the plans are for."""

    def _load_pretrained_weights(self) -> None:
        """What a trainer that starts from weights of others does before its first epoch."""

    # ---------------------------------------------------------------- memory

    def _fit_into_memory(self) -> None:
        """Switch activation checkpointing on if a training step needs more memory than there is.

        Raises:
            PlanError: if a step does not fit even so.
        """
        if not hasattr(self.bare_network, "checkpointing"):
            if self.settings.checkpointing == "on":
                kind = type(self.bare_network).__name__
                self.print_to_log_file(f"checkpointing is on in the plans, but a {kind} has none; it trains without.")
            return
        if self.settings.checkpointing != "auto":
            set_checkpointing(self.bare_network, self.settings.checkpointing == "on")
            return
        available = available_memory(self.device)
        # All processes alike: one that recomputes synchronises its BatchNorms more often, and the others would wait.
        plain = self._bytes_of_a_step(checkpointing=False)
        if not any_process(plain > available, self.device):
            return
        checkpointed = self._bytes_of_a_step(checkpointing=True)
        has = f"{self.device} has {available / 2**30:.1f} GB."
        if any_process(checkpointed > available, self.device):
            manager, inputs = self.configuration_manager, self._inputs_of_a_step()
            here = "" if inputs == manager.batch_size else f" ({inputs} inputs of the network in this process)"
            raise PlanError(
                f"A training step with patch size {list(manager.patch_size)} and batch size {manager.batch_size} "
                f"needs about {checkpointed / 2**30:.1f} GB even with activation checkpointing{here}; {has} "
                f"{self._memory_remedy(available / 2**30)}"
            )
        set_checkpointing(self.bare_network, True)
        self.print_to_log_file(
            f"Activation checkpointing is on: a step needs about {plain / 2**30:.1f} GB without it and "
            f"{checkpointed / 2**30:.1f} GB with it; {has}"
        )

    def _bytes_of_a_step(self, checkpointing: bool) -> int:
        shape = (self._inputs_of_a_step(), self.num_input_channels, *self.configuration_manager.patch_size)
        autocast = self.device.type == "cuda"
        return estimate_training_memory(
            self._trained_module, shape, checkpointing=checkpointing, autocast=autocast
        ).total

    def _trained_module(self) -> nn.Module:
        """What a step runs, made anew."""
        return self._new_network()

    def _inputs_of_a_step(self) -> int:
        """How many patches the network gets in a step of this process."""
        return int(self.batch_size)

    def _memory_remedy(self, gigabytes: float) -> str:
        """What to do when a training step does not fit."""
        raise TypeError(f"{type(self).__name__} has to define _memory_remedy")


def _channels_last_if_narrow(network: nn.Module) -> None:
    """Lay out the weights of a small 3D network so that it trains faster on a CPU.

    PyTorch fills up channels to a vector's length there unless they are the last axis: a step of a U-Net with 8, 16, 32
    and 64 features takes 1.4 times as long in its default layout. Networks that begin with more are faster with that.
    """
    convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    if convolutions and convolutions[0].out_channels < _NARROW:
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last_3d)
