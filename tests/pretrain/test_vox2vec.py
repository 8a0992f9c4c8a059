"""vox2vec: which voxels are matched, how crops are changed, the loss and the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.pretrain.augment import CropAugmentation, apply_augmentation
from nnunetv2_misfm.pretrain.batches import CropBatch, crop_loader
from nnunetv2_misfm.pretrain.crop_reading import Crop
from nnunetv2_misfm.pretrain.crops import CropSamples
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.shared_voxels import sample_points
from nnunetv2_misfm.pretrain.task import PretextNetwork
from nnunetv2_misfm.pretrain.vox2vec import (
    Matches,
    Projection,
    ViewChanges,
    Vox2Vec,
    Vox2VecSettings,
    change_intensities,
    encoder_channels,
    encoder_maps,
    info_nce,
    overlap_voxels,
    retrieved,
    sample_changes,
    voxel_vectors,
)

SETTINGS = Vox2VecSettings()


def cut(volume: torch.Tensor, start=(0, 0, 0), size=(8, 8, 8), **changes) -> Crop:
    """A crop of (C, X, Y, Z) as it would be read."""
    stops = np.add(start, size).tolist()
    return Crop(volume[(slice(None), *map(slice, start, stops))], CropAugmentation(size, **changes), start)


def volume_of_positions(shape: tuple[int, int, int]) -> torch.Tensor:
    """(3, X, Y, Z): where each voxel is."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))


def patches_of(crops: Sequence[Crop], patch_size: tuple[int, int, int]) -> torch.Tensor:
    return apply_augmentation([crop.voxels for crop in crops], [crop.augmentation for crop in crops], patch_size)


def at(patch: torch.Tensor, points: np.ndarray) -> torch.Tensor:
    """(C, N) values of (C, X, Y, Z) at (N, 3) points."""
    x, y, z = torch.from_numpy(points).unbind(1)
    return patch[:, x, y, z]


def random_unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---------------------------------------------------------------- matched voxels


def test_crops_share_at_least_three_quarters_of_each_axis():
    assert overlap_voxels((64, 128, 128), SETTINGS) == (48, 96, 96)
    assert overlap_voxels((8, 8, 8), SETTINGS) == (6, 6, 6)
    assert overlap_voxels((1, 5, 10), SETTINGS) == (1, 4, 8)


flips = st.tuples(*[st.booleans()] * 3)
small = st.tuples(*[st.integers(0, 2)] * 3)


@given(both_flips=st.tuples(flips, flips), starts=st.tuples(small, small), seed=st.integers(0, 2**32))
def test_matched_voxels_are_the_same_voxel_of_the_volume(both_flips, starts, seed):
    patch = (6, 7, 8)
    volume = volume_of_positions((12, 12, 12))
    crops = [cut(volume, start, patch, flips=flip) for start, flip in zip(starts, both_flips, strict=True)]
    points = sample_points(*crops, patch, 64, np.random.default_rng(seed))
    assert points.shape == (2, 64, 3) and len(np.unique(points[0], axis=0)) == 64
    first, second = patches_of(crops, patch)
    assert torch.equal(at(first, points[0]), at(second, points[1]))


@given(
    sizes=st.tuples(*[st.tuples(*[st.integers(6, 16)] * 3)] * 2), flips=st.tuples(flips, flips), seed=st.integers(0, 99)
)
def test_matched_voxels_of_resized_crops_lie_within_a_voxel(sizes, flips, seed):
    patch = (8, 8, 8)
    volume = volume_of_positions((20, 20, 20))
    crops = [
        cut(volume, (start, start, start), size, flips=flip)
        for start, size, flip in zip((1, 3), sizes, flips, strict=True)
    ]
    points = sample_points(*crops, patch, 50, np.random.default_rng(seed))
    assert points.min() >= 0 and points.max() < 8
    first, second = patches_of(crops, patch)
    # Half a voxel of the second patch; interpolation cuts off as much at the border of either patch.
    limit = 1 + max(max(size) for size in sizes) / 8
    assert (at(first, points[0]) - at(second, points[1])).abs().max() <= limit


