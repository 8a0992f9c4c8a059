"""Reading one crop of one preprocessed case.

Crops are (C, X, Y, Z) in plans axis order, so X is the depth.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.pretrain.augment import CropAugmentation, Size3, spread_stride

# A crop with this share of voxels of one value is mostly air: others are tried, and the least constant one is used.
MOSTLY_CONSTANT = 0.9
MAX_READS_PER_CROP = 4


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a volume.

    Attributes:
        voxels: float32 (C, *augmentation.read_size).
        augmentation: what is to be done with them.
        start: of the crop in the volume, in its voxels (X, Y, Z); below 0 where it is padded.
    """

    voxels: Tensor
    augmentation: CropAugmentation
    start: Size3


def case_file(folder: Path, identifier: str) -> Path:
    """The file that holds a case: nnU-Net's `.b2nd`, or before 2.6 `.npz`, which its training unpacks to `.npy`."""
    files = [folder / f"{identifier}{ending}" for ending in (".b2nd", ".npy", ".npz")]
    return next((file for file in files if file.exists()), files[0])


def open_case(path: Path, num_channels: int) -> blosc2.NDArray | np.ndarray:
    """Open a file of shape (C, X, Y, Z), without reading voxels unless it is a `.npz`.

    Raises:
        ValueError: if it holds something else or has another number of channels.
        OSError, RuntimeError: and whatever else blosc2 raises for files that are missing, cut off or damaged.
    """
    # Memory mapping halves the time of a read, but does not work on Windows; nnU-Net decides the same way.
    mapping = {} if os.name == "nt" else {"mmap_mode": "r"}
    if path.suffix == ".b2nd":
        volume = blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, **mapping)
    else:
        volume = np.load(path, mmap_mode="r")
        volume = volume if isinstance(volume, np.ndarray) else volume["data"]
    if not isinstance(volume, (blosc2.NDArray, np.ndarray)) or volume.ndim != 4:
        raise ValueError("it does not hold an array of four axes (C, X, Y, Z)")
    if volume.shape[0] != num_channels:
        raise ValueError(f"it has {volume.shape[0]} channels, not {num_channels}")
    return volume


def read_crop(
    volume: blosc2.NDArray | np.ndarray,
    augmentation: CropAugmentation,
    patch_size: Sequence[int],
    generator: np.random.Generator,
    beside: Crop | None = None,
    overlap: Sequence[int] = (0, 0, 0),
) -> Crop:
    """Read a crop at a random place; other places are tried while it is mostly of one value.

    Args:
        volume: (C, X, Y, Z).
        augmentation: what the crop is for.
        patch_size: (X, Y, Z) in voxels.
        generator: of the place.
        beside: another crop of the volume. All places are equally likely that share `overlap` voxels of the patch with
            it on each axis; where slices are averaged, they are the same slices if the volume has room for that.
        overlap: (X, Y, Z), at most the patch size.

    The read size shrinks where it exceeds both the volume and an unscaled crop. What still reaches beyond the volume is
    padded, each channel with its minimum in the crop.

    Raises:
        ValueError: if voxels are not finite numbers.
        RuntimeError: and whatever else blosc2 raises for damaged files.
    """
    shape = np.array(volume.shape[1:])
    augmentation = _fit_to_volume(augmentation, shape, patch_size)
    size = np.array(augmentation.read_size)
    room = shape - size
    share = np.array(overlap) / patch_size
    origin, step, fewest, most = _places(room, size, augmentation, beside, share)
    tries = []
    for _ in range(MAX_READS_PER_CROP if (room > 0).any() else 1):
        start = origin + step * generator.integers(fewest, most, endpoint=True)
        start = np.clip(start, np.minimum(room, 0), np.maximum(room, 0))
        inside, stop = np.maximum(start, 0), np.minimum(start + size, shape)
        crop = volume[(slice(None), *map(slice, inside.tolist(), stop.tolist()))]
        crop = np.require(crop, np.float32, ["OWNDATA"])  # a memory-mapped one is read now, not later
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(crop.sum()):
                raise ValueError("it has voxels that are not finite numbers")
        constant = _share_of_one_value(crop)
        tries.append((constant, crop, start))
        if constant < MOSTLY_CONSTANT:
            break
    _, crop, start = min(tries, key=lambda t: t[0])
    if (room < 0).any():
        offset = np.maximum(start, 0) - start
        low, high = offset.tolist(), (offset + crop.shape[1:]).tolist()
        augmentation = dataclasses.replace(augmentation, inside=(tuple(low), tuple(high)))
        crop = _padded(crop, size, offset)
    x, y, z = start.tolist()
    return Crop(torch.from_numpy(crop), augmentation, (x, y, z))


def _padded(crop: np.ndarray, size: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """A larger array with the crop (C, X, Y, Z) at an offset, around it each channel's minimum."""
    padded = np.empty((len(crop), *size.tolist()), np.float32)
    padded[:] = crop.min(axis=(1, 2, 3), keepdims=True)
    padded[(slice(None), *map(slice, offset.tolist(), (offset + crop.shape[1:]).tolist()))] = crop
    return padded


def _places(
    room: np.ndarray, size: np.ndarray, augmentation: CropAugmentation, beside: Crop | None, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where a crop may start: an origin and a step in voxels, and the fewest and most steps from the origin."""
    lowest, highest = np.minimum(room, 0), np.maximum(room, 0)
    if beside is None:
        return lowest, np.ones(3, int), np.zeros(3, int), highest - lowest
    origin, step = np.array(beside.start), np.array((augmentation.slices_averaged, 1, 1))
    size_beside = np.array(beside.augmentation.read_size)
    shared = np.ceil(share * np.minimum(size, size_beside) / step - 1e-9).astype(int) * step
    fewest = -((origin - np.maximum(lowest, origin - size + shared)) // step)
    most = (np.minimum(highest, origin + size_beside - shared) - origin) // step
    return origin, step, fewest, np.maximum(most, fewest)


def _fit_to_volume(augmentation: CropAugmentation, shape: np.ndarray, patch_size: Sequence[int]) -> CropAugmentation:
    """Magnify a small volume rather than pad it: only what an unscaled crop lacks is padded."""
    averaged = augmentation.slices_averaged
    unscaled = np.array(patch_size) * (averaged, 1, 1)
    limit = np.maximum(shape, unscaled)
    limit[0] -= limit[0] % averaged
    x, y, z = np.minimum(augmentation.read_size, limit).tolist()
    return dataclasses.replace(augmentation, read_size=(x, y, z))


def _share_of_one_value(crop: np.ndarray) -> float:
    """The largest share of voxels close to one value, in the channel where it is smallest; from a sample of voxels."""
    shares = []
    for channel in crop:
        sample = channel.ravel()[:: spread_stride(channel.size, 4096)]
        near = np.abs(sample - np.median(sample)) <= 1e-3 * (sample.max() - sample.min())
        shares.append(float(near.mean()))
    return min(shares)
