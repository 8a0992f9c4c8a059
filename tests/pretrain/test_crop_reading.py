"""A crop is a part of its volume in axis order, whatever the two shapes are."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_misfm.pretrain.augment import CropAugmentation
from nnunetv2_misfm.pretrain.crop_reading import case_file, open_case, read_crop

sizes = st.tuples(*[st.integers(1, 24)] * 3)


def numbered(shape: tuple[int, int, int]) -> np.ndarray:
    """Two channels (C, X, Y, Z) in which no voxel is like another; the second is the first, negated."""
    channel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return np.stack([channel, -channel])


@given(shape=sizes, read_size=sizes, patch=sizes, seed=st.integers(0, 2**32))
def test_a_crop_is_a_part_of_its_volume_and_its_minimum_beyond(shape, read_size, patch, seed):
    volume = numbered(shape)
    crop = read_crop(blosc2.asarray(volume), CropAugmentation(read_size), patch, np.random.default_rng(seed))
    voxels, size = crop.voxels.numpy(), crop.augmentation.read_size
    assert voxels.shape == (2, *size)
    # It shrinks only where it exceeds both the volume and an unscaled crop.
    assert size == tuple(np.minimum(read_size, np.maximum(shape, patch)).tolist())
    # The last voxel of the volume that the crop holds says where the crop lies.
    at = np.unravel_index(voxels[0].argmax(), size)
    start = np.array(np.unravel_index(int(voxels[0].max()), shape)) - at
    first, stop = np.maximum(start, 0), np.minimum(start + size, shape)
    inside = volume[(slice(None), *map(slice, first, stop))]
    expected = np.empty_like(voxels)
    expected[:] = inside.min(axis=(1, 2, 3), keepdims=True)
    expected[(slice(None), *map(slice, first - start, stop - start))] = inside
    np.testing.assert_array_equal(voxels, expected)


@given(shape=sizes, read_size=sizes, seed=st.integers(0, 2**32))
def test_slices_are_averaged_in_whole_groups(shape, read_size, seed):
    deep = (4 * read_size[0], *read_size[1:])
    augmentation = CropAugmentation(deep, slices_averaged=4)
    crop = read_crop(blosc2.asarray(numbered(shape)), augmentation, read_size, np.random.default_rng(seed))
    assert crop.voxels.shape[1] % 4 == 0


@pytest.mark.parametrize("unpacked", [False, True])
def test_older_arrays_of_nnunet_give_the_same_crops(tmp_path: Path, unpacked: bool) -> None:
    volume = numbered((20, 22, 24))
    np.savez(tmp_path / "case.npz", data=volume, seg=np.zeros_like(volume))
    if unpacked:  # as nnU-Net's training leaves them
        np.save(tmp_path / "case.npy", volume)
    path = case_file(tmp_path, "case")
    assert path.suffix == (".npy" if unpacked else ".npz")
    augmentation = CropAugmentation((8, 8, 8))
    now, before = (
        read_crop(opened, augmentation, (8, 8, 8), np.random.default_rng(3)).voxels
        for opened in (blosc2.asarray(volume), open_case(path, 2))
    )
    assert torch.equal(now, before)
    with pytest.raises(ValueError, match="2 channels, not 1"):
        open_case(path, 1)


def coordinates(shape: tuple[int, int, int]) -> np.ndarray:
    """A volume of three channels, in which every voxel holds its place."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def test_the_place_of_a_crop_is_told() -> None:
    volume = coordinates((20, 24, 22))
    for seed in range(10):
        crop = read_crop(volume, CropAugmentation((8, 10, 12)), (8, 10, 12), np.random.default_rng(seed))
        assert tuple(crop.voxels[:, 0, 0, 0].tolist()) == crop.start
    small = read_crop(coordinates((4, 24, 22)), CropAugmentation((8, 10, 12)), (8, 10, 12), np.random.default_rng(0))
    assert small.start[0] <= 0 and small.voxels[0, -small.start[0], 0, 0] == 0


@pytest.mark.parametrize("averaged", [1, 2])
def test_crops_beside_each_other_share_what_is_asked_for(averaged: int) -> None:
    """Every distance that leaves enough in common is found, and slices that are averaged are the same in both."""
    patch, overlap = (8, 10, 12), (6, 5, 12)
    volume = coordinates((40, 24, 30))
    augmentation = CropAugmentation((8 * averaged, 10, 12), slices_averaged=averaged)
    seen = set()
    for seed in range(300):
        generator = np.random.default_rng(seed)
        first = read_crop(volume, augmentation, patch, generator)
        second = read_crop(volume, augmentation, patch, generator, beside=first, overlap=overlap)
        assert tuple(second.voxels[:, 0, 0, 0].tolist()) == second.start
        distance = np.subtract(second.start, first.start)
        assert distance[0] % averaged == 0
        seen.add(tuple((distance // (averaged, 1, 1)).tolist()))
    assert {x for x, _, _ in seen} == {-2, -1, 0, 1, 2}
    assert {y for _, y, _ in seen} == set(range(-5, 6)) and {z for _, _, z in seen} == {0}


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_crops_that_are_resized_share_as_large_a_part_of_the_patch(scale: float) -> None:
    patch, overlap = (8, 12, 16), (6, 6, 16)
    size = tuple(round(n * scale) for n in patch)
    augmentation = CropAugmentation((size[0], size[1], size[2]))
    volume, smallest = coordinates((40, 40, 40)), np.full(3, np.inf)
    for seed in range(200):
        generator = np.random.default_rng(seed)
        first = read_crop(volume, augmentation, patch, generator)
        second = read_crop(volume, augmentation, patch, generator, beside=first, overlap=overlap)
        smallest = np.minimum(smallest, 1 - np.abs(np.subtract(second.start, first.start)) / size)
    assert smallest.tolist() == [0.75, 0.5, 1.0]


def test_crops_beside_each_other_in_a_volume_without_room() -> None:
    generator = np.random.default_rng(0)
    volume = coordinates((6, 10, 12))
    first, second = (CropAugmentation(size) for size in ((8, 10, 12), (6, 9, 12)))
    for _ in range(20):
        one = read_crop(volume, first, (8, 10, 12), generator)
        other = read_crop(volume, second, (8, 10, 12), generator, beside=one, overlap=(8, 10, 12))
        assert other.voxels.shape[1:] == (6, 9, 12) and other.voxels.isfinite().all()


@pytest.mark.parametrize("averaged", [1, 2])
def test_crops_of_different_sizes_beside_each_other_stay_in_the_volume(averaged: int) -> None:
    """Where two crops cannot both begin at the same slices, the second one's are all there nevertheless."""
    generator = np.random.default_rng(0)
    volume, patch = coordinates((21, 14, 16)), (8, 10, 12)
    for _ in range(300):
        depths, heights = generator.integers(8, 12, 2), generator.integers(9, 15, 2)
        one, two = (
            CropAugmentation((int(depth) * averaged, int(height), 12), slices_averaged=averaged)
            for depth, height in zip(depths, heights, strict=True)
        )
        first = read_crop(volume, one, patch, generator)
        second = read_crop(volume, two, patch, generator, beside=first, overlap=(6, 8, 10))
        assert second.voxels.shape[1:] == second.augmentation.read_size
        assert tuple(second.voxels[:, 0, 0, 0].tolist()) == second.start