def test_slices_that_are_averaged_are_matched_too():
    patch = (4, 4, 4)
    volume = volume_of_positions((16, 4, 4))
    crops = [cut(volume, (start, 0, 0), (8, 4, 4), slices_averaged=2) for start in (0, 4)]
    points = sample_points(*crops, patch, 1024, np.random.default_rng(0))
    first, second = patches_of(crops, patch)
    assert len(points[0]) == 2 * 4 * 4
    assert torch.equal(at(first, points[0]), at(second, points[1]))


def test_only_voxels_of_the_body_are_matched_where_there_are_any():
    volume = torch.full((1, 16, 16, 16), -1.5)
    volume[:, :, :8] = 1.0
    body, air = cut(volume, size=(16, 16, 16)), cut(torch.full_like(volume, -1.5), size=(16, 16, 16))
    points = sample_points(body, body, (16, 16, 16), 1024, np.random.default_rng(0))
    assert len(points[0]) == 1024 and points[0][:, 1].max() == 7
    assert len(sample_points(air, air, (16, 16, 16), 1024, np.random.default_rng(0))[0]) == 1024


def test_the_value_around_a_body_that_was_normalised_alone_is_no_body():
    """0, which lies between the z-scores of the body."""
    volume = torch.zeros((2, 16, 16, 16))
    volume[:, :, :8] = torch.randn(2, 16, 8, 16, generator=torch.Generator().manual_seed(0))
    crop = cut(volume, size=(16, 16, 16))
    points = sample_points(crop, crop, (16, 16, 16), 1024, np.random.default_rng(0))
    assert len(points[0]) == 1024 and points[0][:, 1].max() == 7


def test_crops_side_by_side_are_an_error():
    crops = [cut(torch.zeros((1, 16, 8, 8)), (start, 0, 0)) for start in (0, 8)]
    with pytest.raises(ValueError, match="do not overlap"):
        sample_points(*crops, (8, 8, 8), 4, np.random.default_rng(0))


# ---------------------------------------------------------------- intensities


