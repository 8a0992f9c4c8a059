"""PretrainingTrainer: nnU-Net's training loop on the pretext task that the plans name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, autocast, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from nnunetv2_misfm.checkpoints.checkpoint import DESCRIPTION, LEARNT, TRAINED_PARTS
from nnunetv2_misfm.checkpoints.nnssl import ADAPTATION, adaptation_plan
from nnunetv2_misfm.checkpoints.shrunk_weights import shrunk_alarm
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.files import LATEST, check_dataset_of_plans
from nnunetv2_misfm.plans.run_settings import PretrainingSettings, RunSettings, block_of
from nnunetv2_misfm.pretrain.batches import CropBatch, crop_loader
from nnunetv2_misfm.pretrain.crops import CropSamples, validation_samples
from nnunetv2_misfm.pretrain.task import PretextNetwork, Scores
from nnunetv2_misfm.pretrain.tasks import PretextSettings, default_settings
from nnunetv2_misfm.trainers.base import CUDA, BaseTrainer
from nnunetv2_misfm.trainers.distributed import any_process, from_all_processes, wrap
from nnunetv2_misfm.trainers.epoch_clock import EpochClock
from nnunetv2_misfm.trainers.interrupted_epoch import InterruptedEpoch
from nnunetv2_misfm.trainers.pretext_data import (
    TimedIterator,
    forget_frames,
    hold_out,
    killed_workers_are_named,
    pretext_block,
    pretext_dataset_json,
)
from nnunetv2_misfm.trainers.run_page import PICTURES, STOPPED, update_run_page
from nnunetv2_misfm.trainers.step_guard import finite_score
from nnunetv2_misfm.trainers.stop_request import BY_SIGNAL, StopRequest

_MOST_EPOCHS_LOST = 5  # by a crash
_GRADIENT_NORM = 12.0  # nnU-Net's
_HEAD = "pretext_head"  # in a checkpoint: what was trained beside the network


class PretrainingTrainer(BaseTrainer):
    """Pretrains the network a plan names on preprocessed volumes; labels, if there are any, are never read.

    Inputs and targets, (B, C, X, Y, Z) in plans axis order, are made on the training device from crops that workers
    read. Validation uses one fixed set of samples, drawn from volumes held out of training where there are enough.
    """

    SETTINGS = PretrainingSettings
    PLANNED_BY = "misfm_pretrain"
    TASK: ClassVar[str | None] = None  # the one task that a derived trainer is for

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        if str(fold) != "all":
            raise PlanError(f"Pretraining is on all volumes: use fold all instead of {fold}.")
        self.pretext = PretextSettings.read(pretext_block(plans, self.TASK), block_of(plans))
        self.task = self.pretext.task()
        check_dataset_of_plans(plans, dataset_json)
        if configuration_3d(plans, configuration).get("previous_stage") is not None:
            raise PlanError(f"{configuration} takes label channels, which pretraining has not. Use 3d_fullres.")
        super().__init__(plans, configuration, fold, pretext_dataset_json(dataset_json, self.task), device)
        self.enable_deep_supervision = self.task.deep_supervision
        self._scores: Scores | None = None
        self._told: dict[str, Any] = {}  # by the checkpoint that a run goes on from, until it has scores
        stems = tuple(self.configuration_manager.network_arch_init_kwargs.get("stems") or ())
        # A network with several stems trains them in turn, each on crops of its degree of anisotropy.
        self._degrees: tuple[int, ...] = stems if len(stems) > 1 else ()
        self._interrupted: InterruptedEpoch | None = None
        self._losses: list[float] = []
        self._stop = StopRequest()
        self.dataloader_train: Any
        self.dataloader_val: Any
        self.save_every = min(_MOST_EPOCHS_LOST, max(1, self.num_epochs // 40))

    def _read_settings(self, plans: Mapping[str, Any]) -> RunSettings:
        return self.pretext.run

    def _default_settings(self) -> dict[str, Any]:
        return default_settings(self.task.name)

    def _task_name(self) -> str:
        return self.task.name

    def run_training(self) -> None:
        """As in nnU-Net; asked to stop, it saves first and goes on from there with --c.

        Raises:
            UserError: if a process that reads crops was killed.
        """
        with self._stop, killed_workers_are_named():
            try:
                super().run_training()
            except BaseException as error:
                forget_frames(error)  # which hold the loaders
                raise
            finally:
                # Their workers end with them; at the end of the program they would be waited for.
                self.dataloader_train = self.dataloader_val = None

    # ---------------------------------------------------------------- network

    def _make_head(self) -> None:
        self._model = self._with_head(self.network).to(self.device)

    def _with_head(self, network: nn.Module) -> PretextNetwork:
        return PretextNetwork(network, self.task, self.num_input_channels)

    def _wrap_for_processes(self) -> None:
        # nnU-Net's `network` stays bare: a task may go through parts of it only, but all go through the wrapper.
        unused = bool(self._degrees) or not self.enable_deep_supervision  # other stems, layers of coarser outputs
        self._model = wrap(self._model, self.device, some_unused=unused)

    @property
    def bare_model(self) -> PretextNetwork:
        """The network and what is trained beside it, without the wrapper of DDP."""
        return cast(PretextNetwork, self._model.module if isinstance(self._model, DDP) else self._model)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As in nnU-Net, which takes the network of several processes to be wrapped."""
        self.bare_network.decoder.deep_supervision = enabled  # type: ignore[union-attr]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups = super()._parameter_groups()
        if self.bare_model.head is not None:
            groups.append({"params": list(self.bare_model.head.parameters()), "name": "head", "lr_scale": 1.0})
        return groups

    def _use_stem(self, degree: int) -> None:
        """Choose the stem of a network that has several, and with it the sizes of the outputs."""
        if self._degrees:
            self.bare_network.use_anisotropy(degree)  # type: ignore[operator]

    def _trained_module(self) -> nn.Module:
        network = self._new_network()
        if self._degrees:  # with the largest maps, whose stem halves the fewest axes
            network.use_anisotropy(max(self._degrees))  # type: ignore[operator]
        return self._with_head(network)

    def _inputs_of_a_step(self) -> int:
        return super()._inputs_of_a_step() * self.task.inputs_per_sample

    def _memory_remedy(self, gigabytes: float) -> str:
        return "Pretrain with a smaller -patch_size or -batch_size of misfm_pretrain."

    # ---------------------------------------------------------------- data

    def do_split(self) -> tuple[list[str], list[str]]:
        """Training and validation volumes: a stable hold-out of 5 % (2 to 50), none in pools under 10 volumes."""
        return hold_out(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))

    def _sample_options(self) -> dict[str, Any]:
        """What the samples of training and of validation have in common."""
        return {
            "folder": self.preprocessed_dataset_folder,
            "patch_size": self.configuration_manager.patch_size,
            "task": self.pretext.task(),
            "seed": self.pretext.run.seed,
            "num_channels": self.num_input_channels,
        }

    def get_dataloaders(self) -> tuple[TimedIterator, Iterator[Any]]:
        """Iterators over batches of crops; training goes on from the current epoch."""
        training, validation = self.do_split()
        few = " (the same: too few to hold any out)" if set(training) == set(validation) else ""
        self.print_to_log_file(f"{len(training)} volumes for training, {len(validation)} for validation{few}.")
        done = len(self._interrupted.losses) if self._interrupted else 0
        epochs_done, start = divmod(done, self.num_iterations_per_epoch)  # it may have been stopped in the last one
        batches = crop_loader(
            CropSamples(identifiers=training, augment=self.pretext.augmentation, **self._sample_options()),
            self.configuration_manager.batch_size,
            self.num_iterations_per_epoch,
            start_epoch=self.current_epoch + epochs_done,
            start_iteration=start,
            num_workers=get_allowed_n_proc_DA(),
            **self._loading(),
        )
        # None stands for an iteration that was done before the run was interrupted.
        return TimedIterator(chain(repeat(None, done), batches)), self._validation_batches(validation)

    def _validation_batches(self, identifiers: Sequence[str]) -> Iterator[Any]:
        return crop_loader(
            validation_samples(identifiers=identifiers, **self._sample_options()),
            self.configuration_manager.batch_size,
            self.num_val_iterations_per_epoch,
            start_epoch=self.current_epoch,
            num_workers=min(1, get_allowed_n_proc_DA()),
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        """What the loaders of training and of validation have in common."""
        return {
            "rank": self.local_rank,
            "world_size": self.num_processes,
            "pin_memory": self.device.type == "cuda",
            "report": self.print_to_log_file if self.local_rank == 0 else print,  # nnU-Net logs one process
            **({"anisotropy": self._degrees} if self._degrees else {}),
        }

    # ---------------------------------------------------------------- loss and steps

    def _build_loss(self) -> Any:
        if self._do_i_compile():
            self.task.compile()
        return self.task.loss

    def train_step(self, batch: Any) -> dict:
        """One optimiser step on a batch of crops, then the end of the run if that was asked for."""
        if batch is None:
            assert self._interrupted is not None
            self._losses.append(self._interrupted.losses[len(self._losses)])
            self._iteration = self._replayed = self._iteration + 1
            return {"loss": np.array(self._losses[-1], np.float32)}
        if self._interrupted is not None:
            self._interrupted.restore_random_state(self.device)
            self._interrupted = None
        result = super().train_step(batch)
        self._losses.append(float(result["loss"]))
        if any_process(self._stop.signal is not None, self.device):
            self._save_and_stop()
        return result

    def _forward(self, batch: CropBatch) -> tuple[Any, Any, Tensor]:
        """Outputs, target and loss of this process' share of a batch."""
        self._use_stem(batch.anisotropy)
        with torch.no_grad():
            data, target = self.task.make(batch, self.device)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else nullcontext():
            outputs = self._model(data, target)
            loss = self.loss(outputs, target)
        return outputs, target, loss

    def _optimise(self, batch: Any) -> dict:
        self._guard.before_step()
        self.optimizer.zero_grad(set_to_none=True)
        _, _, loss = self._forward(batch)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), _GRADIENT_NORM)
        accepted = self._guard.accept(norm)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)  # which leaves out a step that does not count
            self.grad_scaler.update()
        elif accepted:
            self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy() if accepted else np.array(np.nan, np.float32)}

    def _save_and_stop(self) -> None:
        self._interrupted = InterruptedEpoch.now(self._losses, self.device)
        self.save_checkpoint(str(Path(self.output_folder) / LATEST))
        where = f"after iteration {len(self._losses)} of epoch {self.current_epoch}"
        saved = f"{STOPPED}: saved {where}. Continue with --c; the epoch goes on where it was."
        unsaved = f"Stopped {where}. Nothing is saved, because checkpointing is disabled."
        self.print_to_log_file(unsaved if self.disable_checkpointing else saved)
        if self.local_rank == 0 and self.current_epoch > 0:
            update_run_page(Path(self.output_folder), self.print_to_log_file)
        if self.is_ddp:
            dist.barrier()  # the launcher stops all processes soon after the first has ended
        raise SystemExit(BY_SIGNAL + (self._stop.signal or 0))

    def _epochs_finished(self) -> int:
        return self.current_epoch if self._interrupted is not None else super()._epochs_finished()

    def _more_to_save(self) -> dict[str, Any]:
        more = super()._more_to_save() | {TRAINED_PARTS: list(self.task.trains)}
        if self.bare_model.head is not None:
            more[_HEAD] = self.bare_model.head.state_dict()
        if self._interrupted is not None:
            more["interrupted_epoch"] = asdict(self._interrupted)
        plan = adaptation_plan(self.bare_network, self.plans_manager.plans, self.configuration_name)
        return more if plan is None else {**more, ADAPTATION: plan}

    def _more_to_say(self) -> dict[str, Any]:
        return self._told if self._scores is None else {"score": self._scores.main, LEARNT: self._scores.text}

    def _load_more(self, checkpoint: Mapping[str, Any]) -> None:
        super()._load_more(checkpoint)
        told = checkpoint[DESCRIPTION]["training"]
        self._told = {name: told[name] for name in ("score", LEARNT) if name in told}
        if self.bare_model.head is not None:
            self.bare_model.head.load_state_dict(checkpoint[_HEAD])
        if "interrupted_epoch" in checkpoint:
            self._interrupted = InterruptedEpoch.read(checkpoint["interrupted_epoch"])

    def on_validation_epoch_start(self) -> None:
        """As in nnU-Net, for what is trained beside the network too."""
        super().on_validation_epoch_start()
        self._model.eval()

    def validation_step(self, batch: Any) -> dict:
        """Loss, and the task's counts; then the end of the run if that was asked for."""
        outputs, target, loss = self._forward(batch)
        if any_process(self._stop.signal is not None, self.device):
            self._save_and_stop()
        return {"loss": loss.detach().cpu().numpy(), "counts": self.task.count(outputs, target)}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """In place of nnU-Net's, which counts voxels of classes: the task's scores, under the same names."""
        loss, self._scores = self._collect_scores(val_outputs)
        so_far = self.logger.get_value("ema_fg_dice", step=None)
        self.logger.log("mean_fg_dice", finite_score(float(self._scores.main), so_far), self.current_epoch)
        self.logger.log("dice_per_class_or_region", list(self._scores.parts), self.current_epoch)
        self.logger.log("val_losses", loss, self.current_epoch)

    def _collect_scores(self, outputs: list[dict]) -> tuple[np.floating, Scores]:
        """Mean loss and scores over the validation samples of all processes."""
        everywhere = [output for part in from_all_processes(outputs) for output in part]
        counts = [output["counts"] for output in everywhere]
        sums = {name: sum(count[name] for count in counts) for name in counts[0]}
        return np.mean([output["loss"] for output in everywhere]), self.task.scores(sums)

    # ---------------------------------------------------------------- epochs

    def on_train_epoch_start(self) -> None:
        """As in the base class; starts the clock of the epoch."""
        self._model.train()
        super().on_train_epoch_start()
        self._losses, self._replayed = [], 0
        self.dataloader_train.waited = 0.0
        self._clock = EpochClock(self.device)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As in nnU-Net; notes the speed and the share of time spent waiting for data."""
        self._interrupted = None
        super().on_train_epoch_end(train_outputs)
        self._speed = self._clock.speed(len(train_outputs) - self._replayed, self.dataloader_train.waited)

    def on_epoch_end(self) -> None:
        """As in the base class, after the task's alarms and, every few epochs, its picture."""
        epoch, scored = self.current_epoch, self._scores
        assert scored is not None
        iterations_left = (self.num_epochs - epoch - 1) * self.num_iterations_per_epoch
        self.print_to_log_file(f"Score, in nnU-Net's lines pseudo Dice: {scored.text}")
        self.print_to_log_file(self._speed.text(iterations_left))
        of_task = self.task.alarms(self.logger.get_value("train_losses", step=None), scored)
        for alarm in [*shrunk_alarm(self.bare_network), *of_task]:
            self.print_to_log_file(f"ALARM: {alarm}")
        if self.local_rank == 0 and (epoch % self.pretext.run.picture_every == 0 or epoch == self.num_epochs - 1):
            self._draw()
        super().on_epoch_end()

    def _metrics(self) -> dict[str, Any]:
        return {**cast(Scores, self._scores).values, **asdict(self._speed)}

    @torch.no_grad()
    def _draw(self) -> None:
        # Read directly, so that the picture does not take a batch from the running iterators.
        _, validation = self.do_split()
        samples = validation_samples(identifiers=validation, **self._sample_options())
        degrees = self._degrees[:1] or (0,)
        batch = next(crop_loader(samples, min(4, self.configuration_manager.batch_size), 1, anisotropy=degrees))
        self._use_stem(batch.anisotropy)
        data, target = self.task.make(batch, self.device)
        # Without the DDP wrapper, whose forward pass waits for the other processes.
        model = self.bare_model.eval()
        newest = Path(self.output_folder) / PICTURES / f"epoch_{self.current_epoch:04d}.png"
        newest.parent.mkdir(exist_ok=True)
        self.task.picture(newest, data, target, model(data, target))
        shutil.copyfile(newest, Path(self.output_folder) / self.task.picture_name)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate the pretext task on the fixed samples and write validation/summary.json.

        There are no segmentations to predict, so `--npz` has nothing to add here.
        """
        if not self.was_initialized:
            self.initialize()
        batches = self._validation_batches(self.do_split()[1])
        self._model.eval()
        with torch.no_grad():
            outputs = [self.validation_step(next(batches)) for _ in range(self.num_val_iterations_per_epoch)]
        loss, scored = self._collect_scores(outputs)
        if self.local_rank == 0:
            folder = Path(self.output_folder) / "validation"
            folder.mkdir(exist_ok=True)
            summary = {**scored.values, "score": float(scored.main), "val_loss": float(loss)}
            save_json(summary, str(folder / "summary.json"))
            self.print_to_log_file(f"Pretext validation: loss {loss:.4f}, {scored.text}")
