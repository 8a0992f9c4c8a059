"""Patch swapping: number and size of the blocks, and what a swap keeps."""

from __future__ import annotations

import dataclasses

import blosc2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_misfm.plans.settings import SettingsError, read_settings
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import validation_samples
from nnunetv2_misfm.pretrain.patch_swap import (
    PatchSwap,
    PatchSwapSettings,
    Swaps,
    apply_swaps,
    sample_swaps,
)
from nnunetv2_misfm.pretrain.reconstruction import standardised
from nnunetv2_misfm.pretrain.task import Scores

PATCH = (64, 128, 128)
SETTINGS = PatchSwapSettings()


def swaps(*pairs: tuple[tuple[int, int, int], tuple[int, int, int]], size: tuple[int, int, int]) -> Swaps:
    first, second = zip(*pairs, strict=True)
    return Swaps(np.array(first), np.array(second), size)


def swapped(crops: torch.Tensor, *drawn: Swaps) -> torch.Tensor:
    """A copy of the crops with their blocks swapped."""
    copy = crops.clone()
    apply_swaps(copy, drawn)
    return copy


def test_number_and_size_of_blocks_are_the_published_ones():
    drawn = [sample_swaps(PATCH, SETTINGS, np.random.default_rng(i)) for i in range(500)]
    counts = [len(d.first) for d in drawn]
    assert {d.size for d in drawn} == {(8, 16, 16)}
    assert min(counts) == 20 and max(counts) == 40 and np.mean(counts) == pytest.approx(30, abs=1)
    starts = np.concatenate([np.concatenate([d.first, d.second]) for d in drawn])
    assert starts.min(0).tolist() == [0, 0, 0] and starts.max(0).tolist() == [56, 112, 112]
    assert starts.mean(0) == pytest.approx([28, 56, 56], abs=1)


@pytest.mark.parametrize(("patch", "size"), [((160, 160, 160), (20, 20, 20)), ((16, 320, 256), (2, 40, 32))])
def test_blocks_scale_with_the_patch(patch, size):
    assert sample_swaps(patch, SETTINGS, np.random.default_rng(0)).size == size


@given(shape=st.tuples(*[st.integers(1, 40)] * 3), share=st.floats(0.01, 0.5), seed=st.integers(0, 2**32))
def test_blocks_of_a_pair_lie_apart_within_any_patch(shape, share, seed):
    settings = PatchSwapSettings(num_swaps=(1, 5), swap_size=(share, share, share))
    drawn = sample_swaps(shape, settings, np.random.default_rng(seed))
    assert (len(drawn.first) == 0) == (max(shape) == 1)
    for starts in (drawn.first, drawn.second):
        assert (starts >= 0).all() and (starts + drawn.size <= shape).all()
    assert (np.abs(drawn.first - drawn.second) >= drawn.size).any(axis=1).all()


def test_two_blocks_change_places():
    crop = torch.arange(60.0).view(1, 1, 3, 4, 5)
    drawn = swaps(((0, 0, 0), (2, 2, 3)), size=(1, 2, 2))
    expected = crop.clone()
    expected[..., 0, 0:2, 0:2], expected[..., 2, 2:4, 3:5] = crop[..., 2, 2:4, 3:5], crop[..., 0, 0:2, 0:2]
    assert torch.equal(swapped(crop, drawn), expected)


def test_a_later_swap_moves_what_an_earlier_one_left():
    crop = torch.arange(4.0).view(1, 1, 1, 1, 4)
    drawn = swaps(((0, 0, 0), (0, 0, 1)), ((0, 0, 1), (0, 0, 3)), size=(1, 1, 1))
    assert swapped(crop, drawn).flatten().tolist() == [1, 3, 2, 0]


@given(shape=st.tuples(*[st.integers(1, 24)] * 3), seed=st.integers(0, 2**32))
def test_swaps_keep_every_value_and_channels_together(shape, seed):
    crop = torch.arange(float(np.prod(shape))).view(1, 1, *shape)
    crops = torch.cat([crop, crop + 0.5], dim=1)
    after = swapped(crops, sample_swaps(shape, SETTINGS, np.random.default_rng(seed)))
    assert torch.equal(after[0, 0].flatten().sort().values, crop.flatten())
    assert torch.equal(after[:, 1], after[:, 0] + 0.5)