def test_rates_of_the_changes_are_the_published_ones():
    drawn = [sample_changes(SETTINGS, np.random.default_rng(i), 1) for i in range(3000)]
    assert np.mean([d.sigma is not None for d in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([d.sharpening is not None for d in drawn]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([d.noise_std is not None for d in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([d.windows is not None for d in drawn]) == pytest.approx(0.8, abs=0.03)
    # In Hounsfield units: windows from -1350..-1000 to 300..1000, noise of up to 30.
    windows = np.array([d.windows[0] for d in drawn if d.windows]) * 2350 - 1350
    assert windows.min(0) == pytest.approx([-1350, 300], abs=5) and windows.max(0) == pytest.approx(
        [-1000, 1000], abs=5
    )
    assert max(d.noise_std for d in drawn if d.noise_std) * 2350 == pytest.approx(30, abs=0.5)


def test_without_changes_a_patch_stays_as_it_is():
    patches = torch.rand((1, 2, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(change_intensities(patches, [ViewChanges()]), patches)


def test_a_window_is_stretched_to_the_range_and_cuts_off_what_is_outside():
    patches = torch.linspace(-2, 2, 1000).view(1, 1, 10, 10, 10)
    changed = change_intensities(patches, [ViewChanges(windows=((0.1, 0.8),))]).flatten()
    expected = ((patches.flatten() + 2) / 4 - 0.1).div(0.7).clamp(0, 1) * 4 - 2
    assert torch.allclose(changed, expected, atol=0.02)


def test_blurring_stays_in_plane_and_sharpening_undoes_it():
    patches = torch.zeros((1, 1, 5, 9, 9))
    patches[..., 2, 4, 4] = 1
    blurred = change_intensities(patches, [ViewChanges(sigma=0.8)])[0, 0]
    assert (blurred[[0, 1, 3, 4]] == 0).all() and blurred.sum().item() == pytest.approx(1, abs=1e-5)
    sharpened = change_intensities(patches, [ViewChanges(sigma=0.8, sharpening=2.0)])[0, 0]
    assert sharpened[2, 4, 4] > blurred[2, 4, 4] and sharpened.sum().item() == pytest.approx(1, abs=1e-5)


def test_noise_is_a_part_of_the_range_and_depends_on_its_seed_alone():
    patches = torch.linspace(0, 50, 27000).view(1, 1, 30, 30, 30)
    changes = [ViewChanges(noise_std=0.01, noise_seed=seed) for seed in (3, 4, 3)]
    first, other, again = change_intensities(patches.expand(3, -1, -1, -1, -1), changes) - patches
    assert first.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, -0.5), (2000.0, -1000.0)])
def test_any_normalisation_is_changed_alike(scale, shift):
    patches = torch.rand((2, 2, 8, 12, 10), generator=torch.Generator().manual_seed(0))
    changes = [sample_changes(SETTINGS, np.random.default_rng(seed), 2) for seed in (1, 6)]
    changed = change_intensities(patches * scale + shift, changes)
    assert torch.allclose(changed, change_intensities(patches, changes) * scale + shift, atol=1e-3 * scale)


@pytest.mark.parametrize("value", [0.0, -1000.0])
def test_constant_patches_stay_as_they_are(value):
    patches = torch.full((1, 1, 6, 6, 6), value)
    for seed in range(10):
        changed = change_intensities(patches, [sample_changes(SETTINGS, np.random.default_rng(seed), 1)])
        assert torch.allclose(changed, patches, rtol=1e-5)


# ---------------------------------------------------------------- vectors, loss and score


def test_a_voxels_vector_is_what_all_levels_hold_for_it():
    fine, coarse = volume_of_positions((4, 8, 8))[None], volume_of_positions((4, 4, 4))[None] + 100
    points = torch.tensor([[[3, 5, 6], [0, 0, 7]]])
    vectors = voxel_vectors([fine, coarse], points, (4, 8, 8))
    assert vectors.tolist() == [[[3, 5, 6, 103, 102, 103], [0, 0, 7, 100, 100, 103]]]


def test_loss_of_a_worked_example():
    # Two voxels, temperature 1. Similarities of the first one: 0 to the other in its view, 1 to itself and 0 to the
    # other across; of the second one: 0, then 0 to the first one and 0 to itself.
    first = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    second = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    e = math.e
    expected = (math.log((2 + e) / e) + math.log(3)) / 2
    there = torch.ones((1, 2), dtype=torch.bool)
    assert info_nce(first, second, there, 1.0).item() == pytest.approx(expected, rel=1e-5)
    sharper = (math.log((2 + e**10) / e**10) + math.log(3)) / 2
    assert info_nce(first, second, there, 0.1).item() == pytest.approx(sharper, rel=1e-5)


def test_vectors_that_say_nothing_cost_the_logarithm_of_their_number():
    same = random_unit(1, 1, 5).expand(2, 16, 5)
    loss = info_nce(same, same, torch.ones((2, 16), dtype=torch.bool), 0.1)
    assert loss.item() == pytest.approx(math.log(2 * 16 - 1), rel=1e-5)


def test_places_without_a_voxel_change_neither_loss_nor_score():
    first, second = random_unit(2, 6, 8), random_unit(2, 6, 8, seed=1)
    there = torch.ones((2, 6), dtype=torch.bool)
    padded = F.pad(there, (0, 3))
    rest = random_unit(2, 3, 8, seed=2)
    longer = [torch.cat([vectors, rest], dim=1) for vectors in (first, second)]
    assert torch.allclose(info_nce(*longer, padded, 0.1), info_nce(first, second, there, 0.1))
    assert torch.equal(retrieved(*longer, padded)[:, :6], retrieved(first, second, there))
    assert not retrieved(*longer, padded)[:, 6:].any()


def test_pairs_do_not_see_each_other():
    first, second = random_unit(2, 6, 8), random_unit(2, 6, 8, seed=1)
    there = torch.ones((2, 6), dtype=torch.bool)
    alone = [info_nce(first[i : i + 1], second[i : i + 1], there[i : i + 1], 0.1) for i in range(2)]
    assert torch.allclose(info_nce(first, second, there, 0.1), sum(alone) / 2)


def test_perfect_vectors_retrieve_every_voxel_and_random_ones_hardly_any():
    there = torch.ones((1, 256), dtype=torch.bool)
    vectors = random_unit(1, 256, 32)
    assert retrieved(vectors, vectors, there).all()
    assert retrieved(vectors, random_unit(1, 256, 32, seed=1), there).sum() < 8


def test_gradients_pull_the_two_views_of_a_voxel_together():
    first = random_unit(1, 8, 16).requires_grad_()
    second = random_unit(1, 8, 16, seed=1)
    info_nce(first, second, torch.ones((1, 8), dtype=torch.bool), 0.1).backward()
    moved = F.normalize(first.detach() - 0.1 * first.grad, dim=-1)
    assert (moved * second).sum() > (first.detach() * second).sum()


def test_projected_vectors_have_unit_length():
    assert torch.allclose(Projection(12, 5)(torch.randn(2, 7, 12)).norm(dim=-1), torch.ones(2, 7))


# ---------------------------------------------------------------- the task


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """One volume whose three channels say where each voxel is."""
    volume = volume_of_positions((30, 34, 38)).numpy()
    blosc2.asarray(np.ascontiguousarray(volume), urlpath=str(tmp_path / "0.b2nd"), mode="w")
    return tmp_path


def first_batch(pool: Path, augment: AugmentSettings, patch: tuple[int, int, int], **settings) -> CropBatch:
    task = Vox2Vec(Vox2VecSettings(**settings))
    return next(crop_loader(CropSamples(pool, ["0"], patch, task, augment, 3, 3), 6, 1))


def test_views_of_a_pool_show_the_same_voxels_at_the_matched_points(pool: Path) -> None:
    no_changes = {"sharpness_rate": 0.0, "noise_rate": 0.0, "window_rate": 0.0, "num_points": 200}
    batch = first_batch(pool, AugmentSettings.off(flip_probability=0.5), (16, 20, 12), **no_changes)
    assert len({augmentation.flips for augmentation in batch.augmentations}) > 1
    x, target = Vox2Vec(Vox2VecSettings(**no_changes)).make(batch, torch.device("cpu"))
    assert x.shape == (12, 3, 16, 20, 12) and target.points.shape == (12, 200, 3) and target.there.all()
    for index in range(6):
        first, second = (at(x[i], target.points[i].numpy()) for i in (index, index + 6))
        assert torch.equal(first, second)
        # Places of the two crops in the volume, by which they share three quarters of each axis.
        ends = [(x[i].amin((1, 2, 3)), x[i].amax((1, 2, 3))) for i in (index, index + 6)]
        shared = torch.minimum(ends[0][1], ends[1][1]) - torch.maximum(ends[0][0], ends[1][0]) + 1
        assert (shared >= torch.tensor([12, 15, 9])).all()


def test_shifts_between_the_two_crops_cover_all_that_the_overlap_allows(pool: Path) -> None:
    task = Vox2Vec(SETTINGS)
    samples = CropSamples(pool, ["0"], (8, 8, 8), task, task.augmentation_defaults, 3, 3)
    crops = [samples[0, index, 0].crops for index in range(200)]
    shifts = np.array([np.subtract(second.start, first.start) for first, second in crops])
    assert shifts.min(0).tolist() == [-2, -2, -2] and shifts.max(0).tolist() == [2, 2, 2]
    assert {crop.augmentation.read_size for pair in crops for crop in pair} == {(8, 8, 8)}


def test_pairs_with_fewer_voxels_are_filled_up(pool: Path) -> None:
    batch = first_batch(pool, AugmentSettings.off(), (4, 4, 4))
    _, target = Vox2Vec(SETTINGS).make(batch, torch.device("cpu"))
    counts = [pair.points.shape[1] for pair in batch.drawn]
    assert min(counts) >= 27 and max(counts) <= 64
    assert target.there.sum(1).tolist() == counts and target.points.shape == (12, max(counts), 3)


PLAIN = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "conv_op": nn.Conv3d,
    "kernel_sizes": 3,
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": 1,
    "n_conv_per_stage_decoder": 1,
    "norm_op": nn.InstanceNorm3d,
    "nonlin": nn.LeakyReLU,
}


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (PCTNet(2, 1, strides_of(1), (4, 4, 4, 8, 16)), 36),
        (FMUNet(2, 1, strides_of(2), (4, 4, 8, 8, 16)), 40),
        (PlainConvUNet(2, num_classes=1, deep_supervision=False, **PLAIN), 20),
    ],
    ids=lambda value: type(value).__name__,
)
def test_encoders_of_all_networks_learn_and_decoders_stay(network: nn.Module, channels: int) -> None:
    task = Vox2Vec(SETTINGS)
    assert sum(encoder_channels(network)) == channels
    model = PretextNetwork(network, task, 2)
    size = (18, 20, 20)
    points = torch.stack([torch.randint(0, n, (4, 30), generator=torch.Generator().manual_seed(0)) for n in size], 2)
    target = Matches(points, torch.ones((2, 30), dtype=torch.bool))
    outputs = model(torch.randn((4, 2, *size), generator=torch.Generator().manual_seed(0)), target)
    assert outputs.shape == (4, 30, 128)
    task.loss(outputs, target).backward()
    touched = {name.partition(".")[0] for name, value in network.named_parameters() if value.grad is not None}
    assert touched == {"encoder"}
    assert all(value.grad is not None for value in model.head.parameters())


def test_a_voxels_vector_of_a_padded_input_is_at_its_own_place() -> None:
    network = FMUNet(1, 1, strides_of(0), (4, 4, 4, 4, 4)).eval()
    x = torch.randn((1, 1, 20, 17, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, size = encoder_maps(network, x)
    assert size == [32, 32, 48]
    vectors = voxel_vectors(maps, torch.tensor([[[19, 16, 32]]]), size)
    expected = [m[0, :, 19 // s, 16 // s, 32 // s] for m, s in zip(maps, (1, 2, 4, 8, 16), strict=True)]
    assert torch.equal(vectors[0, 0], torch.cat(expected))


@pytest.mark.slow
def test_compiled_encoders_are_used_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs, fullgraph=True, dynamic=False))
    network = FMUNet(1, 1, strides_of(0), (4, 4, 4, 4, 4)).eval()
    x = torch.randn((4, 1, 16, 32, 32), generator=torch.Generator().manual_seed(0))
    target = Matches(torch.zeros((4, 5, 3), dtype=torch.int64), torch.ones((2, 5), dtype=torch.bool))
    task = Vox2Vec(SETTINGS)
    # Where nnU-Net compiles, the trainer hands over a network whose whole forward pass is compiled.
    model = PretextNetwork(torch.compile(network), task, 1)
    plain = model(x, target)
    assert graphs.frame_count == 0
    task.compile()
    assert torch.allclose(model(x, target), plain, atol=1e-5)
    assert graphs.frame_count == 1 and graphs.op_count > 50
    torch.compiler.reset()


def test_a_network_without_levels_is_refused() -> None:
    with pytest.raises(PlanError, match="Linear has no encoder with levels.*-network pctnet"):
        Vox2Vec(SETTINGS).head(nn.Linear(2, 2), 1)


def test_memory_can_be_estimated_without_a_target() -> None:
    estimate = estimate_training_memory(
        lambda: PretextNetwork(FMUNet(1, 1, strides_of(0), (4, 4, 4, 8, 8)), Vox2Vec(SETTINGS), 1), (4, 1, 32, 32, 32)
    )
    assert estimate.activations > 4 * 32**3 * 4 * 4


def test_scores_are_shares_of_all_voxels_and_alarms_name_a_loss_that_stays() -> None:
    task = Vox2Vec(SETTINGS)
    good = task.scores({"found": 150, "voxels": 200, "guessed": 2})
    assert good.main == 0.75 and good.values["retrieved_by_chance"] == 0.01
    assert task.alarms([3.0] * 10, good) == []
    bad = task.scores({"found": 3, "voxels": 200, "guessed": 2})
    assert "hardly more often than by chance" in task.alarms([3.0] * 10, bad)[0]
    assert task.alarms([3.0], bad) == []
