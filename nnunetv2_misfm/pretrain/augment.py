"""Augmentation of the crops that a pretext task is made from, on the training device.

Crops are (C, X, Y, Z) in plans axis order, so X is the depth; the augmented batch is (B, C, X, Y, Z). Drawing the
parameters of a crop (numpy generator in, plain values out) is separate from applying them (tensors in, tensors out).

The set follows the authors' code (PyMIC `pymic/transform/crop4vf.py`): resized crops, flips, percentile contrast,
gamma, and inversion of both crops together. Unlike there, intensities stay in the crop's own range instead of moving to
[0, 1], voxels beyond the contrast percentiles are clipped, and constant crops are safe. Noise, blur and brightness
are additions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_misfm.pretrain.settings import AugmentSettings

Size3 = tuple[int, int, int]

# A crop is stretched to these percentiles of itself rather than to its extremes: one hot voxel would set the contrast.
INTENSITY_RANGE_PERCENTILES = (0.1, 99.9)
# Percentiles are read off about this many voxels of a channel; sorting all of them would cost more than the rest.
PERCENTILE_SAMPLE = 16384


@dataclass(frozen=True)
class CropAugmentation:
    """What is done to one crop, in this order; unset means not done.

    Attributes:
        read_size: voxels (X, Y, Z) to read; they are resized to the patch size.
        slices_averaged: neighbouring slices along X averaged into one before resizing (2**degree of anisotropy).
        flips: for each axis.
        blur_sigma: in voxels of the patch.
        percentiles: (low, high) of each channel, 0..100.
        gamma: of each channel.
        invert: whether bright becomes dark.
        brightness: of each channel, as a share of its range.
        noise_std: as a share of each channel's range.
        noise_seed: for the noise alone; the same noise on the same type of device.
        inside: the first voxel read that lies in the volume, and the first behind it; None where nothing is padded.
    """

    read_size: Size3
    slices_averaged: int = 1
    flips: tuple[bool, bool, bool] = (False, False, False)
    blur_sigma: float | None = None
    percentiles: tuple[tuple[float, float], ...] | None = None
    gamma: tuple[float, ...] | None = None
    invert: bool = False
    brightness: tuple[float, ...] | None = None
    noise_std: float | None = None
    noise_seed: int = 0
    inside: tuple[Size3, Size3] | None = None

    @property
    def changes_intensities(self) -> bool:
        """Whether anything depends on the range of the crop's intensities."""
        return self.invert or any(v is not None for v in (self.percentiles, self.gamma, self.brightness))


def sample_augmentation(
    patch_size: Sequence[int],
    settings: AugmentSettings,
    generator: np.random.Generator,
    num_channels: int,
    anisotropy: int = 0,
) -> CropAugmentation:
    """Draw what is done to one crop.

    Args:
        patch_size: (X, Y, Z) in voxels.
        anisotropy: degree of anisotropy m; the crop is read 2**m times as deep and brought to the patch size by
            averaging slices, so that the patch has slices 2**m times as thick.
    """
    slices_averaged = 2**anisotropy
    scales = generator.uniform(*settings.scale, size=3)
    # Certain and impossible events draw nothing: runs begun before there was this setting draw what they would have.
    probability = settings.scale_probability
    if probability < 1 and (probability == 0 or generator.random() >= probability):
        scales = np.ones(3)
    depth, height, width = (max(1, round(n * scale)) for n, scale in zip(patch_size, scales.tolist(), strict=True))
    flips = tuple((generator.random(3) < settings.flip_probability).tolist())
    low = generator.uniform(*settings.low_percentiles, size=num_channels).tolist()
    high = generator.uniform(*settings.high_percentiles, size=num_channels).tolist()
    gamma = tuple(generator.uniform(*settings.gamma, size=num_channels).tolist())
    brightness = tuple(generator.uniform(*settings.brightness, size=num_channels).tolist())
    blur_sigma = generator.uniform(*settings.blur_sigma)
    noise_std = generator.uniform(*settings.noise_std)

    def drawn(probability: float) -> bool:
        return bool(generator.random() < probability)

    return CropAugmentation(
        read_size=(depth * slices_averaged, height, width),
        slices_averaged=slices_averaged,
        flips=flips,
        percentiles=tuple(zip(low, high, strict=True)) if drawn(settings.contrast_probability) else None,
        gamma=gamma if drawn(settings.gamma_probability) else None,
        invert=drawn(settings.inversion_probability),
        brightness=brightness if drawn(settings.brightness_probability) else None,
        blur_sigma=blur_sigma if drawn(settings.blur_probability) else None,
        noise_std=noise_std if drawn(settings.noise_probability) else None,
        noise_seed=int(generator.integers(2**63)),
    )


