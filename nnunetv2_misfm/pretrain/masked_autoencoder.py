"""Masked autoencoder: most blocks of an image are hidden, and what was there is to be told.

After nnssl (`masked_image_modeling/BaseMAETrainer.py`): 75 % of the blocks of 16 of 160 voxels become 0, the network
keeps its skip connections, and the squared error over the hidden voxels is made small, without deep supervision.

What differs: blocks are shares of the patch, so that any patch has as many, and those at its end are cut where they do
not divide it; there are no rotations; the target is the crop with mean 0 and standard deviation 1 (`reconstruction.py`
says why); crops are scaled by a factor of their own along each axis, not by one. The published optimisation and the
other augmentation are the defaults here.

Hidden voxels are 0 in the normalised volume. For z-scored volumes that is their mean; nnU-Net's CT normalisation
subtracts a mean as well, that of the dataset or, in pools prepared here, 0 HU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.plans.settings import Settings, setting
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask, Target, standardised
from nnunetv2_misfm.pretrain.settings import AugmentSettings

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.batches import CropBatch
    from nnunetv2_misfm.pretrain.crop_reading import Crop
    from nnunetv2_misfm.pretrain.crops import SampleReader


class MaskSettings(Settings):
    """What is hidden of an image; sizes are per axis (X, Y, Z)."""

    mask_ratio: float = setting(0.75, "share of the blocks that are hidden", low=0.01, high=0.99)
    mask_block_size: tuple[float, float, float] = setting(
        (0.1, 0.1, 0.1), "size of a hidden block along each axis, as a share of the patch", above=0, high=1
    )


def block_size(patch_size: Sequence[int], settings: MaskSettings) -> tuple[int, ...]:
    """Voxels (X, Y, Z) of a block, at least 1."""
    return tuple(max(1, round(n * share)) for n, share in zip(patch_size, settings.mask_block_size, strict=True))


def sample_mask(patch_size: Sequence[int], settings: MaskSettings, generator: np.random.Generator) -> np.ndarray:
    """Draw which blocks are hidden: bool, one for each block along X, Y and Z.

    The share is exact, to one block. At least one is hidden, and one is shown if there are several.
    """
    grid = [-(-n // size) for n, size in zip(patch_size, block_size(patch_size, settings), strict=True)]
    number = int(np.prod(grid))
    hidden = np.zeros(number, bool)
    count = max(1, min(round(settings.mask_ratio * number), number - 1))
    hidden[generator.permutation(number)[:count]] = True
    return hidden.reshape(grid)


def voxel_masks(
    masks: Sequence[np.ndarray], patch_size: Sequence[int], settings: MaskSettings, device: torch.device | str
) -> Tensor:
    """Which voxels are hidden: bool (B, 1, X, Y, Z) on `device`, for B drawn masks."""
    hidden = torch.from_numpy(np.stack(masks)).to(device, non_blocking=True)
    block = block_size(patch_size, settings)
    # From the last axis to the first, so that what is repeated becomes longer and longer runs of memory.
    for axis in (2, 1, 0):
        of_voxel = torch.arange(patch_size[axis], device=hidden.device) // block[axis]
        hidden = hidden.index_select(1 + axis, of_voxel)
    return hidden.unsqueeze(1)


def hide(images: Tensor, hidden: Tensor) -> None:
    """Set the hidden voxels (B, 1, X, Y, Z) of images (B, C, X, Y, Z) to 0, in place; all channels alike."""
    # On the CPU, torch takes seven times as long for anything with a mask of bool.
    images.mul_(1 - hidden.view(torch.uint8))


class MaskedAutoencoder(ReconstructionTask[MaskSettings]):
    """The task."""

    name = "masked_autoencoder"
    title = "masked autoencoder; sizes in plans axis order"
    Settings = MaskSettings
    augmentation_defaults = AugmentSettings.off(scale=(0.7, 1.4), scale_probability=0.2, flip_probability=0.5)

    def sample(self, reader: SampleReader) -> tuple[Sequence[Crop], np.ndarray]:
        """One crop, and which of its blocks are hidden."""
        crops = reader.read([reader.augmentation()])
        return crops, sample_mask(reader.patch_size, self.settings, reader.generator)

    def make(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, Target]:
        """The image with hidden voxels at 0, and the whole image, of which the hidden voxels count."""
        (image,) = batch.patches(device)
        hidden = voxel_masks(batch.drawn, batch.patch_size, self.settings, device)
        inside = batch.in_volume(device)
        target = Target(standardised(image, inside), hidden if inside is None else hidden & inside)
        hide(image, hidden)
        return image, target
