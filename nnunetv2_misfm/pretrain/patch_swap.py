"""Patch swapping: pairs of blocks of a crop change places, and the network puts them back.

Image tensors are (B, C, X, Y, Z) in plans axis order, so X is the depth.

Published as context restoration (Chen et al., Medical Image Analysis 2019). Number and size of the blocks, the loss
(absolute error over all voxels) and the length of a run are those of PyMIC's recipe (`PatchSwaping` in
`pymic/transform/intensity.py`: 20 to 40 pairs of 8x16x16 blocks in 64x128x128). Blocks are an eighth of any patch along
each axis, so that the same share of it changes; along an axis of fewer than 8 voxels they are one voxel long, and more
changes. What differs from that code:

- As in the paper the two blocks of a pair lie apart, and each pair is swapped in what earlier ones left, so that no
  value is lost. PyMIC copies from the unchanged crop, into blocks that may overlap.
- Its crops are in [-1, 1] and its network ends in a tanh. Crops here have any normalisation: the target has mean 0 and
  standard deviation 1 (`reconstruction.py` says why), and outputs are unbounded.
- The score is the share of the swaps' squared error that is undone: 0 for an output that is the input, 1 for the image.
  The variance explained tells the two hardly apart: of all voxels the input has four fifths, and of swapped ones a blur
  has more than a network that has learnt to copy what was not swapped.
- The optimiser is SGD with nnU-Net's decay, as in the other reconstructions, in place of Adam at 1e-3, halved after
  each third of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.plans.settings import Settings, setting
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask, Target, standardised
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.task import Scores

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.batches import CropBatch
    from nnunetv2_misfm.pretrain.crop_reading import Crop
    from nnunetv2_misfm.pretrain.crops import SampleReader


class PatchSwapSettings(Settings):
    """How many blocks of which size change places."""

    num_swaps: tuple[int, int] = setting(
        (20, 40), "least and greatest number of pairs of blocks that change places", low=1
    )
    swap_size: tuple[float, float, float] = setting(
        (0.125, 0.125, 0.125), "size of a block that changes places, as a share of the patch", above=0, high=0.5
    )


@dataclass(frozen=True, eq=False)
class Swaps:
    """Pairs of blocks that change places, one pair after another.

    Attributes:
        first, second: (N, 3) whole numbers: the blocks' first voxels; the two blocks of a pair do not overlap.
        size: voxels (X, Y, Z) of every block.
    """

    first: np.ndarray
    second: np.ndarray
    size: tuple[int, int, int]


def sample_swaps(shape: Sequence[int], settings: PatchSwapSettings, generator: np.random.Generator) -> Swaps:
    """Draw the swaps of one crop of `shape` voxels (X, Y, Z); none if it has but one voxel."""
    patch = np.asarray(shape)
    # At most half the patch along each axis, so that there is room for two.
    size = np.clip(np.rint(patch * settings.swap_size).astype(int), 1, np.maximum(patch // 2, 1))
    count = int(generator.integers(*settings.num_swaps, endpoint=True)) if patch.max() > 1 else 0
    pairs = np.zeros((2, count, 3), dtype=int)
    overlap = np.ones(count, dtype=bool)
    while overlap.any():
        pairs[:, overlap] = generator.integers(0, patch - size, size=(2, int(overlap.sum()), 3), endpoint=True)
        overlap = (np.abs(pairs[0] - pairs[1]) < size).all(axis=1)
    x, y, z = size.tolist()
    return Swaps(pairs[0], pairs[1], (x, y, z))


@torch.no_grad()
def apply_swaps(crops: Tensor, swaps: Sequence[Swaps]) -> None:
    """Swap the crops' blocks in place; all channels of a crop alike.

    Args:
        crops: (B, C, X, Y, Z).
        swaps: B of them, drawn for patches of (X, Y, Z).
    """
    for crop, drawn in zip(crops, swaps, strict=True):
        shape, strides = (len(crop), *drawn.size), crop.stride()
        # Where the blocks begin in memory: slices along three axes would take longer than what is copied.
        first, second = (crop.storage_offset() + starts @ strides[1:] for starts in (drawn.first, drawn.second))
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            block, its_partner = crop.as_strided(shape, strides, one), crop.as_strided(shape, strides, other)
            kept = block.clone()
            block.copy_(its_partner)
            its_partner.copy_(kept)


@dataclass(frozen=True, eq=False, kw_only=True)
class SwapTarget(Target):
    """A target that knows what the input has wrong.

    Attributes:
        swaps: one for each sample.
    """

    swaps: Sequence[Swaps]

    def swap_error(self) -> float:
        """Squared error of an output that is the input, as means over each sample's voxels, added up."""
        swapped = self.image.clone()
        apply_swaps(swapped, self.swaps)
        return self.mean((swapped - self.image).square()).sum().item()


class PatchSwap(ReconstructionTask[PatchSwapSettings]):
    """The task."""

    name = "patch_swap"
    title = "patch swapping; sizes in plans axis order"
    nothing_learnt = "the input as it is"
    Settings = PatchSwapSettings
    run_defaults = ReconstructionTask.run_defaults.model_copy(update={"num_epochs": 480})
    score_captions = {
        "swaps_undone": "Swaps undone is 0 for a copy of the input and 1 for the image itself.",
        **ReconstructionTask.score_captions,
    }
    augmentation_defaults = AugmentSettings.off()

    def sample(self, reader: SampleReader) -> tuple[Sequence[Crop], Swaps]:
        """One crop, and what is swapped in it."""
        crops = reader.read([reader.augmentation()])
        return crops, sample_swaps(reader.patch_size, self.settings, reader.generator)

    def make(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, SwapTarget]:
        """The image with its blocks swapped, and the image."""
        (x,) = batch.patches(device)
        inside = batch.in_volume(device)
        target = SwapTarget(image=standardised(x, inside), counted=inside, swaps=batch.drawn)
        apply_swaps(x, batch.drawn)
        return x, target

    def loss(self, outputs: Tensor, target: Target) -> Tensor:
        """Mean absolute error."""
        return target.mean((outputs.float() - target.image).abs()).mean()

    def count(self, outputs: Tensor, target: Target) -> dict[str, Any]:
        """As for other reconstructions, and the error of an output that is the input."""
        assert isinstance(target, SwapTarget)
        return {**super().count(outputs, target), "swapped": target.swap_error()}

    def scores(self, sums: Mapping[str, Any]) -> Scores:
        """Share of the swaps' error that is undone, and the scores of other reconstructions."""
        whole = super().scores(sums)
        undone = 1 - sums["error"] / sums["swapped"] if sums["swapped"] > 0 else 0.0
        return Scores(
            main=undone,
            parts=[undone],
            values={"swaps_undone": undone, **whole.values},
            text=f"{undone:.4f} of the swaps' error undone (0 for the input as it is, 1 for the image), {whole.text}",
        )
