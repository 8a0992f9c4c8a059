"""Volume Fusion: a foreground sub-volume is mixed into a background one, and the mixing is to be told.

Image tensors are (B, C, X, Y, Z) in plans axis order, so X is the depth; label tensors are (B, 1, X, Y, Z).

The fused image is `a * foreground + (1 - a) * background` with a fusion coefficient `a` of 0, 1/K .. 1 at every voxel,
K = `num_fusion_classes` - 1. The network is asked for the class a * K of every voxel, but not where both crops are
padding and nothing tells it. Two geometries are published:
`boxes` (MIS-FM, arXiv 2306.16925) and `blocks` (the authors' later code, PyMIC `pymic/transform/crop4vf.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from nnunetv2_misfm.architectures.resolution import output_weights
from nnunetv2_misfm.plans.settings import Settings, setting
from nnunetv2_misfm.pretrain.task import PretextTask, Scores, not_moving

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.batches import CropBatch
    from nnunetv2_misfm.pretrain.crop_reading import Crop
    from nnunetv2_misfm.pretrain.crops import SampleReader

_OF_THE_OTHER_GEOMETRY = {
    "blocks": ("num_boxes", "box_size_unit", "box_size_min", "box_size_max", "background_boxes"),
    "boxes": ("block_size_unit", "block_size_min", "block_size_max", "foreground_ratio"),
}
UNTOLD = -1  # in the labels: both crops are padding
_ONE_CLASS = 0.999  # share of the voxels
_EPOCHS_TO_START = 3
_TOLD_APART = 0.2  # Dice


class FusionSettings(Settings):
    """How fused samples are made; every range includes both ends, and sizes are per axis (X, Y, Z).

    Boxes are cuboids of random size and place, later ones on top; the default sizes are the paper's 8..40, 8..80 and
    8..80 voxels at its patch size of 64x128x128. Blocks are cuboids of one random size per sample on a regular grid
    with a random offset. Either has at least one voxel and at most the size of the patch; blocks longer than half the
    patch are cut to half of it, so that even a small patch holds foreground and background.
    """

    geometry: Literal["boxes", "blocks"] = setting(
        "boxes",
        "shape of what is mixed in: boxes of any size (the paper), or blocks on a grid (the authors' later code)",
    )
    num_fusion_classes: int = setting(
        5, "number of fusion classes, which are the weights of the mixture, 0 included", low=2, high=1000
    )
    num_boxes: tuple[int, int] = setting((10, 40), "least and greatest number of boxes in a sample", low=1)
    box_size_unit: Literal["fraction", "voxels"] = setting(
        "fraction", "unit of the box sizes: fractions of the patch, or voxels"
    )
    box_size_min: tuple[float, float, float] = setting(
        (0.125, 0.0625, 0.0625), "size of the smallest box along each axis", above=0
    )
    box_size_max: tuple[float, float, float] = setting(
        (0.625, 0.625, 0.625), "size of the largest box along each axis", above=0
    )
    background_boxes: bool = setting(False, "let boxes have the weight 0 too, which hides the boxes below them")
    block_size_unit: Literal["fraction", "voxels"] = setting(
        "voxels", "unit of the block sizes: fractions of the patch, or voxels"
    )
    block_size_min: tuple[float, float, float] = setting(
        (8, 8, 8), "size of the smallest block along each axis", above=0
    )
    block_size_max: tuple[float, float, float] = setting(
        (32, 32, 32), "size of the largest block along each axis", above=0
    )
    foreground_ratio: float = setting(0.7, "share of the blocks whose weight is not 0", above=0, high=1)
    pairs: Literal["two_volumes", "same_volume"] | None = setting(
        None,
        "where the two crops come from (by default from two volumes for boxes and from one for blocks, as published)",
    )

    @field_validator("box_size_min", "box_size_max", "block_size_min", "block_size_max")
    @classmethod
    def _fits_its_unit(cls, sizes: tuple[float, float, float], info: ValidationInfo) -> tuple[float, float, float]:
        kind = str(info.field_name).partition("_")[0]
        unit = info.data.get(f"{kind}_size_unit")
        if unit == "fraction" and max(sizes) > 1:
            raise ValueError("must be three shares of the patch, up to 1")
        if unit == "voxels" and any(size != int(size) for size in sizes):
            raise ValueError("must be three whole numbers of voxels")
        smallest = info.data.get(f"{kind}_size_min")
        if smallest is not None and any(low > high for low, high in zip(smallest, sizes, strict=True)):
            raise ValueError(f"is below {kind}_size_min = {smallest} on an axis")
        return sizes

    @property
    def two_volumes(self) -> bool:
        """Whether the two sub-volumes of a sample come from different volumes."""
        return (self.pairs or ("two_volumes" if self.geometry == "boxes" else "same_volume")) == "two_volumes"


@dataclass(frozen=True, eq=False)
class Fusion:
    """Cuboids painted in order, later ones on top; voxels outside all of them have class 0.

    Attributes:
        starts, sizes: (M, 3) whole numbers, in voxels.
        classes: (M,) whole numbers 0..K; class k stands for the fusion coefficient k / K.
    """

    starts: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray


def sample_fusion(shape: Sequence[int], settings: FusionSettings, generator: np.random.Generator) -> Fusion:
    """Draw the cuboids of one sample for a patch of `shape` voxels (X, Y, Z)."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"the shape of a patch must be three positive numbers of voxels, not {tuple(shape)}")
    patch = np.asarray(shape)
    return (_sample_boxes if settings.geometry == "boxes" else _sample_blocks)(patch, settings, generator)