def spread_stride(num_voxels: int, wanted: int) -> int:
    """The step that visits about `wanted` of a flattened volume's voxels, spread over all of its rows and columns."""
    stride = max(1, num_voxels // wanted)
    # A stride that shares a factor with the size would visit the same columns in every slice.
    while math.gcd(stride, num_voxels) > 1:
        stride += 1
    return stride


@torch.no_grad()
def apply_augmentation(
    crops: Sequence[Tensor], augmentations: Sequence[CropAugmentation], patch_size: Sequence[int]
) -> Tensor:
    """Augment crops and resize them to the patch size.

    Crops differ in size, and most parameters are drawn for a part of them only, so each is worked on alone and written
    into the batch. Nothing here waits for a GPU.

    Args:
        crops: B tensors (C, *read_size), all on one device.
        augmentations: B of them.
        patch_size: (X, Y, Z) in voxels.

    Returns:
        float32 (B, C, X, Y, Z) on the crops' device.

    Raises:
        ValueError: if a crop does not have the read size of its augmentation.
    """
    batch = crops[0].new_empty((len(crops), crops[0].shape[0], *patch_size), dtype=torch.float32)
    for out, crop, augmentation in zip(batch, crops, augmentations, strict=True):
        if tuple(crop.shape[1:]) != tuple(augmentation.read_size):
            raise ValueError(
                f"a crop of {tuple(crop.shape[1:])} voxels does not have the read size {augmentation.read_size}"
            )
        resized = _resize(crop.float(), augmentation.slices_averaged, patch_size)
        out.copy_(flipped(resized, augmentation.flips))
        if augmentation.blur_sigma is not None:
            out.copy_(blur(out, augmentation.blur_sigma))
        if augmentation.changes_intensities:
            for index, channel in enumerate(out):
                _change_intensities(channel, augmentation, index)
        if augmentation.noise_std is not None:
            _add_noise(out, augmentation.noise_std, augmentation.noise_seed)
    return batch


def voxels_inside(augmentation: CropAugmentation, patch_size: Size3, device: torch.device) -> Tensor:
    """Which voxels of the patch (X, Y, Z) that a crop becomes lie in its volume; the others were padded."""
    low, high = augmentation.inside or ((0, 0, 0), augmentation.read_size)
    along = []
    for axis, length in enumerate(patch_size):
        centres = (torch.arange(length, device=device) + 0.5) * (augmentation.read_size[axis] / length)
        inside = (centres >= low[axis]) & (centres < high[axis])
        along.append(inside.flip(0) if augmentation.flips[axis] else inside)
    x, y, z = along
    return x[:, None, None] & y[:, None] & z


def blur(crop: Tensor, sigma: float, axes: Sequence[int] = (1, 2, 3)) -> Tensor:
    """Gaussian filter of (C, X, Y, Z) along some axes, with the border voxels repeated outside.

    Args:
        crop: floating point.
        sigma: standard deviation in voxels; the filter reaches three of them.
        axes: of the tensor.
    """
    radius = math.ceil(3 * sigma)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    for axis in axes:
        pads = [0] * 6
        pads[2 * (3 - axis)] = pads[2 * (3 - axis) + 1] = radius
        padded = F.pad(crop[None], pads, mode="replicate")[0]
        blurred = torch.zeros_like(crop)
        for shift, weight in enumerate(weights.tolist()):
            blurred.add_(padded.narrow(axis, shift, crop.shape[axis]), alpha=weight)
        crop = blurred
    return crop


def flipped(crop: Tensor, flips: Sequence[bool]) -> Tensor:
    """(C, X, Y, Z) turned round along the axes of X, Y and Z that are flipped."""
    axes = [axis for axis, flip in enumerate(flips, start=1) if flip]
    return crop.flip(axes) if axes else crop


def _resize(crop: Tensor, slices_averaged: int, patch_size: Sequence[int]) -> Tensor:
    if slices_averaged > 1:
        crop = crop.unflatten(1, (-1, slices_averaged)).mean(dim=2)
    if tuple(crop.shape[1:]) == tuple(patch_size):
        return crop
    return F.interpolate(crop[None], size=tuple(patch_size), mode="trilinear", align_corners=False)[0]


def _change_intensities(channel: Tensor, augmentation: CropAugmentation, index: int) -> None:
    """Contrast, gamma, inversion and brightness of one channel (X, Y, Z), in place.

    All of them are one curve: scale the source range to 0..1, bend it, and scale 0..1 to the target range.
    """
    low, high = target_low, target_high = torch.aminmax(channel)
    if augmentation.percentiles is not None:
        percentiles = (*augmentation.percentiles[index], *INTENSITY_RANGE_PERCENTILES)
        values = percentile_values(channel, percentiles)
        # Percentiles may coincide, as in a crop that is mostly air: then the whole range is kept.
        usable = values[1] > values[0]
        low, target_low = torch.where(usable, values[0::2], low)
        high, target_high = torch.where(usable, values[1::2], high)
    spread = high - low
    # A constant channel has no range: it becomes 0 here and its own value again below.
    channel.sub_(low).mul_(torch.where(spread > torch.finfo(spread.dtype).tiny, 1 / spread, 0.0)).clamp_(0, 1)
    if augmentation.gamma is not None:
        channel.pow_(augmentation.gamma[index])
    target_spread = target_high - target_low
    start = target_high if augmentation.invert else target_low
    if augmentation.brightness is not None:
        start = start + augmentation.brightness[index] * target_spread
    channel.mul_(-target_spread if augmentation.invert else target_spread).add_(start)


def intensity_range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each image of (..., X, Y, Z), without the rarest unless all others are one value."""
    low, high = percentile_values(images, INTENSITY_RANGE_PERCENTILES)
    usable, whole = high > low, torch.aminmax(images.flatten(-3), dim=-1)
    return torch.where(usable, low, whole.min), torch.where(usable, high, whole.max)


def percentile_values(images: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Percentiles (0..100) of each image of (..., X, Y, Z), from an evenly spread sample of its voxels.

    Returns:
        one for each percentile along the first axis: (P, ...).
    """
    voxels = images.flatten(-3)
    values = voxels[..., :: spread_stride(voxels.shape[-1], PERCENTILE_SAMPLE)].sort().values
    return torch.stack([values[..., round(p / 100 * (values.shape[-1] - 1))] for p in percentiles])


def _add_noise(crop: Tensor, std: float, seed: int) -> None:
    """Gaussian noise on (C, X, Y, Z), in place; `std` is a share of each channel's range."""
    generator = torch.Generator(crop.device).manual_seed(seed)
    noise = torch.randn(crop.shape, generator=generator, device=crop.device)
    for channel, channel_noise in zip(crop, noise, strict=True):
        low, high = torch.aminmax(channel)
        channel.add_(channel_noise.mul_((high - low) * std))
