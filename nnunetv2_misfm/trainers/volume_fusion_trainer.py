"""VolumeFusionTrainer: nnU-Net's training loop on the Volume Fusion pretext task.

Image tensors are (B, C, X, Y, Z) in plans axis order, targets (B, 1, X, Y, Z).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, get_tp_fp_fn_tn
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, autocast, nn

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.pretrain.augment import AugmentSettings
from nnunetv2_misfm.pretrain.crops import CropPairs, fuse_batch, pair_loader, validation_pairs
from nnunetv2_misfm.pretrain.picture import write_fusion_picture
from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings
from nnunetv2_misfm.run_settings import BLOCK, PretrainingSettings
from nnunetv2_misfm.settings import read_settings
from nnunetv2_misfm.trainers.base import CUDA, BaseTrainer
from nnunetv2_misfm.trainers.metrics_file import MetricsFile

_HELD_OUT_SHARE = 0.05
_MOST_HELD_OUT = 50
_FEWEST_TO_HOLD_OUT_FROM = 10


class VolumeFusionTrainer(BaseTrainer):
    """Pretrains the network a plan names on preprocessed volumes; labels, if there are any, are never read.

    The fused samples are made on the training device from crops that workers read. Validation uses one fixed set of
    fused samples, drawn from volumes held out of training where there are enough.
    """

    SETTINGS = PretrainingSettings

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
        super().__init__(plans, configuration, fold, fusion_dataset_json(dataset_json, self.fusion), device)
        if self.is_cascaded:
            raise PlanError(f"{configuration} takes label channels, which pretraining has not. Use 3d_fullres.")
        self.pretraining = cast(PretrainingSettings, self.settings)
        self.metrics = MetricsFile(Path(self.output_folder) / "metrics.csv") if self.output_folder else None
        self._scores: dict[str, Any] = {}

    def _memory_remedy(self, gigabytes: float) -> str:
        return "Pretrain with a smaller -patch_size or -batch_size of misfm_pretrain."

    # ---------------------------------------------------------------- data

    def do_split(self) -> tuple[list[str], list[str]]:
        """Training and validation volumes: a stable hold-out of 5 % (at most 50), none in pools under 10 volumes."""
        dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        return hold_out(dataset_class.get_identifiers(self.preprocessed_dataset_folder))

    def get_dataloaders(self) -> tuple[TimedIterator, TimedIterator]:
        """Iterators over batches of crop pairs; training goes on from the current epoch."""
        training, validation = self.do_split()
        self.print_to_log_file(f"{len(training)} volumes for training, {len(validation)} for validation.")
        common: dict[str, Any] = {
            "folder": self.preprocessed_dataset_folder,
            "patch_size": self.configuration_manager.patch_size,
            "fusion": self.fusion,
            "seed": self.pretraining.seed,
            "num_channels": self.num_input_channels,
        }
        workers = get_allowed_n_proc_DA()
        loading: dict[str, Any] = {
            "rank": dist.get_rank() if self.is_ddp else 0,
            "world_size": dist.get_world_size() if self.is_ddp else 1,
            "pin_memory": self.device.type == "cuda",
            "report": self.print_to_log_file,
        }
        batch_size = self.configuration_manager.batch_size
        pairs = CropPairs(identifiers=training, augment=self.augmentation, **common)
        fixed = validation_pairs(identifiers=validation, **common)
        return (
            TimedIterator(
                pair_loader(
                    pairs,
                    batch_size,
                    self.num_iterations_per_epoch,
                    start_epoch=self.current_epoch,
                    num_workers=workers,
                    **loading,
                )
            ),
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
        """One optimiser step on a batch of crop pairs."""
        data, labels = self._fused(batch)
        return super().train_step({"data": data, "target": self._targets(labels)})

    def validation_step(self, batch: Any) -> dict:
        """Loss, and true and false positives and negatives of every fusion class."""
        data, labels = self._fused(batch)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            output = self.network(data)
            loss = self.loss(output, self._targets(labels))
        logits = output[0] if self.enable_deep_supervision else output
        predicted = logits.argmax(1, keepdim=True)
        one_hot = torch.zeros(logits.shape, device=logits.device).scatter_(1, predicted, 1)
        tp, fp, fn, _ = get_tp_fp_fn_tn(one_hot, labels, axes=[0, 2, 3, 4])
        counts = {name: value.detach().cpu().numpy() for name, value in (("tp", tp), ("fp", fp), ("fn", fn))}
        # nnU-Net's pseudo Dice and progress plot take the classes above 0.
        hard = {f"{name}_hard": value[1:] for name, value in counts.items()}
        return {
            "loss": loss.detach().cpu().numpy(),
            **counts,
            **hard,
            "correct": (predicted == labels).float().mean().item(),
        }

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As in nnU-Net, and the Dice of every class and the voxel accuracy for our own metrics file."""
        super().on_validation_epoch_end(val_outputs)
        self._scores = self._collect_scores(val_outputs)

    def _collect_scores(self, outputs: list[dict]) -> dict[str, Any]:
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, outputs)
            outputs = [output for part in gathered for output in part]
        collated = collate_outputs(outputs)
        size = self.fusion.num_fusion_classes
        tp, fp, fn = (np.sum(np.reshape(collated[name], (-1, size)), 0) for name in ("tp", "fp", "fn"))
        dice = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
        return {
            "val_loss": float(np.mean(collated["loss"])),
            "dice": [float(d) for d in dice],
            "accuracy": float(np.mean(collated["correct"])),
        }

    # ---------------------------------------------------------------- epochs

    def on_train_epoch_start(self) -> None:
        """As in the base class; starts the clock of the epoch."""
        super().on_train_epoch_start()
        self._started = perf_counter()
        self.dataloader_train.waited = 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As in nnU-Net; notes the speed and the share of time spent waiting for data."""
        super().on_train_epoch_end(train_outputs)
        seconds = perf_counter() - self._started
        self._speed = {
            "iterations_per_s": len(train_outputs) / seconds,
            "data_wait_share": min(1.0, self.dataloader_train.waited / seconds),
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 2**30
            if self.device.type == "cuda"
            else None,
        }

    def on_epoch_end(self) -> None:
        """As in nnU-Net, after writing our metrics and, every few epochs, the picture."""
        epoch, scores, speed = self.current_epoch, self._scores, self._speed
        self.print_to_log_file(
            f"Dice per fusion class 0..{len(scores['dice']) - 1}: {[round(d, 4) for d in scores['dice']]}, "
            f"voxel accuracy {scores['accuracy']:.4f}"
        )
        remaining = (self.num_epochs - epoch - 1) * self.num_iterations_per_epoch / speed["iterations_per_s"]
        self.print_to_log_file(
            f"{speed['iterations_per_s']:.2f} iterations/s, {100 * speed['data_wait_share']:.0f} % of the time waiting "
            f"for data, about {remaining / 3600:.1f} h of training left"
        )
        if self.local_rank == 0:
            row = {f"dice_{k}": d for k, d in enumerate(scores["dice"])}
            row |= {"train_loss": float(self.logger.get_value("train_losses", step=-1)), "val_loss": scores["val_loss"]}
            row |= {"accuracy": scores["accuracy"], "lr": self.optimizer.param_groups[0]["lr"], **speed}
            assert self.metrics is not None
            self.metrics.append(epoch, row)
            if epoch % self.pretraining.picture_every == 0 or epoch == self.num_epochs - 1:
                self._draw()
        super().on_epoch_end()

    @torch.no_grad()
    def _draw(self) -> None:
        # Read directly, so that the picture does not take a batch from the running iterators.
        _, validation = self.do_split()
        pairs = validation_pairs(
            identifiers=validation,
            folder=self.preprocessed_dataset_folder,
            patch_size=self.configuration_manager.patch_size,
            fusion=self.fusion,
            seed=self.pretraining.seed,
            num_channels=self.num_input_channels,
        )
        batch = next(pair_loader(pairs, min(4, self.configuration_manager.batch_size), 1))
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
        scores = self._collect_scores(outputs)
        if self.local_rank == 0:
            folder = Path(self.output_folder) / "validation"
            folder.mkdir(exist_ok=True)
            save_json(scores, str(folder / "summary.json"))
            self.print_to_log_file(
                f"Pretext validation: loss {scores['val_loss']:.4f}, Dice per class {scores['dice']}"
            )


class TimedIterator:
    """An iterator that adds up how long its user waited for it.

    Attributes:
        waited: seconds; the user may reset it.
    """

    def __init__(self, iterator: Iterator[Any]):
        self.iterator = iterator
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        started = perf_counter()
        item = next(self.iterator)
        self.waited += perf_counter() - started
        return item


def fusion_dataset_json(dataset_json: Mapping[str, Any], fusion: FusionSettings) -> dict[str, Any]:
    """The dataset.json of a pretext run: the dataset's channels, and the fusion classes as labels.

    nnU-Net's label manager then gives one output per fusion class, and its pseudo Dice and progress plot work.
    """
    kept = {key: value for key, value in dataset_json.items() if key not in ("labels", "regions_class_order")}
    labels = {"background": 0} | {f"fusion_{k}": k for k in range(1, fusion.num_fusion_classes)}
    return {**kept, "labels": labels}


def hold_out(identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation volumes; a volume's side does not change much when others join the pool."""
    by_hash = sorted(identifiers, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(by_hash) < _FEWEST_TO_HOLD_OUT_FROM:
        return sorted(by_hash), sorted(by_hash)
    count = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT_SHARE * len(by_hash))))
    return sorted(by_hash[count:]), sorted(by_hash[:count])
