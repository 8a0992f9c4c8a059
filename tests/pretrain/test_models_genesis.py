"""Models Genesis: rates and sizes of the published recipe, and what each of the four changes keeps."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_misfm.pretrain.models_genesis import (
    Boxes,
    Corruption,
    Curve,
    ModelsGenesisSettings,
    _sorted_by,
    corrupt,
    curve_table,
    flip_crops,
    sample_corruption,
)

PATCH = (64, 128, 128)
FEW_WINDOWS = ModelsGenesisSettings(num_windows=20)


def always(**rates: float) -> ModelsGenesisSettings:
    """Settings with which only the named steps happen."""
    off = {"flip_rate": 0.0, "local_rate": 0.0, "nonlinear_rate": 0.0, "paint_rate": 0.0}
    return ModelsGenesisSettings(**{**off, **rates})


def draws(settings: ModelsGenesisSettings, count: int, shape: tuple[int, int, int] = PATCH) -> list[Corruption]:
    generator = np.random.default_rng(0)
    return [sample_corruption(shape, settings, generator, 1) for _ in range(count)]


def random_crops(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def boxes(*cuboids: tuple[tuple[int, int, int], tuple[int, int, int]]) -> Boxes:
    starts, sizes = zip(*cuboids, strict=True)
    return Boxes(np.array(starts), np.array(sizes))


# ---------------------------------------------------------------- what is drawn


def test_rates_of_the_steps_are_the_published_ones():
    drawn = draws(FEW_WINDOWS, 2500)
    shares = {
        "shuffled": np.mean([d.windows is not None for d in drawn]),
        "bent": np.mean([d.curves is not None for d in drawn]),
        "decreasing": np.mean([d.curves[0].decreasing for d in drawn if d.curves]),
        "painted": np.mean([d.boxes is not None for d in drawn]),
        "around": np.mean([d.out_painting for d in drawn if d.boxes]),
    }
    assert shares == pytest.approx(
        {"shuffled": 0.5, "bent": 0.9, "decreasing": 0.5, "painted": 0.9, "around": 0.8}, abs=0.035
    )


def test_flips_follow_the_published_chain():
    # None, one, two or three flips with .6, .24, .096 and .064, each along an axis of its own choice.
    drawn = [d.flips for d in draws(always(flip_rate=0.4), 6000)]
    assert np.mean([not any(flips) for flips in drawn]) == pytest.approx(0.6 + 0.096 / 3, abs=0.02)
    each = 0.24 / 3 + 0.096 * 4 / 9 + 0.064 * 13 / 27
    assert np.mean(drawn, axis=0) == pytest.approx([each] * 3, abs=0.015)


def test_windows_have_sides_up_to_a_tenth_of_the_patch():
    (drawn,) = draws(always(local_rate=1.0), 1)
    sizes, stops = drawn.windows.sizes, drawn.windows.starts + drawn.windows.sizes
    assert sizes.shape == (10000, 3)
    assert sizes.min(0).tolist() == [1, 1, 1] and sizes.max(0).tolist() == [6, 12, 12]
    assert sizes.mean(0) == pytest.approx([3.5, 6.5, 6.5], abs=0.15)
    assert drawn.windows.starts.min(0).tolist() == [0, 0, 0] and stops.max(0).tolist() == list(PATCH)


def test_painted_boxes_are_a_sixth_to_a_third_and_keep_three_voxels_from_the_border():
    drawn = draws(always(paint_rate=1.0, outpaint_rate=0.0), 1500)
    counts = Counter(len(d.boxes.sizes) for d in drawn)
    assert sorted(counts) == [0, 1, 2, 3, 4, 5]
    assert counts[0] / 1500 == pytest.approx(0.05, abs=0.02) and counts[5] / 1500 == pytest.approx(0.95**5, abs=0.04)
    sizes = np.concatenate([d.boxes.sizes for d in drawn])
    starts = np.concatenate([d.boxes.starts for d in drawn])
    assert sizes.min(0).tolist() == [10, 21, 21] and sizes.max(0).tolist() == [21, 42, 42]
    assert starts.min(0).tolist() == [3, 3, 3]
    assert (starts + sizes).max(0).tolist() == [61, 125, 125]


def test_spared_boxes_are_about_half_the_patch_and_there_is_at_least_one():
    drawn = draws(always(paint_rate=1.0, outpaint_rate=1.0), 1500)
    counts = Counter(len(d.boxes.sizes) for d in drawn)
    assert sorted(counts) == [1, 2, 3, 4, 5]
    assert counts[1] / 1500 == pytest.approx(0.05, abs=0.02) and counts[5] / 1500 == pytest.approx(0.95**4, abs=0.04)
    sizes = np.concatenate([d.boxes.sizes for d in drawn])
    starts = np.concatenate([d.boxes.starts for d in drawn])
    # The side less a whole number from 3/7 to 4/7 of it.
    assert sizes.min(0).tolist() == [64 - 36, 128 - 73, 128 - 73] and sizes.max(0).tolist() == [64 - 27, 74, 74]
    assert starts.min(0).tolist() == [3, 3, 3] and (starts + sizes).max(0).tolist() == [61, 125, 125]


@given(shape=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 2**32))
def test_any_patch_can_be_corrupted(shape, seed):
    generator = np.random.default_rng(seed)
    settings = ModelsGenesisSettings(num_windows=20, local_rate=1.0, nonlinear_rate=1.0, paint_rate=1.0)
    drawn = [sample_corruption(shape, settings, generator, 2) for _ in range(2)]
    for cuboids in (c for d in drawn for c in (d.windows, d.boxes)):
        assert (cuboids.starts >= 0).all() and (cuboids.sizes >= 1).all()
        assert (cuboids.starts + cuboids.sizes <= shape).all()
    crops = random_crops(2, 2, *shape)
    target = flip_crops(crops, drawn)
    assert target.shape == crops.shape and corrupt(target, drawn).isfinite().all()


def test_the_same_generator_and_seeds_give_the_same_input():
    crops = random_crops(1, 1, 20, 30, 25)
    settings = ModelsGenesisSettings(local_rate=1.0, paint_rate=1.0)
    first, again = (
        corrupt(crops, [sample_corruption((20, 30, 25), settings, np.random.default_rng(3), 1)]) for _ in range(2)
    )
    assert torch.equal(first, again)


# ---------------------------------------------------------------- what is done


@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=3)))
def test_the_target_is_flipped_along_the_drawn_axes(flips):
    crops = random_crops(1, 2, 3, 4, 5)
    axes = [axis for axis, flip in enumerate(flips, start=2) if flip]
    assert torch.equal(flip_crops(crops, [Corruption(flips=flips)]), crops.flip(axes))


def test_without_changes_the_input_is_the_target():
    crops = random_crops(2, 1, 4, 5, 6)
    assert torch.equal(corrupt(crops, [Corruption(), Corruption()]), crops)


def test_shuffling_reorders_the_voxels_of_a_window_and_no_others():
    crop = torch.arange(8.0 * 9 * 10).view(1, 1, 8, 9, 10)
    windows = boxes(((1, 2, 3), (4, 5, 6)))
    shuffled = corrupt(crop, [Corruption(windows=windows, shuffle_seed=1)])
    inside = torch.zeros(crop.shape, dtype=torch.bool)
    inside[..., 1:5, 2:7, 3:9] = True
    assert torch.equal(shuffled[~inside], crop[~inside])
    assert torch.equal(shuffled[inside].sort().values, crop[inside])
    assert (shuffled[inside] != crop[inside]).float().mean() > 0.9


def test_a_later_window_covers_an_earlier_one_with_voxels_of_the_unchanged_crop():
    crop = torch.arange(1000.0).view(1, 1, 10, 10, 10)
    windows = boxes(((0, 0, 0), (6, 6, 6)), ((3, 3, 3), (6, 6, 6)))
    shuffled = corrupt(crop, [Corruption(windows=windows, shuffle_seed=2)])
    later = shuffled[..., 3:9, 3:9, 3:9].flatten().sort().values
    assert torch.equal(later, crop[..., 3:9, 3:9, 3:9].flatten())
    earlier = torch.ones((6, 6, 6), dtype=torch.bool)
    earlier[3:, 3:, 3:] = False
    values = shuffled[0, 0, :6, :6, :6][earlier]
    assert set(values.tolist()) < set(crop[..., :6, :6, :6].flatten().tolist()) and len(values.unique()) == len(values)


def test_voxels_are_sorted_as_torch_sorts_them() -> None:
    drawn = np.random.default_rng(0)
    keys = torch.from_numpy(np.append(drawn.integers(300, size=5000), 2**31 - 1).astype(np.int32))  # with ties
    values = torch.from_numpy(np.sort(drawn.integers(2**31 - 1, size=5001)).astype(np.int32))
    assert torch.equal(_sorted_by(keys, values), values[keys.argsort(stable=True)])


def test_all_orders_of_a_window_are_equally_likely():
    crop = torch.arange(3.0).view(1, 1, 1, 1, 3)
    window = boxes(((0, 0, 0), (1, 1, 3)))
    found = Counter(
        tuple(corrupt(crop, [Corruption(windows=window, shuffle_seed=seed)]).flatten().tolist()) for seed in range(600)
    )
    assert len(found) == 6 and min(found.values()) > 65 and max(found.values()) < 135


def test_channels_are_shuffled_alike():
    crop = random_crops(1, 1, 8, 8, 8).expand(1, 2, 8, 8, 8) * torch.tensor([1.0, -3.0]).view(1, 2, 1, 1, 1)
    shuffled = corrupt(crop, [Corruption(windows=boxes(((0, 0, 0), (8, 8, 8))))])
    assert torch.equal(shuffled[:, 1], shuffled[:, 0] * -3)


@pytest.mark.parametrize("decreasing", [False, True])
def test_a_curve_is_the_bezier_curve_of_its_control_points(decreasing):
    points = [(0.0, 0.0), (0.8, 0.1), (0.3, 0.9), (1.0, 1.0)]
    table = curve_table(Curve((points[1], points[2]), decreasing))

    def on_curve(t: float, axis: int) -> float:
        values = [point[axis] for point in points]
        while len(values) > 1:  # de Casteljau
            values = [(1 - t) * a + t * b for a, b in zip(values, values[1:], strict=False)]
        return values[0]

    for t in np.linspace(0, 1, 21).tolist():
        y = on_curve(1 - t if decreasing else t, 1)
        assert np.interp(on_curve(t, 0), np.linspace(0, 1, len(table)), table) == pytest.approx(y, abs=1e-3)


def test_curves_are_monotone_and_a_decreasing_one_turns_bright_into_dark():
    for drawn in draws(always(nonlinear_rate=1.0), 200):
        (curve,) = drawn.curves
        steps = np.diff(curve_table(curve))
        assert (steps <= 0).all() if curve.decreasing else (steps >= 0).all()
        assert abs(steps.sum()) == pytest.approx(1)
    ramp = torch.linspace(0, 1, 1000).view(1, 1, 10, 10, 10)
    bent = corrupt(ramp, [Corruption(curves=(Curve(((0.2, 0.6), (0.5, 0.5)), True),))]).flatten()
    assert (bent.diff() <= 1e-6).all() and bent[0] > 0.99 and bent[-1] < 0.01


@pytest.mark.parametrize(("scale", "shift"), [(1.0, -0.5), (2000.0, -1000.0), (0.3, 7.0)])
def test_any_normalisation_gets_the_same_corruption(scale, shift):
    crops = random_crops(2, 2, 16, 20, 24)
    settings = ModelsGenesisSettings(local_rate=1.0, nonlinear_rate=1.0, paint_rate=1.0, num_windows=100)
    drawn = [sample_corruption((16, 20, 24), settings, np.random.default_rng(seed), 2) for seed in (0, 1)]
    expected = corrupt(crops, drawn) * scale + shift
    assert torch.allclose(corrupt(crops * scale + shift, drawn), expected, atol=2e-4 * scale)


def test_values_below_the_mean_of_a_z_score_stay_apart():
    z_scores = torch.linspace(-2, 2, 1000).view(1, 1, 10, 10, 10)
    bent = corrupt(z_scores, [Corruption(curves=(Curve(((0.3, 0.2), (0.7, 0.9)), False),))]).flatten()
    assert (bent[5:500].diff() > 0).all()


def test_each_channel_has_its_own_curve():
    crop = torch.linspace(0, 1, 1000).view(1, 1, 10, 10, 10).expand(1, 2, 10, 10, 10)
    straight = ((1 / 3, 1 / 3), (2 / 3, 2 / 3))
    bent = corrupt(crop, [Corruption(curves=(Curve(straight, False), Curve(straight, True)))])
    inner = slice(5, -5)  # rarer values than the range's percentiles are cut off
    assert torch.allclose(bent[0, 0].flatten()[inner], crop[0, 0].flatten()[inner], atol=1e-5)
    assert torch.allclose(bent[0, 1].flatten()[inner], 1 - crop[0, 0].flatten()[inner], atol=1e-5)


@pytest.mark.parametrize("out_painting", [False, True])
def test_noise_fills_the_boxes_or_all_but_them(out_painting):
    crop = random_crops(1, 2, 20, 20, 20) * 0.5 + 100
    drawn = Corruption(
        boxes=boxes(((3, 4, 5), (6, 7, 8)), ((10, 3, 3), (5, 5, 5))), out_painting=out_painting, noise_seed=9
    )
    painted = corrupt(crop, [drawn])
    noisy = torch.zeros((20, 20, 20), dtype=torch.bool)
    noisy[3:9, 4:11, 5:13] = noisy[10:15, 3:8, 3:8] = True
    if out_painting:
        noisy = ~noisy
    assert torch.equal(painted[0][:, ~noisy], crop[0][:, ~noisy])
    noise = painted[0][:, noisy]
    assert (noise != crop[0][:, noisy]).float().mean() > 0.99
    assert 100 <= noise.min() and noise.max() <= 100.5
    assert noise.mean().item() == pytest.approx(100.25, abs=0.04) and noise.std().item() == pytest.approx(
        0.5 / 12**0.5, abs=0.02
    )
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("value", [0.0, -1000.0, 1e-30, 3e8])
def test_constant_crops_stay_as_they_are(value):
    settings = ModelsGenesisSettings(local_rate=1.0, nonlinear_rate=1.0, paint_rate=1.0, num_windows=20)
    crop = torch.full((1, 1, 8, 8, 8), value)
    for drawn in draws(settings, 5, (8, 8, 8)):
        assert torch.equal(corrupt(crop, [drawn]), crop)


def test_a_crop_with_a_few_bright_voxels_does_not_lose_them():
    """Its percentiles coincide."""
    crop = torch.zeros(1, 1, 32, 32, 32)
    crop[..., :3, :3, :3] = torch.linspace(1, 2, 27).reshape(3, 3, 3)
    for drawn in draws(always(nonlinear_rate=1.0), 5, (32, 32, 32)):
        corrupted = corrupt(crop, [drawn])
        assert corrupted.unique().numel() > 20 and corrupted.min() >= 0 and corrupted.max() <= 2


def test_the_target_is_left_alone():
    crops = random_crops(1, 1, 12, 12, 12)
    before = crops.clone()
    settings = ModelsGenesisSettings(local_rate=1.0, nonlinear_rate=1.0, paint_rate=1.0, num_windows=20)
    corrupt(crops, draws(settings, 1, (12, 12, 12)))
    assert torch.equal(crops, before)


@pytest.mark.parametrize(
    ("settings", "count", "share", "deviation"),
    [
        (always(local_rate=1.0), 8, 0.786, 0.004),
        (always(paint_rate=1.0, outpaint_rate=0.0), 50, 0.056, 0.021),
        (always(paint_rate=1.0, outpaint_rate=1.0), 50, 0.687, 0.064),
    ],
)
def test_as_many_voxels_change_as_in_the_authors_code(settings, count, share, deviation):
    # Mean and standard deviation of many draws of their code, on a crop without equal voxels.
    crops = random_crops(1, 1, 64, 64, 32)
    changed = [(corrupt(crops, [d]) != crops).float().mean().item() for d in draws(settings, count, (64, 64, 32))]
    assert np.mean(changed) == pytest.approx(share, abs=4 * deviation / count**0.5)
