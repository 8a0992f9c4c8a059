"""Augmentation of crops: each transform alone, and what all of them must keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nnunetv2_misfm.plans.settings import SettingsError, read_settings, write_settings
from nnunetv2_misfm.pretrain.augment import (
    CropAugmentation,
    apply_augmentation,
    sample_augmentation,
)
from nnunetv2_misfm.pretrain.settings import AugmentSettings

PATCH = (6, 8, 10)
EVERYTHING = AugmentSettings(
    inversion_probability=0.5, brightness_probability=1.0, blur_probability=1.0, noise_probability=1.0
)


def random_crop(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def augmented(crop: torch.Tensor, patch_size: tuple[int, int, int] | None = None, **changes) -> torch.Tensor:
    """One crop through `apply_augmentation`, with everything off but `changes`."""
    x, y, z = crop.shape[1:]
    return apply_augmentation([crop], [CropAugmentation((x, y, z), **changes)], patch_size or (x, y, z))[0]


def test_settings_off_change_nothing():
    augmentation = sample_augmentation(PATCH, AugmentSettings.off(), np.random.default_rng(0), num_channels=2)
    crop = random_crop(2, *PATCH)
    assert augmentation.read_size == PATCH
    assert torch.equal(apply_augmentation([crop], [augmentation], PATCH)[0], crop)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_flip_turns_its_own_axis(axis):
    crop = random_crop(2, *PATCH)
    flips = tuple(i == axis for i in range(3))
    assert torch.equal(augmented(crop, flips=flips), crop.flip(axis + 1))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resizing_keeps_a_ramp_along_its_axis(axis):
    read = (12, 16, 20)
    shape = [1, 1, 1, 1]
    shape[axis + 1] = read[axis]
    crop = torch.arange(read[axis], dtype=torch.float32).view(shape).expand(1, *read)
    result = augmented(crop, PATCH)
    expected = torch.arange(PATCH[axis]) * 2 + 0.5  # a voxel of the patch lies between two of the crop
    assert result.shape == (1, *PATCH)
    assert torch.allclose(result.transpose(axis + 1, 3), expected.float())


def test_slices_are_averaged_along_depth_only():
    crop = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert augmented(crop, (2, 2, 2), slices_averaged=2)[0, :, 0, 0].tolist() == [2.0, 20.0]


def test_contrast_clips_to_the_percentiles_and_stretches_to_the_range():
    crop = torch.arange(1001.0).view(1, 7, 11, 13)
    result = augmented(crop, percentiles=((2.0, 98.0),)).flatten()
    assert result[:21].unique().tolist() == [1.0] and result[980:].unique().tolist() == [999.0]
    assert torch.allclose(result[20:981], torch.linspace(1, 999, 961), atol=1e-3)


def test_contrast_percentiles_do_not_depend_on_which_voxels_are_sampled():
    crop = random_crop(1, 64, 64, 64)
    result = augmented(crop, percentiles=((2.0, 98.0),))
    low, high = np.percentile(crop.numpy(), [2, 98])
    assert (result == result.min()).float().mean() == pytest.approx(0.02, abs=0.005)
    assert (result == result.max()).float().mean() == pytest.approx(0.02, abs=0.005)
    inside = (crop > low + 0.1) & (crop < high - 0.1)
    slope = (result[inside].max() - result[inside].min()) / (crop[inside].max() - crop[inside].min())
    assert 1.0 < slope < 2.0


def test_gamma_bends_intensities_within_their_range():
    crop = torch.linspace(-3, 5, 1000).view(1, 10, 10, 10)
    expected = ((crop + 3) / 8) ** 1.4 * 8 - 3
    assert torch.allclose(augmented(crop, gamma=(1.4,)), expected, atol=1e-5)


def test_gamma_of_1_and_full_range_change_nothing():
    crop = random_crop(1, *PATCH)
    assert torch.allclose(augmented(crop, gamma=(1.0,)), crop, atol=1e-5)


def test_inversion_mirrors_the_range():
    crop = random_crop(1, *PATCH)
    assert torch.allclose(augmented(crop, invert=True), crop.max() + crop.min() - crop, atol=1e-5)


def test_brightness_adds_a_share_of_the_range():
    crop = torch.linspace(10, 30, 480).view(1, *PATCH)
    assert torch.allclose(augmented(crop, brightness=(0.1,)), crop + 2, atol=1e-4)


def test_blur_spreads_a_voxel_evenly_along_all_axes():
    crop = torch.zeros((1, 9, 9, 9))
    crop[0, 4, 4, 4] = 1
    result = augmented(crop, blur_sigma=0.8)[0]
    assert result.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(result, result.permute(2, 0, 1), atol=1e-7)
    assert torch.allclose(result, result.flip(0), atol=1e-7)
    assert result[4, 4, 5] / result[4, 4, 4] == pytest.approx(np.exp(-0.5 / 0.8**2), rel=1e-4)


def test_noise_depends_on_its_seed_alone():
    crop = random_crop(1, *PATCH)
    first = augmented(crop, noise_std=0.1, noise_seed=5)
    batch = [CropAugmentation(PATCH, noise_std=0.1, noise_seed=seed) for seed in (9, 5)]
    other, again = apply_augmentation([crop, crop], batch, PATCH)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_is_a_share_of_the_range():
    crop = torch.linspace(0, 50, 27000).view(1, 30, 30, 30)
    noise = augmented(crop, noise_std=0.02) - crop
    assert noise.std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("value", [0.0, -1000.0, 1e-30, 3e8])
def test_constant_crops_stay_as_they_are(value):
    for seed in range(10):
        augmentation = sample_augmentation(PATCH, EVERYTHING, np.random.default_rng(seed), num_channels=1)
        result = apply_augmentation([torch.full((1, *augmentation.read_size), value)], [augmentation], PATCH)
        assert torch.allclose(result, torch.full_like(result, value), rtol=1e-5)


def test_a_few_bright_voxels_in_air_survive():
    crop = torch.full((1, 20, 20, 20), -1.0)
    crop[0, :2, :2, :2] = 1.0
    result = augmented(crop, percentiles=((2.0, 98.0),), gamma=(0.7,))
    assert torch.allclose(result, crop)


def test_intensities_stay_in_the_range_of_the_crop():
    settings = EVERYTHING.model_copy(update={"noise_probability": 0.0, "brightness_probability": 0.0})
    for seed in range(20):
        augmentation = sample_augmentation((16, 16, 16), settings, np.random.default_rng(seed), num_channels=1)
        crop = random_crop(1, *augmentation.read_size, seed=seed) * 100 + 40
        result = apply_augmentation([crop], [augmentation], (16, 16, 16))
        assert crop.min() - 1e-3 <= result.min() and result.max() <= crop.max() + 1e-3


def test_channels_are_treated_alone():
    augmentation = sample_augmentation(PATCH, EVERYTHING, np.random.default_rng(3), num_channels=2)
    augmentation = dataclasses.replace(augmentation, noise_std=None)
    crop = random_crop(2, *augmentation.read_size)
    both = apply_augmentation([crop], [augmentation], PATCH)[0]
    for index in range(2):
        per_channel = {
            name: getattr(augmentation, name)[index : index + 1] for name in ("percentiles", "gamma", "brightness")
        }
        alone = apply_augmentation(
            [crop[index : index + 1]], [dataclasses.replace(augmentation, **per_channel)], PATCH
        )[0]
        assert torch.equal(alone[0], both[index])


@pytest.mark.parametrize("patch_size", [(1, 1, 1), (1, 40, 33), (3, 5, 2), (40, 56, 40)])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_any_patch_size_and_number_of_channels(patch_size, num_channels):
    generator = np.random.default_rng(0)
    drawn = [sample_augmentation(patch_size, EVERYTHING, generator, num_channels) for _ in range(4)]
    crops = [random_crop(num_channels, *augmentation.read_size) for augmentation in drawn]
    result = apply_augmentation(crops, drawn, patch_size)
    assert result.shape == (4, num_channels, *patch_size)
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_crops_of_any_precision_become_float32_and_are_left_alone(dtype):
    crop = random_crop(1, *PATCH).to(dtype)
    before = crop.clone()
    result = augmented(crop, gamma=(0.8,), noise_std=0.1, percentiles=((1.0, 99.0),))
    assert result.dtype == torch.float32
    assert torch.equal(crop, before)


def test_read_sizes_cover_the_range_of_scales():
    generator = np.random.default_rng(0)
    drawn = [sample_augmentation((100, 100, 100), AugmentSettings(), generator, 1) for _ in range(300)]
    sizes = np.array([augmentation.read_size for augmentation in drawn])
    assert 70 <= sizes.min() <= 72 and 148 <= sizes.max() <= 150


def test_anisotropy_reads_deeper_by_a_power_of_two():
    for seed in range(20):
        flat, thick = (
            sample_augmentation((16, 32, 32), AugmentSettings(), np.random.default_rng(seed), 1, anisotropy)
            for anisotropy in (0, 2)
        )
        assert thick.read_size == (4 * flat.read_size[0], *flat.read_size[1:])
        assert thick.slices_averaged == 4


def test_the_same_generator_gives_the_same_augmentation():
    first, again = (sample_augmentation(PATCH, EVERYTHING, np.random.default_rng(1), 2) for _ in range(2))
    assert first == again


def test_a_crop_of_another_size_than_was_drawn_is_an_error():
    with pytest.raises(ValueError, match="read size"):
        apply_augmentation([torch.zeros((1, 4, 4, 4))], [CropAugmentation((4, 4, 5))], PATCH)


def test_settings_survive_json():
    settings = AugmentSettings(gamma=(0.9, 1.1), noise_probability=0.0)
    assert read_settings(AugmentSettings, write_settings(settings), "augmentation") == settings


def test_all_bad_settings_are_reported_together():
    values = {"scale": [1.5, 0.7], "flip_probability": 2, "gamma": 1.0, "noise_std": [-1, 0], "blur": [1, 2]}
    with pytest.raises(SettingsError) as error:
        read_settings(AugmentSettings, values, "augmentation")
    assert len(error.value.problems) == len(values)


def test_percentile_ranges_that_meet_are_an_error():
    with pytest.raises(SettingsError, match="must begin above the end of low_percentiles"):
        read_settings(AugmentSettings, {"low_percentiles": [0, 50], "high_percentiles": [50, 100]}, "augmentation")


def test_switched_off_nothing_is_drawn():
    off = AugmentSettings.off()
    assert {getattr(off, name) for name in AugmentSettings.model_fields if name.endswith("_probability")} == {0.0}
