"""The results folder of a run: who may train in it, its checkpoints, and how a run goes on from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.training.logging.nnunet_logger import MetaLogger, WandbLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from nnunetv2_misfm.checkpoints.checkpoint import (
    WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    checkpoint_info,
    installed_versions,
    network_weights,
    preprocessing_of,
    write_checkpoint,
)
from nnunetv2_misfm.errors import PlanError, UserError, first_line
from nnunetv2_misfm.files import training_lock, write_json, written_whole
from nnunetv2_misfm.plans.compare import what_a_run_must_keep
from nnunetv2_misfm.plans.files import LATEST, has_checkpoints
from nnunetv2_misfm.plans.run_settings import BLOCK, RunSettings
from nnunetv2_misfm.trainers.checkpoint_files import (
    PREVIOUS,
    kept,
    left_by_earlier_runs,
    put_aside,
    read_latest_or_previous,
    remove_half_written,
    reopen,
)
from nnunetv2_misfm.trainers.tensorboard_logger import TensorBoardLogger
from nnunetv2_misfm.units import format_bytes

_SMALL_FILES = 10**6  # bytes of plans, log and plot


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's trainer with checkpoints of plain data, in a results folder that one run at a time trains in.

    Attributes:
        settings: of the run.
    """

    SETTINGS: ClassVar[type[RunSettings]]
    settings: RunSettings
    network: Any  # within DDP and what torch.compile returns
    _was_loaded = False
    _to_put_aside = False
    _optimizer_problem = ""

    @property
    def _continues(self) -> bool:
        """Whether this run goes on from a checkpoint, also one that a derived trainer's `load_checkpoint` has read."""
        return self._was_loaded or self.current_epoch > 0

    @property
    def logger(self) -> MetaLogger:
        """nnU-Net's, which its base class makes."""
        return self._logger

    @logger.setter
    def logger(self, logger: MetaLogger) -> None:
        # A run that goes on may be longer than it was; W&B refuses other settings than before unless told to take them.
        for one in logger.loggers:
            if isinstance(one, WandbLogger):
                one.update_config = partial(one.run.config.update, allow_val_change=True)
        if self.local_rank == 0 and TensorBoardLogger.is_wanted():
            logger.loggers.append(TensorBoardLogger(self.output_folder))
        self._logger = logger

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        # nnU-Net configures the optimiser before it wraps the network, so `is_ddp` alone does not tell.
        network = self.network.module if isinstance(self.network, DDP) else self.network
        return getattr(network, "_orig_mod", network)

    # ---------------------------------------------------------------- results folder

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
        with training_lock(folder):
            super().run_training()

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

    def _check_same_run(self) -> None:
        """Raise an error if a run that is to go on would become another one."""
        differing = self._changes_since(self.my_init_kwargs["plans"])
        if differing:
            raise PlanError(
                f"{self.output_folder} was trained with other plans than {self.plans_manager.plans_name} is now:"
                f"{differing}\nPlan as then to continue it, or give the new plans a name of their own "
                f"(-overwrite_plans_name). Without --c a new run starts; the checkpoints of this one are kept."
            )
        if self._optimizer_problem:
            raise CheckpointError(self._optimizer_problem)

    def _changes_since(self, plans: Mapping[str, Any]) -> str:
        changes = what_a_run_must_keep(
            plans, self.plans_manager.plans, self.configuration_name, **self._default_settings()
        )
        return "".join(f"\n  {line}" for line in changes)

    def _default_settings(self) -> dict[str, Any]:
        """The defaults that `what_a_run_must_keep` should know, where they are not those declared."""
        return {}

    def _open_results_folder(self) -> None:
        """Remove what killed runs have left half-written; a run that goes on is not finished any more."""
        folder = Path(self.output_folder)
        remove_half_written(folder)
        if self._continues:
            if self.current_epoch < self.num_epochs and not self.disable_checkpointing:
                reopen(folder)
            return
        self._to_put_aside = True
        if earlier := left_by_earlier_runs(folder):
            self.print_to_log_file(
                f"This run starts anew; earlier ones have left {', '.join(earlier)}. What is not in a folder "
                f"'earlier_N' yet is moved into one when this run has done something worth saving. To continue one of "
                f"those instead, stop this run, move the files of its folder back, and use --c with the plans it was "
                f"trained with."
            )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As in nnU-Net, after the first epoch in the place of an earlier run."""
        self._put_earlier_run_aside()
        super().on_train_epoch_end(train_outputs)

    @contextmanager
    def _plans_of_an_earlier_run_stay(self) -> Iterator[None]:
        """nnU-Net writes plans.json when a training starts, by which the checkpoints that are there would be used."""
        before = {path: path.read_bytes() for path in self._files_of_plans() if path.is_file() and self._to_put_aside}
        there = has_checkpoints(Path(self.output_folder))
        yield
        for path, content in before.items() if there else ():
            with written_whole(path) as temporary:
                temporary.write_bytes(content)

    def _files_of_plans(self) -> list[Path]:
        return [Path(self.output_folder_base, name) for name in ("plans.json", "dataset.json")]

    def _put_earlier_run_aside(self) -> None:
        """Not before there is something to save: a run that cannot start leaves the one before where it is."""
        if not self._to_put_aside or self.disable_checkpointing:
            return
        aside = put_aside(Path(self.output_folder), Path(self.log_file))
        for path, content in zip(self._files_of_plans(), (self.plans_manager.plans, self.dataset_json), strict=True):
            if aside is not None:
                shutil.copyfile(path, aside / path.name)
            write_json(content, path)
        self._to_put_aside = False

    def _has_saved(self) -> bool:
        """Whether there is a checkpoint of this run."""
        return not self._to_put_aside and has_checkpoints(Path(self.output_folder))

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
            WEIGHTS: self.bare_network.state_dict(),
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
        self._put_earlier_run_aside()
        is_latest = Path(filename).name == LATEST
        write_checkpoint(checkpoint, self._describe(), filename, keep_as=PREVIOUS if is_latest else None)

    def _epochs_finished(self) -> int:
        return self.current_epoch + 1  # nnU-Net saves at the end of an epoch, before it counts on

    def _more_to_save(self) -> dict[str, Any]:
        """What a kind of training keeps in its checkpoints besides nnU-Net's keys."""
        return {}

    def _task_name(self) -> str:
        """What the network learns, for the checkpoint."""
        return self.SETTINGS.TASKS[0]

    def _more_to_say(self) -> dict[str, Any]:
        """What a kind of training tells of itself in its checkpoints besides settings and epochs."""
        return {}

    def _describe(self) -> CheckpointInfo:
        manager: ConfigurationManager = self.configuration_manager
        built = type(self.bare_network)
        as_planned = manager.network_arch_class_name.rpartition(".")[2] == built.__name__
        return CheckpointInfo(
            task=self._task_name(),
            # A derived trainer may build a network of its own, whose arguments the plans do not tell.
            network_class_name=manager.network_arch_class_name
            if as_planned
            else f"{built.__module__}.{built.__name__}",
            arch_kwargs=dict(manager.network_arch_init_kwargs) if as_planned else {},
            input_channels=self.num_input_channels,
            num_classes=self.label_manager.num_segmentation_heads,
            preprocessing=preprocessing_of(self.plans_manager.plans, manager.configuration),
            training={
                **self.plans_manager.plans.get(BLOCK, {}),
                "epochs_done": self._epochs_finished(),
                **self._more_to_say(),
            },
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
        if isinstance(filename_or_checkpoint, (str, os.PathLike)):
            name = os.fspath(filename_or_checkpoint)
            checkpoint = read_latest_or_previous(Path(name), self.print_to_log_file, rank=self.local_rank)
        else:
            name, checkpoint = "the given checkpoint", filename_or_checkpoint
        if checkpoint_info(checkpoint, name) is None:
            raise CheckpointError(f"{name} was not written by {self.__class__.__name__}; it cannot be continued by it.")
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        # nnU-Net notes the best score of an epoch after it has saved the latest checkpoint.
        self._best_ema = max(self.logger.get_value("ema_fg_dice", step=None), default=checkpoint["_best_ema"])
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        try:
            self.bare_network.load_state_dict(network_weights(checkpoint, name))
        except RuntimeError as error:
            why = self._changes_since(checkpoint["init_args"]["plans"]) or first_line(error)
            raise CheckpointError(f"{name} does not fit the network of this run's plans: {why}") from None
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        except ValueError as error:  # of other groups of parameters; only a training that goes on needs it
            self._optimizer_problem = f"{name} does not fit the optimiser of this run's plans: {first_line(error)}"
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self._load_more(checkpoint)
        self._was_loaded = True

    def _load_more(self, checkpoint: Mapping[str, Any]) -> None:
        """Take back what `_more_to_save` gave."""

    def on_train_end(self) -> None:
        """As in nnU-Net, which removes the latest checkpoint for the final one, here only if there is a final one."""
        folder = Path(self.output_folder)
        if self.local_rank == 0 and self.disable_checkpointing:
            with kept(folder / LATEST):  # a run that saves nothing leaves what another has begun
                super().on_train_end()
            return
        super().on_train_end()
        if self.local_rank == 0:
            (folder / PREVIOUS).unlink(missing_ok=True)