def test_every_crop_of_a_batch_has_its_own_swaps():
    crops = torch.rand((2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    drawn = [sample_swaps((8, 8, 8), SETTINGS, np.random.default_rng(i)) for i in range(2)]
    together = swapped(crops, *drawn)
    assert all(torch.equal(together[i : i + 1], swapped(crops[i : i + 1], drawn[i])) for i in range(2))


def test_as_much_changes_as_in_the_published_code():
    # PyMIC's PatchSwaping: .109 of the voxels of such a crop, with a standard deviation of .020.
    crops = torch.rand((1, 1, *PATCH), generator=torch.Generator().manual_seed(0))
    changed = [
        (swapped(crops, sample_swaps(PATCH, SETTINGS, np.random.default_rng(i))) != crops).float().mean().item()
        for i in range(50)
    ]
    assert np.mean(changed) == pytest.approx(0.109, abs=0.011) and np.std(changed) == pytest.approx(0.020, abs=0.008)


def test_the_loss_is_of_all_voxels_and_the_score_the_share_of_the_swaps_undone(tmp_path):
    task = PatchSwap(SETTINGS)
    volume = np.random.default_rng(0).random((2, 20, 20, 20)).astype(np.float32)
    blosc2.asarray(volume, urlpath=str(tmp_path / "0.b2nd"), mode="w")
    batch = next(crop_loader(validation_samples(tmp_path, ["0"], (16, 16, 16), task, 0, 2), 3, 1))
    x, target = task.make(batch, torch.device("cpu"))
    copied = standardised(x, None)  # swaps keep all values, so this is the target with its blocks swapped
    assert task.loss(copied, target).item() == pytest.approx((copied - target.image).abs().mean().item())

    def score(output):
        return task.scores(task.count(output, target)).main

    assert score(copied) == pytest.approx(0, abs=1e-4) and score(target.image) == 1
    assert score((copied + target.image) / 2) == pytest.approx(0.75, abs=1e-4)
    # A blur, here the mean, is worse than the input, though it has less error in the swapped blocks.
    assert score(torch.zeros_like(copied)) < -1


def test_a_network_that_copies_its_input_for_long_is_told_of():
    copied = Scores(0.0, [0.0], {"swaps_undone": 0.0, "variance_explained": 0.8, "output_variance": 1.0}, "")
    (alarm,) = PatchSwap(SETTINGS).alarms([0.3] * 10, copied)
    assert "has not moved in 10 epochs" in alarm and "no better than the input as it is" in alarm
    assert PatchSwap(SETTINGS).alarms([0.3] * 10, dataclasses.replace(copied, main=0.1)) == []


@pytest.mark.parametrize("view", [lambda t: t[:, 1:, 2:, :, 1:], lambda t: t.transpose(2, 4)], ids=["part", "turned"])
def test_swaps_of_a_view_touch_nothing_else(view):
    crops = torch.rand((2, 3, 10, 8, 9), generator=torch.Generator().manual_seed(0))
    drawn = [sample_swaps(view(crops).shape[2:], SETTINGS, np.random.default_rng(i)) for i in range(2)]
    changed, expected = crops.clone(), crops.clone()
    apply_swaps(view(changed), drawn)
    view(expected).copy_(swapped(view(crops).contiguous(), *drawn))
    assert torch.equal(changed, expected) and not torch.equal(changed, crops)


def test_a_batch_can_be_made_twice(tmp_path):
    """What is swapped in place is not the batch."""
    task = PatchSwap(SETTINGS)
    volume = np.random.default_rng(0).random((1, 20, 20, 20)).astype(np.float32)
    blosc2.asarray(volume, urlpath=str(tmp_path / "0.b2nd"), mode="w")
    batch = next(crop_loader(validation_samples(tmp_path, ["0"], (16, 16, 16), task, 0, 1), 2, 1))
    (x, target), (again, target_again) = (task.make(batch, torch.device("cpu")) for _ in range(2))
    assert torch.equal(x, again) and torch.equal(target.image, target_again.image)
    assert not torch.allclose(standardised(x, None), target.image)


def test_blocks_of_more_than_half_a_patch_are_refused():
    with pytest.raises(SettingsError, match="swap_size"):
        read_settings(PatchSwapSettings, {"swap_size": [0.1, 0.1, 0.6]}, "patch_swap")
