"""VolumeFusionTrainer: nnU-Net's training loop on the Volume Fusion pretext task.

Image tensors are (B, C, X, Y, Z) in plans axis order, targets (B, 1, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import save_json
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, autocast, nn

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of, total_strides
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.files import check_dataset_of_plans
from nnunetv2_misfm.plans.run_settings import BLOCK, PretrainingSettings
from nnunetv2_misfm.plans.settings import read_settings
from nnunetv2_misfm.pretrain.crops import CropPairs, fuse_batch, pair_loader, validation_pairs
from nnunetv2_misfm.pretrain.picture import write_fusion_picture
from nnunetv2_misfm.pretrain.settings import GROUPS, AugmentSettings, FusionSettings
from nnunetv2_misfm.trainers.alarms import alarms
from nnunetv2_misfm.trainers.base import CUDA, BaseTrainer
from nnunetv2_misfm.trainers.checkpoint_files import LATEST
from nnunetv2_misfm.trainers.device_memory import peak_memory_gb
from nnunetv2_misfm.trainers.distributed import any_process, from_all_processes
from nnunetv2_misfm.trainers.fusion_scores import count, scores
from nnunetv2_misfm.trainers.interrupted_epoch import InterruptedEpoch
from nnunetv2_misfm.trainers.metrics_file import MetricsFile
from nnunetv2_misfm.trainers.pretext_data import TimedIterator, fusion_dataset_json, hold_out, killed_workers_are_named
from nnunetv2_misfm.trainers.step_guard import StepGuard
from nnunetv2_misfm.trainers.stop_request import BY_SIGNAL, StopRequest
from nnunetv2_misfm.transfer.adaptation_plan import nnssl_adaptation_plan
from nnunetv2_misfm.transfer.shrunk_weights import shrunk_weights

_MOST_EPOCHS_LOST = 5  # by a crash
_GRADIENT_NORM = 12.0  # nnU-Net's


class VolumeFusionTrainer(BaseTrainer):
    """Pretrains the network a plan names on preprocessed volumes; labels, if there are any, are never read.

    The fused samples are made on the training device from crops that workers read. Validation uses one fixed set of
    fused samples, drawn from volumes held out of training where there are enough.
    """

    SETTINGS = PretrainingSettings
    GROUPS = GROUPS

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        if str(fold) != "all":
            raise PlanError(f"Volume Fusion pretrains on all volumes: use fold all instead of {fold}.")
        block = plans.get(BLOCK)
        groups = block if isinstance(block, Mapping) and block.get("task") == PretrainingSettings.TASK else {}
        where = f"The '{BLOCK}' block of the plans {plans['plans_name']}"
        self.fusion = read_settings(FusionSettings, groups.get("fusion", {}), f"{where}, group 'fusion',")
        self.augmentation = read_settings(
            AugmentSettings, groups.get("augmentation", {}), f"{where}, group 'augmentation',"
        )
        check_dataset_of_plans(plans, dataset_json)
        if configuration_3d(plans, configuration).get("previous_stage") is not None:
            raise PlanError(f"{configuration} takes label channels, which pretraining has not. Use 3d_fullres.")
        super().__init__(plans, configuration, fold, fusion_dataset_json(dataset_json, self.fusion), device)
        self.pretraining = cast(PretrainingSettings, self.settings)
        self.metrics = MetricsFile(Path(self.output_folder) / "metrics.csv") if self.output_folder else None
        self._scores: dict[str, Any] = {}
        stems = tuple(self.configuration_manager.network_arch_init_kwargs.get("stems") or ())
        # A network with several stems trains them in turn, each on crops of its degree of anisotropy.
        self._degrees: tuple[int, ...] = stems if len(stems) > 1 else ()
        self._interrupted: InterruptedEpoch | None = None
        self._losses: list[float] = []
        self._stop = StopRequest()
        self.dataloader_train: Any
        self.dataloader_val: Any
        self.save_every = min(_MOST_EPOCHS_LOST, max(1, self.num_epochs // 40))

    def run_training(self) -> None:
        """As in nnU-Net; asked to stop, it saves first and goes on from there with --c.

        Raises:
            UserError: if a process that reads crops was killed.
        """
        with self._stop, killed_workers_are_named():
            try:
                super().run_training()
            finally:
                # Their workers end with them; at the end of the program they would be waited for.
                self.dataloader_train = self.dataloader_val = None

    def initialize(self) -> None:
        """As in the base class."""
        super().initialize()
        self._guard = StepGuard(self.bare_network)

    def _some_parameters_unused(self) -> bool:
        return bool(self._degrees)

    def _use_stem(self, degree: int) -> None:
        """Choose the stem of a network that has several, and with it the sizes of the outputs."""
        if self._degrees:
            self.bare_network.use_anisotropy(degree)  # type: ignore[operator]

    def _network_strides(self) -> list[tuple[int, int, int]]:
        if not self._degrees or not self.was_initialized:
            return super()._network_strides()
        return total_strides(strides_of(cast(PCTNet, self.bare_network).anisotropy))[:-1]

    def _memory_remedy(self, gigabytes: float) -> str:
        return "Pretrain with a smaller -patch_size or -batch_size of misfm_pretrain."

    # ---------------------------------------------------------------- data

    def do_split(self) -> tuple[list[str], list[str]]:
        """Training and validation volumes: a stable hold-out of 5 % (at most 50), none in pools under 10 volumes."""
        dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        return hold_out(dataset_class.get_identifiers(self.preprocessed_dataset_folder))

    def _pair_options(self) -> dict[str, Any]:
        """What the crop pairs of training and of validation have in common."""
        return {
            "folder": self.preprocessed_dataset_folder,
            "patch_size": self.configuration_manager.patch_size,
            "fusion": self.fusion,
            "seed": self.pretraining.seed,
            "num_channels": self.num_input_channels,
        }

    def get_dataloaders(self) -> tuple[TimedIterator, TimedIterator]:
        """Iterators over batches of crop pairs; training goes on from the current epoch."""
        training, validation = self.do_split()
        few = " (the same: too few to hold any out)" if set(training) == set(validation) else ""
        self.print_to_log_file(f"{len(training)} volumes for training, {len(validation)} for validation{few}.")
        workers = get_allowed_n_proc_DA()
        loading: dict[str, Any] = {
            "rank": dist.get_rank() if self.is_ddp else 0,
            "world_size": dist.get_world_size() if self.is_ddp else 1,
            "pin_memory": self.device.type == "cuda",
            "report": self.print_to_log_file,
        }
        batch_size = self.configuration_manager.batch_size
        done = len(self._interrupted.losses) if self._interrupted else 0
        epochs_done, start = divmod(done, self.num_iterations_per_epoch)  # it may have been stopped in the last one
        pairs = CropPairs(identifiers=training, augment=self.augmentation, **self._pair_options())
        fixed = validation_pairs(identifiers=validation, **self._pair_options())
        if self._degrees:
            loading["anisotropy"] = self._degrees
        batches = pair_loader(
            pairs,
            batch_size,
            self.num_iterations_per_epoch,
            start_epoch=self.current_epoch + epochs_done,
            start_iteration=start,
            num_workers=workers,
            **loading,
        )
        return (
            # None stands for an iteration that was done before the run was interrupted.
            TimedIterator(chain(repeat(None, done), batches)),
            TimedIterator(
                pair_loader(
                    fixed,
                    batch_size,
                    self.num_val_iterations_per_epoch,
                    start_epoch=self.current_epoch,
                    num_workers=min(1, workers),
                    **loading,
                )
            ),
        )

    def _fused(self, batch: Any) -> tuple[Tensor, Tensor]:
        patch_size = self.configuration_manager.patch_size
        return fuse_batch(batch, patch_size, self.device, self.fusion.num_fusion_classes)

    def _targets(self, labels: Tensor) -> Tensor | list[Tensor]:
        if not self.enable_deep_supervision:
            return labels
        # nnU-Net's transform works on one (C, X, Y, Z) segmentation; here the batch takes the place of its channels.
        scaled = DownsampleSegForDSTransform(self._get_deep_supervision_scales())(segmentation=labels[:, 0])
        return [target[:, None] for target in scaled["segmentation"]]

    # ---------------------------------------------------------------- loss and steps

    def _build_loss(self) -> nn.Module:
        # Half Dice, half cross entropy; coefficient 0 is a class like the others, so it is part of the Dice.
        dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": self.is_ddp}
        loss = DC_and_CE_loss(dice, {}, weight_ce=0.5, weight_dice=0.5, dice_class=MemoryEfficientSoftDiceLoss)
        if self._do_i_compile():
            loss.dc = torch.compile(loss.dc)
        return self._with_deep_supervision(loss)

    def train_step(self, batch: Any) -> dict:
        """One optimiser step on a batch of crop pairs, then the end of the run if that was asked for."""
        if batch is None:
            assert self._interrupted is not None
            self._losses.append(self._interrupted.losses[len(self._losses)])
            self._replayed += 1
            return {"loss": np.array(self._losses[-1], np.float32)}
        if self._interrupted is not None:
            self._interrupted.restore_random_state(self.device)
            self._interrupted = None
        result = super().train_step(batch)
        self._losses.append(float(result["loss"]))
        if any_process(self._stop.signal is not None, self.device):
            self._save_and_stop()
        return result

    def _optimise(self, batch: Any) -> dict:
        self._use_stem(batch.anisotropy)
        data, labels = self._fused(batch)
        targets = self._targets(labels)
        self._guard.before_step()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            loss = self.loss(self.network(data), targets)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), _GRADIENT_NORM)
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
        self.print_to_log_file(
            f"Asked to stop: saved after iteration {len(self._losses)} of epoch {self.current_epoch}. "
            f"Continue with --c; the epoch goes on where it was."
        )
        if self.is_ddp:
            dist.barrier()  # the launcher stops all processes soon after the first has ended
        raise SystemExit(BY_SIGNAL + (self._stop.signal or 0))

    def _epochs_finished(self) -> int:
        return self.current_epoch if self._interrupted is not None else super()._epochs_finished()

    def _more_to_save(self) -> dict[str, Any]:
        more: dict[str, Any] = {"skipped_steps": self._guard.skipped}
        if self._interrupted is not None:
            more["interrupted_epoch"] = self._interrupted.as_dict()
        plan = nnssl_adaptation_plan(self.bare_network, self.plans_manager.plans, self.configuration_name)
        return more if plan is None else {**more, "nnssl_adaptation_plan": plan}

    def _load_more(self, checkpoint: Mapping[str, Any]) -> None:
        self._guard.skipped = checkpoint.get("skipped_steps", 0)
        if "interrupted_epoch" in checkpoint:
            self._interrupted = InterruptedEpoch.read(checkpoint["interrupted_epoch"])

    def validation_step(self, batch: Any) -> dict:
        """Loss, and true and false positives and negatives of every fusion class."""
        self._use_stem(batch.anisotropy)
        data, labels = self._fused(batch)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            output = self.network(data)
            loss = self.loss(output, self._targets(labels))
        logits = output[0] if self.enable_deep_supervision else output
        return {"loss": loss.detach().cpu().numpy(), **count(logits, labels)}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As in nnU-Net, and the Dice of every class and the voxel accuracy for our own metrics file."""
        super().on_validation_epoch_end(val_outputs)
        self._scores = self._collect_scores(val_outputs)

    def _collect_scores(self, outputs: list[dict]) -> dict[str, Any]:
        everywhere = [output for part in from_all_processes(outputs) for output in part]
        return scores(everywhere, self.fusion.num_fusion_classes)

    # ---------------------------------------------------------------- epochs

    def on_train_epoch_start(self) -> None:
        """As in the base class; starts the clock of the epoch."""
        super().on_train_epoch_start()
        self._losses, self._replayed = [], 0
        self._started = perf_counter()
        self.dataloader_train.waited = 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As in nnU-Net; notes the speed and the share of time spent waiting for data."""
        self._interrupted = None
        counted = [output for output in train_outputs if np.isfinite(output["loss"])]
        super().on_train_epoch_end(counted or train_outputs)
        seconds = perf_counter() - self._started
        self._speed = {
            "iterations_per_s": (len(train_outputs) - self._replayed) / seconds,
            "data_wait_share": min(1.0, self.dataloader_train.waited / seconds),
            "peak_memory_gb": peak_memory_gb(self.device),
        }

    def on_epoch_end(self) -> None:
        """As in nnU-Net, after writing our metrics and, every few epochs, the picture."""
        epoch, scored, speed = self.current_epoch, self._scores, self._speed
        self.print_to_log_file(
            f"Dice per fusion class 0..{len(scored['dice']) - 1}: {[round(d, 4) for d in scored['dice']]}, "
            f"voxel accuracy {scored['accuracy']:.4f}"
        )
        iterations_left = (self.num_epochs - epoch - 1) * self.num_iterations_per_epoch
        remaining = iterations_left / max(speed["iterations_per_s"], 1e-9)
        self.print_to_log_file(
            f"{speed['iterations_per_s']:.2f} iterations/s, {100 * speed['data_wait_share']:.0f} % of the time waiting "
            f"for data, peak memory {speed['peak_memory_gb'] or 0:.1f} GB, about {remaining / 3600:.1f} h left"
        )
        if self._guard.skipped:
            self.print_to_log_file(f"{self._guard.skipped} steps skipped so far, their gradients were not finite")
        losses = self.logger.get_value("train_losses", step=None)
        shrunk = shrunk_weights(dict(self.bare_network.named_parameters()))
        for alarm in alarms(losses, scored["predicted"], scored["dice"], shrunk):
            self.print_to_log_file(f"ALARM: {alarm}")
        if self.local_rank == 0:
            row = {f"dice_{k}": d for k, d in enumerate(scored["dice"])}
            row |= {"train_loss": float(losses[-1]), "val_loss": scored["val_loss"]}
            row |= {"accuracy": scored["accuracy"], "lr": self.optimizer.param_groups[0]["lr"], **speed}
            row |= {"skipped_steps": self._guard.skipped}
            assert self.metrics is not None
            self.metrics.append(epoch, row)
            if epoch % self.pretraining.picture_every == 0 or epoch == self.num_epochs - 1:
                self._draw()
        super().on_epoch_end()

    @torch.no_grad()
    def _draw(self) -> None:
        # Read directly, so that the picture does not take a batch from the running iterators.
        _, validation = self.do_split()
        pairs = validation_pairs(identifiers=validation, **self._pair_options())
        degrees = self._degrees[:1] or (0,)
        batch = next(pair_loader(pairs, min(4, self.configuration_manager.batch_size), 1, anisotropy=degrees))
        self._use_stem(batch.anisotropy)
        data, labels = self._fused(batch)
        self.network.eval()
        # Without the DDP wrapper, whose forward pass waits for the other processes.
        output = self.bare_network(data)
        logits = output[0] if self.enable_deep_supervision else output
        path = Path(self.output_folder) / "fused_samples.png"
        write_fusion_picture(path, data, labels, logits.argmax(1, keepdim=True), self.fusion.num_fusion_classes)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate the pretext task on the fixed fused samples and write validation/summary.json.

        There are no segmentations to predict, so `--npz` has nothing to add here.
        """
        if not self.was_initialized:
            self.initialize()
        _, batches = self.get_dataloaders()
        self.network.eval()
        with torch.no_grad():
            outputs = [self.validation_step(next(batches)) for _ in range(self.num_val_iterations_per_epoch)]
        scored = self._collect_scores(outputs)
        if self.local_rank == 0:
            folder = Path(self.output_folder) / "validation"
            folder.mkdir(exist_ok=True)
            save_json(scored, str(folder / "summary.json"))
            self.print_to_log_file(
                f"Pretext validation: loss {scored['val_loss']:.4f}, Dice per class {scored['dice']}"
            )
