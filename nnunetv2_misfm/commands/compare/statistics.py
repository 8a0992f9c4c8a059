"""What a comparison says, in numbers: paired differences with t intervals, seeds still needed, labels and time saved.

Scores are Dice in points (0 to 100). The seeds of two arms are paired: same labelled cases, same test cases.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8  # how often a number of seeds should show what is there
MOST_SEEDS = 1000  # beyond which a difference that small is not worth looking for


@dataclass(frozen=True)
class Difference:
    """Mean paired difference of two arms.

    Attributes:
        values: of each seed that both arms have.
        low, high: t interval of the mean; infinite for a single seed.
        p: two-sided p value of the paired t test; 1 for a single seed.
    """

    values: tuple[float, ...]
    low: float
    high: float
    p: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    arm: Mapping[int, float], other: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Scores by seed, minus those of another arm, over the seeds that both have; None if there are none."""
    values = tuple(arm[seed] - other[seed] for seed in sorted(set(arm) & set(other)))
    if not values:
        return None
    if len(values) < 2:
        return Difference(values, -math.inf, math.inf, 1.0)
    if not any(values):
        return Difference(values, 0.0, 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences that are all the same have an interval of width 0
        test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(confidence)
    return Difference(values, float(low), float(high), float(test.pvalue))


def confidence_for(comparisons: int) -> float:
    """The confidence of each of several intervals, so that all of them hold together at `CONFIDENCE` (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, comparisons)


def seeds_needed(values: Sequence[float], confidence: float) -> int | None:
    """How many fresh seeds would show a difference as large as this one, spread as it is.

    Fresh, because seeds that are added to those which the number is worked out from find differences that are not there
    more often than the confidence says.

    Returns:
        The smallest number with which the interval would leave 0 out in `POWER` of all comparisons; None if that cannot
        be told (one seed, no difference) or would take more than `MOST_SEEDS`.
    """
    mean, count = abs(float(np.mean(values))), len(values)
    if count < 2 or not mean > 0:
        return None
    deviation = float(np.std(values, ddof=1))
    if deviation == 0:
        return 2
    for wanted in range(2, MOST_SEEDS + 1):
        quantile = float(stats.t.ppf((1 + confidence) / 2, wanted - 1))
        if stats.nct.sf(quantile, wanted - 1, math.sqrt(wanted) * mean / deviation) >= POWER:
            return wanted
    return None


def equal_labels(reached: float, baseline: Mapping[int, float]) -> float | None:
    """With how many labelled cases the baseline reaches a score.

    Args:
        reached: the score of another arm.
        baseline: mean score for each number of labelled cases.

    Returns:
        Interpolated on a logarithmic scale between the numbers that were trained. Infinite if the baseline reaches it
        with none of them, None if it has it with the fewest already.
    """
    numbers = sorted(baseline)
    if reached <= baseline[numbers[0]]:
        return None
    for fewer, more in zip(numbers, numbers[1:], strict=False):
        low, high = baseline[fewer], baseline[more]
        if low < reached <= high:
            share = (reached - low) / (high - low)
            return math.exp(math.log(fewer) + share * (math.log(more) - math.log(fewer)))
    return math.inf


def epochs_to_end(curve: Sequence[float], other: Sequence[float]) -> int | None:
    """From which epoch on a learning curve is where another ends.

    Curves are noisy, so one value above one value says little. The end is the mean of the other's last tenth, and the
    curve is averaged over as many epochs.

    Args:
        curve, other: a value after each epoch.

    Returns:
        The first epoch, counted from 1, from which the averaged curve stays at or above the end; None if it is below at
        the last, or if values are missing.
    """
    if not np.isfinite([*curve, *other]).all():
        return None
    tail = max(1, len(other) // 10)
    end = float(np.mean(other[-tail:]))
    averages = [float(np.mean(curve[max(0, epoch - tail) : epoch])) for epoch in range(1, len(curve) + 1)]
    below = [epoch for epoch, value in enumerate(averages, 1) if value < end]
    first = max(below, default=0) + 1
    return first if first <= len(curve) else None