def fusion_labels(fusion: Fusion, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """The class of every voxel: an int16 tensor (X, Y, Z) on `device`."""
    labels = torch.zeros(tuple(shape), dtype=torch.int16, device=device)
    stops = fusion.starts + fusion.sizes
    for (x0, y0, z0), (x1, y1, z1), k in zip(
        fusion.starts.tolist(), stops.tolist(), fusion.classes.tolist(), strict=True
    ):
        labels[x0:x1, y0:y1, z0:z1] = k
    return labels


def fuse(
    foreground: Tensor, background: Tensor, fusions: Sequence[Fusion], num_fusion_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix two batches of sub-volumes, one fusion per sample.

    Args:
        foreground, background: (B, C, X, Y, Z), floating point, of equal shape, on one device.
        fusions: B of them, drawn for patches of (X, Y, Z).
        num_fusion_classes: K + 1.

    Returns:
        the fused images (B, C, X, Y, Z) and their labels (B, 1, X, Y, Z) of type int16. Coefficients are read off the
        labels, so that the two agree at every voxel.

    Raises:
        ValueError: if the batches and fusions do not fit together, or a fusion has a class above K.
    """
    if foreground.shape != background.shape or foreground.ndim != 5 or len(fusions) != len(foreground):
        raise ValueError(
            "fusing needs foreground and background of one shape (B, C, X, Y, Z) and B fusions, not "
            f"{tuple(foreground.shape)}, {tuple(background.shape)} and {len(fusions)}"
        )
    highest = max((int(fusion.classes.max(initial=0)) for fusion in fusions), default=0)
    if highest >= num_fusion_classes:
        raise ValueError(f"a fusion has class {highest}, but num_fusion_classes is {num_fusion_classes}")
    shape = foreground.shape[2:]
    labels = torch.stack([fusion_labels(fusion, shape, foreground.device) for fusion in fusions]).unsqueeze(1)
    coefficients = labels.to(foreground.dtype).div_(num_fusion_classes - 1)
    return torch.lerp(background, foreground, coefficients), labels


def _sample_boxes(patch: np.ndarray, settings: FusionSettings, generator: np.random.Generator) -> Fusion:
    smallest, largest = _voxel_range(settings.box_size_min, settings.box_size_max, settings.box_size_unit, patch, patch)
    count = int(generator.integers(*settings.num_boxes, endpoint=True))
    sizes = generator.integers(smallest, largest, size=(count, 3), endpoint=True)
    starts = generator.integers(0, patch - sizes, endpoint=True)
    lowest = 0 if settings.background_boxes else 1
    return Fusion(starts, sizes, generator.integers(lowest, settings.num_fusion_classes, size=count))


def _sample_blocks(patch: np.ndarray, settings: FusionSettings, generator: np.random.Generator) -> Fusion:
    half = np.maximum(patch // 2, 1)
    smallest, largest = _voxel_range(
        settings.block_size_min, settings.block_size_max, settings.block_size_unit, patch, half
    )
    size = generator.integers(smallest, largest, endpoint=True)
    counts, left_over = np.divmod(patch, size)
    offset = generator.integers(0, left_over, endpoint=True)
    num_blocks = int(counts.prod())
    num_foreground = int(settings.foreground_ratio * num_blocks)
    chosen = generator.permutation(num_blocks)[:num_foreground]
    starts = offset + np.stack(np.unravel_index(chosen, tuple(counts)), axis=1) * size
    sizes = np.broadcast_to(size, starts.shape)
    return Fusion(starts, sizes, generator.integers(1, settings.num_fusion_classes, size=num_foreground))


def _voxel_range(
    size_min: Sequence[float], size_max: Sequence[float], unit: str, patch: np.ndarray, limit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest size in voxels per axis, each from 1 to `limit`."""
    bounds = np.stack([np.asarray(size_min, float), np.asarray(size_max, float)])
    if unit == "fraction":
        bounds = bounds * patch
    smallest, largest = np.clip(np.rint(bounds).astype(int), 1, limit)
    return smallest, largest


class VolumeFusion(PretextTask[FusionSettings]):
    """The task; half Dice, half cross entropy over the fusion classes, on the outputs of all resolutions."""

    name = "volume_fusion"
    title = "Volume Fusion; sizes in plans axis order"
    Settings = FusionSettings
    deep_supervision = True
    least_iterations = 10_000  # 1,500 did harm on ACDC, 6,000 did not help: benchmarks/results/three_sets_recipe.md
    picture_name = "fused_samples.png"
    picture_caption = (
        "Each row is a sample: the fused image, the fusion class of each voxel, and the class that the network "
        "predicts. A network that learns finds the boxes first and tells their classes apart later. Where a label is "
        "white, both crops are padding, which does not count."
    )
    score_captions = {
        "dice": "dice 0 is the Dice of fusion class 0, the voxels into which nothing was mixed; dice 1, dice 2 and so "
        "on are those of the classes with more and more of the other crop. In a long run all of them should rise.",
        "predicted": "The share of the voxels for which the network predicts each fusion class. Near 1 means that it "
        "says the same everywhere, near 0 that it never predicts this class.",
        "accuracy": "The share of the voxels whose fusion class is predicted right.",
    }

    @classmethod
    def group(cls) -> str:
        """`fusion`, as in the plans of the first versions."""
        return "fusion"

    @classmethod
    def trainer(cls) -> str:
        """A class of its own, after which the results folders of the first versions are named."""
        return "VolumeFusionTrainer"

    def ignored(self) -> tuple[Sequence[str], str]:
        """Settings of the other geometry."""
        return _OF_THE_OTHER_GEOMETRY[self.settings.geometry], f"-geometry {self.settings.geometry}"

    def num_outputs(self, num_channels: int) -> int:
        """One for each fusion class."""
        return self.settings.num_fusion_classes

    def sample(self, reader: SampleReader) -> tuple[Sequence[Crop], Fusion]:
        """Foreground and background, and the cuboids."""
        fusion = sample_fusion(reader.patch_size, self.settings, reader.generator)
        first, second = reader.augmentation(), reader.augmentation()
        pair = [first, dataclasses.replace(second, invert=first.invert)]  # both are inverted, or neither
        two = self.settings.two_volumes
        crops = [reader.read([augmentation])[0] for augmentation in pair] if two else reader.read(pair)
        if reader.fixed and len(set(reader.used)) == 1:
            # Nothing is augmented there: two crops of a volume no larger than the patch would be the same.
            mirrored = dataclasses.replace(crops[1].augmentation, flips=(False, False, True))
            crops[1] = dataclasses.replace(crops[1], augmentation=mirrored)
        return crops, fusion

    def make(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The fused images (B, C, X, Y, Z), float32, and their labels (B, 1, X, Y, Z), int16, or `UNTOLD`."""
        foreground, background = batch.patches(device)
        fused, labels = fuse(foreground, background, batch.drawn, self.settings.num_fusion_classes)
        inside = batch.in_volume(device, 0), batch.in_volume(device, 1)
        if inside[0] is not None and inside[1] is not None:
            labels.masked_fill_(~(inside[0] | inside[1]), UNTOLD)
        return fused, labels

    def loss(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        """Weighted sum over the outputs (B, K + 1, ...), finest first; the labels are brought to their sizes."""
        # nnU-Net's take seconds to import, which help texts should not wait for.
        from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
        from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

        size = target.shape[2:]
        scales = [[n / full for n, full in zip(output.shape[2:], size, strict=True)] for output in outputs]
        # nnU-Net's transform works on one (C, X, Y, Z) segmentation; here the batch takes the place of its channels.
        scaled = DownsampleSegForDSTransform(scales)(segmentation=target[:, 0])["segmentation"]
        loss = DeepSupervisionWrapper(self._one_resolution, output_weights(len(outputs)))
        total: Tensor = loss(list(outputs), [labels[:, None] for labels in scaled])
        return total

    def _one_resolution(self, output: Tensor, labels: Tensor) -> Tensor:
        told = labels != UNTOLD
        dice: Tensor = self._dice(output, torch.where(told, labels, 0), loss_mask=told)
        entropy = F.cross_entropy(output, labels[:, 0].long(), ignore_index=UNTOLD, reduction="none").flatten(1).sum(1)
        # Each sample weighs the same, so that processes may share a batch; a coarse map may have none that is told.
        return 0.5 * dice + 0.5 * (entropy / told.flatten(1).sum(1).clamp(min=1)).mean()

    def compile(self) -> None:
        """The Dice loss, as nnU-Net does."""
        self._dice = torch.compile(self._dice)

    @cached_property
    def _dice(self) -> Any:
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
        from nnunetv2.utilities.helpers import softmax_helper_dim1

        # Coefficient 0 is a class like the others, so it is part of the Dice.
        ddp = dist.is_available() and dist.is_initialized()
        return MemoryEfficientSoftDiceLoss(softmax_helper_dim1, batch_dice=True, do_bg=True, smooth=1e-5, ddp=ddp)

    def count(self, outputs: Sequence[Tensor], target: Tensor) -> dict[str, Any]:
        """True and false positives and false negatives of every class; voxels that are right, and all."""
        from nnunetv2.training.loss.dice import get_tp_fp_fn_tn

        logits, told = outputs[0], target != UNTOLD
        predicted = logits.argmax(1, keepdim=True)
        one_hot = torch.zeros(logits.shape, device=logits.device).scatter_(1, predicted, 1)
        tp, fp, fn, _ = get_tp_fp_fn_tn(one_hot, torch.where(told, target, 0), axes=[0, 2, 3, 4], mask=told)
        counts = {name: value.detach().cpu().numpy() for name, value in (("tp", tp), ("fp", fp), ("fn", fn))}
        return {**counts, "correct": (predicted == target).sum().item(), "voxels": told.sum().item()}

    def scores(self, sums: Mapping[str, Any]) -> Scores:
        """Dice of every class, the mean of those above 0 as the main score, and the share of voxels that are right."""
        tp, fp, fn = sums["tp"], sums["fp"], sums["fn"]
        dice = [float(d) for d in 2 * tp / np.maximum(2 * tp + fp + fn, 1)]
        predicted = [float(share) for share in (tp + fp) / max(1, np.sum(tp + fp))]
        accuracy = sums["correct"] / max(1, sums["voxels"])
        there = 2 * tp + fp + fn > 0
        parts = np.where(there, dice, np.nan)[1:]
        return Scores(
            main=np.nanmean(parts) if there[1:].any() else 0.0,
            parts=list(parts),
            values={"dice": dice, "predicted": predicted, "accuracy": accuracy},
            text=f"Dice per fusion class 0..{len(dice) - 1}: {[round(d, 4) for d in dice]}, "
            f"voxel accuracy {accuracy:.4f}",
        )

    def alarms(self, losses: Sequence[float], scores: Scores) -> list[str]:
        """One class everywhere, or classes that stay mixed up."""
        predicted, dice = (np.atleast_1d(scores.values[name]) for name in ("predicted", "dice"))
        found = []
        if len(losses) >= _EPOCHS_TO_START and predicted.max() > _ONE_CLASS:
            found.append(
                f"the network predicts class {predicted.argmax()} only. Try a lower -initial_lr (a third), or more "
                f"contrast between the volumes; {self.picture_name} shows whether the task can be seen at all."
            )
        # Late in a good run the loss moves little too; there the classes are told apart.
        if dice.min() < _TOLD_APART and (still := not_moving(losses)):
            other = "blocks" if self.settings.geometry == "boxes" else "boxes"
            found.append(
                f"{still}. Try another -initial_lr, -geometry {other}, or look at {self.picture_name} for volumes "
                f"without contrast."
            )
        return found

    def picture(self, path: Path, x: Tensor, target: Tensor, outputs: Sequence[Tensor]) -> None:
        """A row for each sample: the fused image, the labels and the classes that were predicted."""
        from nnunetv2_misfm.pretrain.picture import Panel, classes, grey, write_panels

        number = self.settings.num_fusion_classes
        predicted = outputs[0].argmax(1, keepdim=True)
        told = [Panel("label", target, classes(number)), Panel("prediction", predicted, classes(number))]
        write_panels(path, [Panel("fused", x, grey), *told], "fusion class k, coefficient k / K")
