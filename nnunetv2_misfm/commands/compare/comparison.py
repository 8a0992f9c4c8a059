"""An arm against another: which are compared, and how far they are apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_misfm.commands.compare.arms import Arm
from nnunetv2_misfm.commands.compare.records import RunRecord, mean
from nnunetv2_misfm.commands.compare.statistics import (
    Difference,
    confidence_for,
    epochs_to_end,
    equal_labels,
    paired_difference,
    seeds_needed,
)

Runs = dict[tuple[str, int], dict[int, RunRecord]]  # (arm, labelled) -> seed -> run


@dataclass(frozen=True)
class Comparison:
    """An arm against another with one number of labelled cases.

    Attributes:
        arm, other, labelled: what is compared.
        difference: of the Dice on the test cases, in points, with an interval at 95 %.
        together: the same with the interval at which all that ask the same, what weights alone do or how arms do beside
            nnU-Net's own, hold together.
        seeds: that both arms have.
        seeds_needed: fresh ones that would show such a difference; see `statistics.seeds_needed`.
        same_labels: with how many labelled cases the other arm reaches this one's score; see `equal_labels`.
        iterations: after which this arm's mean learning curve stays at the end of the other's; see `epochs_to_end`.
        all_iterations: of a run.
        weights_alone: whether nothing else differs.
    """

    arm: str
    other: str
    labelled: int
    difference: Difference
    together: Difference
    seeds: tuple[int, ...]
    seeds_needed: int | None
    same_labels: float | None
    iterations: int | None
    all_iterations: int
    weights_alone: bool

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        difference = self.difference
        return {
            "arm": self.arm,
            "minus": self.other,
            "labelled": self.labelled,
            "seeds": len(difference.values),
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p,
            "shown_among_all": self.together.shown,
            "seeds_needed": self.seeds_needed,
            "labels_of_the_other_for_the_same_dice": self.same_labels
            if self.same_labels is None or math.isfinite(self.same_labels)
            else "more than were trained",
            "iterations_to_the_others_end": self.iterations,
            "iterations": self.all_iterations,
        }


def compare_arms(arms: Sequence[Arm], runs: Runs) -> list[Comparison]:
    """Every comparison of which both arms have a run of the same seed."""
    pairs = _pairs(arms)
    numbers = sorted({number for _, number in runs})
    asking = Counter(weights_alone for *_, weights_alone in pairs)
    together = {question: confidence_for(count * len(numbers)) for question, count in asking.items()}
    return [
        comparison
        for pair in pairs
        for number in numbers
        if (comparison := _compare(runs, pair, number, together[pair[2]])) is not None
    ]


def by_question(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Those that ask what the weights alone do, and those that ask how arms do beside nnU-Net's own."""
    of_weights = [comparison for comparison in comparisons if comparison.weights_alone]
    return of_weights, [comparison for comparison in comparisons if not comparison.weights_alone]


def by_importance(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What the weights alone have done first; of that what was shown, the largest first, then what is nearest to it."""

    def importance(comparison: Comparison) -> tuple[bool, bool, float, float]:
        shown, difference = comparison.together.shown, comparison.difference
        return not comparison.weights_alone, not shown, 0.0 if shown else difference.p, -abs(difference.mean)

    return sorted(comparisons, key=importance)


def _pairs(arms: Sequence[Arm]) -> list[tuple[str, str, bool]]:
    """Each arm, what it is compared with, and whether they differ in the weights alone.

    First come the pairs that do, then those with nnU-Net's own; without either all are compared with the first arm.
    """
    pairs = [(arm.name, arm.baseline, True) for arm in arms if arm.baseline is not None]
    pairs += [(arm.name, other.name, False) for other in arms if other.kind == "nnunet" for arm in arms if arm != other]
    return pairs or [(arm.name, arms[0].name, False) for arm in arms[1:]]


def _compare(runs: Runs, pair: tuple[str, str, bool], labelled: int, together: float) -> Comparison | None:
    arm, other, weights_alone = pair
    mine, theirs = _paired_scores(runs, arm, other, labelled)
    difference = paired_difference(mine, theirs)
    strict = paired_difference(mine, theirs, together)
    if difference is None or strict is None:
        return None

    def score(name: str, number: int) -> float:
        return mean(dice for seed, dice in scores(runs, name, number).items() if seed in mine)

    by_number = {number: score(other, number) for (name, number) in runs if name == other}
    baseline = {number: dice for number, dice in by_number.items() if not math.isnan(dice)}
    curves, goals = (_curves(runs[one, labelled][seed] for seed in sorted(mine)) for one in (arm, other))
    length = next(iter(runs[arm, labelled].values())).iterations_per_epoch
    reached = epochs_to_end(curves.mean(0), goals.mean(0)) if curves.size and goals.size else None
    return Comparison(
        arm,
        other,
        labelled,
        difference,
        strict,
        tuple(sorted(mine)),
        seeds_needed(difference.values, together),
        equal_labels(score(arm, labelled), baseline) if len(baseline) > 1 else None,
        None if reached is None else reached * length,
        curves.shape[1] * length if curves.size else 0,
        weights_alone,
    )


def _paired_scores(runs: Runs, arm: str, other: str, labelled: int) -> tuple[dict[int, float], dict[int, float]]:
    """Dice of two arms by seed, in points, over the labels that both have a value for.

    nnU-Net leaves out a label that is in no test case, unless it is predicted: then its Dice is 0, and one voxel would
    decide over both arms.
    """
    mine, theirs = runs.get((arm, labelled), {}), runs.get((other, labelled), {})
    pairs: tuple[dict[int, float], dict[int, float]] = {}, {}
    for seed in set(mine) & set(theirs):
        dice = mine[seed].label_dice, theirs[seed].label_dice
        both = [label for label in dice[0] if not any(math.isnan(of_run[label]) for of_run in dice)]
        for by_seed, of_run in zip(pairs, dice, strict=True):
            by_seed[seed] = mean(of_run[label] for label in both)
    return pairs


def scores(runs: Runs, arm: str, labelled: int) -> dict[int, float]:
    """Dice of an arm on the test cases by seed, in points."""
    return {seed: run.score for seed, run in runs.get((arm, labelled), {}).items()}


def _curves(runs: Iterable[RunRecord]) -> np.ndarray:
    """Learning curves (runs, epochs)."""
    return np.array([run.curve for run in runs if run.curve])
