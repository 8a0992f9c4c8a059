"""The masked autoencoder: which voxels are hidden, which ones count, and what a score means."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunetv2_misfm.plans.settings import SettingsError, read_settings
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import validation_samples
from nnunetv2_misfm.pretrain.masked_autoencoder import (
    MaskedAutoencoder,
    MaskSettings,
    block_size,
    sample_mask,
    voxel_masks,
)
from nnunetv2_misfm.pretrain.reconstruction import Target, standardised
from nnunetv2_misfm.pretrain.task import Scores

PUBLISHED = (160, 160, 160)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mask(patch: tuple[int, int, int], settings: MaskSettings, seed: int = 0) -> torch.Tensor:
    return voxel_masks([sample_mask(patch, settings, generator(seed))], patch, settings, "cpu")


def test_at_the_published_patch_the_blocks_and_their_share_are_the_published_ones() -> None:
    assert block_size(PUBLISHED, MaskSettings()) == (16, 16, 16)
    drawn = sample_mask(PUBLISHED, MaskSettings(), generator())
    assert drawn.shape == (10, 10, 10) and drawn.sum() == 750
    assert float(mask(PUBLISHED, MaskSettings()).float().mean()) == 0.75


@pytest.mark.parametrize(("patch", "size"), [((64, 128, 128), (6, 13, 13)), ((4, 16, 9), (1, 2, 1))])
def test_blocks_scale_with_the_patch(patch: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    assert block_size(patch, MaskSettings()) == size
    hidden = mask(patch, MaskSettings())
    assert hidden.shape == (1, 1, *patch) and hidden.dtype == torch.bool
    starts = [torch.arange(n) // s * s for n, s in zip(patch, size, strict=True)]
    of_block = hidden[0, 0][starts[0]][:, starts[1]][:, :, starts[2]]
    assert torch.equal(hidden[0, 0], of_block), "every voxel is as the first of its block"


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.99])
def test_the_share_of_blocks_is_exact_in_every_sample(ratio: float) -> None:
    settings = MaskSettings(mask_ratio=ratio)
    counts = {int(sample_mask((20, 40, 30), settings, generator(seed)).sum()) for seed in range(20)}
    assert counts == {round(ratio * 1000)}


def test_a_block_is_shown_wherever_there_are_several() -> None:
    settings = MaskSettings(mask_ratio=0.99, mask_block_size=(0.5, 0.5, 0.5))
    assert sample_mask((8, 8, 8), settings, generator(0)).sum() == 7


def test_every_block_is_hidden_as_often_as_the_others() -> None:
    drawn = np.stack([sample_mask((40, 40, 40), MaskSettings(), generator(seed)) for seed in range(400)])
    rates = drawn.mean(0)
    assert abs(rates - 0.75).max() < 5 * (0.75 * 0.25 / 400) ** 0.5


def test_hidden_voxels_are_0_and_the_others_untouched(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).standard_normal((2, 24, 24, 24)).astype(np.float32)
    blosc2.asarray(volume, urlpath=str(tmp_path / "0.b2nd"), mode="w")
    task = MaskedAutoencoder(MaskSettings())
    batch = next(crop_loader(validation_samples(tmp_path, ["0"], (16, 20, 12), task, 0, 2), 3, 1))
    x, target = task.make(batch, torch.device("cpu"))
    hidden = target.counted.expand_as(x)
    (image,) = batch.patches("cpu")
    assert (x[hidden] == 0).all() and torch.equal(x[~hidden], image[~hidden])
    assert not torch.equal(target.counted[0], target.counted[1]), "samples have masks of their own"


def example() -> Target:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 6, 6, 6) * torch.tensor([1.0, 2.0, 5.0])[:, None, None, None] + 7
    return Target(standardised(image, None), torch.rand(2, 1, 6, 6, 6) < 0.7)


def score(target: Target, output: torch.Tensor) -> Scores:
    task = MaskedAutoencoder(MaskSettings())
    return task.scores(task.count(output, target))


def test_only_hidden_voxels_count() -> None:
    target = example()
    assert target.counted is not None
    elsewhere = torch.where(target.counted, target.image, torch.full_like(target.image, 100.0))
    assert MaskedAutoencoder(MaskSettings()).loss(elsewhere, target) == 0
    assert score(target, elsewhere).main == 1


def test_the_loss_is_the_mean_squared_error_of_hidden_voxels() -> None:
    target = example()
    output = torch.randn_like(target.image)
    assert target.counted is not None
    expected = [((output - target.image)[i][target.counted[i].expand(3, -1, -1, -1)] ** 2).mean() for i in range(2)]
    assert torch.allclose(MaskedAutoencoder(MaskSettings()).loss(output, target), torch.stack(expected).mean())


def test_a_score_of_0_is_the_mean_and_1_the_image() -> None:
    target = example()
    assert score(target, target.image).main == 1
    assert score(target, torch.zeros_like(target.image)).main == 0
    assert score(target, torch.ones_like(target.image)).main == pytest.approx(-1, abs=0.1)
    assert score(target, target.image / 2).main == pytest.approx(0.75, abs=1e-5)
    assert score(target, target.image / 2).values["output_variance"] == pytest.approx(0.25, abs=1e-2)


def test_alarms_name_an_output_without_structure_and_a_loss_that_stays() -> None:
    task, target = MaskedAutoencoder(MaskSettings()), example()
    flat = score(target, target.mean(target.image).expand_as(target.image))
    found = task.alarms([1.0] * 10, flat)
    assert "nearly the same at all voxels" in found[0] and "has not moved" in found[1]
    assert task.alarms([1.0] * 10, score(target, target.image)) == []
    assert task.alarms([1.0], flat) == []


def test_defaults_are_the_published_optimisation() -> None:
    run, augmentation = MaskedAutoencoder.run_defaults, MaskedAutoencoder.augmentation_defaults
    assert (run.optimizer, run.initial_lr, run.weight_decay, run.schedule) == ("sgd", 1e-2, 3e-5, "poly")
    assert (augmentation.scale, augmentation.scale_probability, augmentation.flip_probability) == ((0.7, 1.4), 0.2, 0.5)
    assert augmentation.gamma_probability == augmentation.contrast_probability == augmentation.noise_probability == 0


@pytest.mark.parametrize(
    "values", [{"mask_ratio": 1.0}, {"mask_block_size": [0.1, 0.1, 1.5]}, {"mask_block_size": [0, 1, 1]}]
)
def test_impossible_masks_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(values))):
        read_settings(MaskSettings, values, "The options")
