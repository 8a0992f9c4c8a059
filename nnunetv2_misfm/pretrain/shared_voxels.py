"""Voxels of a volume that two of its crops show, for tasks that compare what a network makes of them.

Crops are (C, X, Y, Z) in plans axis order; each has a place, a size and flips of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nnunetv2_misfm.pretrain.augment import intensity_range, spread_stride

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.crop_reading import Crop

_BODY = 0.05  # of a channel's range, above its low end: -900 HU of -1000 to 1000, which takes lungs in
_SAMPLE, _MANY = 4096, 0.1  # voxels that are looked at for a value of many, and the share that makes it one
_CANDIDATES_PER_POINT = 4  # voxels looked at for each one that is wanted, so that a quarter of body is enough


def sample_points(
    first: Crop, second: Crop, patch_size: Sequence[int], num_points: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw voxels of the body that lie in both of the patches that two crops of a volume become.

    A voxel is of the body if one of its channels is brighter than the lowest twentieth of that channel's range in the
    first crop, and not of the one value around a body that was normalised alone. Where none is, all voxels are taken.

    Args:
        first, second: as they were read.
        patch_size: (X, Y, Z) in voxels.
        num_points: at most.
        generator: of the choice.

    Returns:
        (2, N, 3) whole numbers, N from 1 to `num_points`: each voxel of the first patch, and the one of the second
        patch that its centre lies in.

    Raises:
        ValueError: if the crops do not overlap.
    """
    places = [_shared(first, second, axis, int(n)) for axis, n in enumerate(patch_size)]
    shape = [len(place[0]) for place in places]
    if min(shape) == 0:
        raise ValueError(f"crops that start at {first.start} and {second.start} do not overlap")
    number = int(np.prod(shape))
    wanted = min(number, _CANDIDATES_PER_POINT * num_points)
    chosen = np.unravel_index(generator.choice(number, wanted, replace=False), shape)
    in_first, in_second, in_crop = (
        np.stack([place[which][index] for place, index in zip(places, chosen, strict=True)], axis=1)
        for which in range(3)
    )
    body = np.flatnonzero(_is_body(first.voxels, in_crop))
    kept = (body if len(body) else np.arange(wanted))[:num_points]
    return np.stack([in_first[kept], in_second[kept]])


def _shared(first: Crop, second: Crop, axis: int, patch_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along one axis, the voxels of the first patch that the second has too: their places in both, and in the crop."""
    # Centres of the first patch's voxels, in voxels from the beginning of the first crop.
    in_crop = (np.arange(patch_length) + 0.5) * first.augmentation.read_size[axis] / patch_length
    if first.augmentation.flips[axis]:
        in_crop = in_crop[::-1]
    from_second = in_crop + first.start[axis] - second.start[axis]
    read_length = second.augmentation.read_size[axis]
    shared = np.flatnonzero((from_second >= 0) & (from_second < read_length))
    in_second = np.minimum(np.floor(from_second[shared] * patch_length / read_length).astype(int), patch_length - 1)
    if second.augmentation.flips[axis]:
        in_second = patch_length - 1 - in_second
    return shared, in_second, np.floor(in_crop[shared]).astype(int)


def _is_body(crop: Tensor, places: np.ndarray) -> np.ndarray:
    """Whether voxels (N, 3) of a crop (C, X, Y, Z) are no background in one of its channels.

    Background is what is dark, and the one value that is put around a body where only that is normalised
    (`use_mask_for_norm`), which lies between the body's own.
    """
    low, high = intensity_range(crop)
    threshold = (low + _BODY * (high - low)).numpy()
    x, y, z = places.T
    values = crop.numpy()[:, x, y, z]
    around = np.stack([_value_around(channel) for channel in crop.numpy()])
    body: np.ndarray = ((values > threshold[:, None]) & (values != around[:, None])).any(axis=0)
    return body


def _value_around(channel: np.ndarray) -> np.floating:
    """The value that many voxels of a channel have exactly; NaN if there is none."""
    sample = channel.ravel()[:: spread_stride(channel.size, _SAMPLE)]
    values, counts = np.unique(sample, return_counts=True)
    most = counts.argmax()
    return values[most] if counts[most] > _MANY * len(sample) else np.float32(np.nan)
