"""The numbers of misfm_compare against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nnunetv2_misfm.commands.compare.statistics import (
    CONFIDENCE,
    confidence_for,
    epochs_to_end,
    equal_labels,
    paired_difference,
    seeds_needed,
)


def test_the_interval_is_that_of_the_paired_differences() -> None:
    arm, other = {0: 71.0, 1: 80.0, 2: 75.0, 7: 99.0}, {0: 70.0, 1: 78.0, 2: 72.0, 5: 1.0}
    difference = paired_difference(arm, other)
    assert difference is not None
    assert difference.values == (1.0, 2.0, 3.0)  # seeds that one arm lacks do not count
    assert difference.mean == 2.0
    # standard deviation 1, standard error 1/sqrt(3), t(.975, 2) = 4.30265 (any table of Student's t)
    assert (difference.low, difference.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert difference.p == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641 with two degrees of freedom
    assert not difference.shown


def test_a_difference_is_shown_when_its_interval_leaves_zero_out() -> None:
    difference = paired_difference({0: 2.0, 1: 3.0, 2: 2.5, 3: 2.5}, dict.fromkeys(range(4), 0.0))
    assert difference is not None and difference.shown
    # standard deviation .40825, t(.975, 3) = 3.18245
    assert difference.low == pytest.approx(2.5 - 0.64962, abs=1e-4)


def test_one_seed_has_no_interval_and_shows_nothing() -> None:
    difference = paired_difference({0: 90.0}, {0: 10.0})
    assert difference is not None
    assert (difference.low, difference.high, difference.p, difference.shown) == (-math.inf, math.inf, 1.0, False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("gain", "p", "shown"), [(0.0, 1.0, False), (2.0, 0.0, True)])
def test_differences_that_are_all_the_same_have_no_width(gain: float, p: float, shown: bool) -> None:
    difference = paired_difference(dict.fromkeys(range(3), gain), dict.fromkeys(range(3), 0.0))
    assert difference is not None
    assert (difference.low, difference.high, difference.p, difference.shown) == (gain, gain, p, shown)


def test_arms_without_a_common_seed_have_no_difference() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_two_comparisons_are_each_asked_for_more() -> None:
    assert confidence_for(1) == pytest.approx(0.95)
    assert confidence_for(2) == pytest.approx(0.975)


def test_so_many_fresh_seeds_show_a_difference_four_times_out_of_five() -> None:
    """By trying it out: with one seed fewer it is shown less often."""
    draw = np.random.default_rng(0)
    for values in ([1.0, 2.0, 3.0], [-1.0, 1.0, 3.0]):
        needed = seeds_needed(values, CONFIDENCE)
        assert needed is not None
        shown = {}
        for seeds in (needed - 1, needed):
            trials = draw.normal(np.mean(values), np.std(values, ddof=1), (20_000, seeds))
            errors = trials.std(1, ddof=1) / math.sqrt(seeds)
            shown[seeds] = np.mean(trials.mean(1) > stats.t.ppf(0.975, seeds - 1) * errors)
        assert shown[needed - 1] < 0.81 and shown[needed] > 0.79
    assert seeds_needed([2.0, 2.0], CONFIDENCE) == 2


@pytest.mark.parametrize("values", [[1.0], [-1.0, 1.0], [-10.0, 10.01]], ids=["one seed", "level", "too small"])
def test_how_many_more_seeds_cannot_always_be_told(values: list[float]) -> None:
    assert seeds_needed(values, CONFIDENCE) is None


def test_labels_saved_are_read_off_the_baseline_on_a_logarithmic_scale() -> None:
    baseline = {5: 60.0, 20: 70.0, 80: 75.0}
    assert equal_labels(65.0, baseline) == pytest.approx(10.0)  # half-way between 5 and 20: sqrt(5 * 20)
    assert equal_labels(72.5, baseline) == pytest.approx(40.0)
    assert equal_labels(70.0, baseline) == pytest.approx(20.0)
    assert equal_labels(76.0, baseline) == math.inf
    assert equal_labels(60.0, baseline) is None
    assert equal_labels(45.0, {5: 50.0, 10: 40.0, 20: 60.0}) is None, "a dip later on changes nothing"


def test_the_epoch_from_which_a_curve_stays_at_the_end_of_another() -> None:
    assert epochs_to_end([0.1, 0.5, 0.4, 0.6], [0.1, 0.2, 0.3, 0.5]) == 4, "one value above it says little"
    assert epochs_to_end([0.1, 0.5, 0.6, 0.6], [0.1, 0.2, 0.3, 0.5]) == 2
    assert epochs_to_end([0.5, 0.6], [0.1, 0.5]) == 1
    assert epochs_to_end([0.1, 0.2], [0.1, 0.5]) is None
    assert epochs_to_end([0.1, math.nan], [0.1, 0.5]) is epochs_to_end([0.1, 0.6], [0.1, math.nan]) is None
    # 20 epochs: ends and curves are means of 2, so a last value that is low is no easy goal.
    other = [0.5] * 19 + [0.1]
    assert epochs_to_end([0.2] * 9 + [0.39] * 11, other) == 11


def test_equal_curves_save_nothing() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 100))
    curve, other = 0.8 * (1 - np.exp(-np.arange(100) / 15)) + noise
    first = epochs_to_end(curve, other)
    assert first is None or first > 80
