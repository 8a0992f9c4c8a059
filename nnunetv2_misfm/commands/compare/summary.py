"""What came out of a comparison: the content of summary.json, which the page shows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
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

_SHOWN_CASES = 3  # that gained most, and that lost most
_FEW_ARMS = 3  # from here on the verdict does not name those that are all better than nnU-Net's own
_HARDLY = 0.25  # of the best arm's Dice

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


@dataclass(frozen=True)
class CaseDice:
    """Dice of a test case in a comparison, in points, mean over the seeds in which both arms have one."""

    arm: float
    other: float

    @property
    def gain(self) -> float:
        """Of the arm over the other, in points."""
        return self.arm - self.other


@dataclass(frozen=True)
class Summary:
    """All that the page shows but for pictures.

    Attributes:
        arms: in their order.
        runs: that are tested.
        comparisons: each arm against those it is to be compared with.
        verdict: what was shown, in a sentence.
        cases: Dice of each test case in the comparison that the verdict names first, worst gain first.
    """

    arms: tuple[Arm, ...]
    runs: Runs
    comparisons: tuple[Comparison, ...]
    verdict: str
    cases: dict[str, CaseDice] = field(default_factory=dict)

    @property
    def labelled(self) -> list[int]:
        """The numbers of labelled cases."""
        return sorted({number for _, number in self.runs})

    @property
    def first(self) -> Comparison | None:
        """The comparison that the verdict names first."""
        return _by_importance(self.comparisons)[0] if self.comparisons else None

    def scores(self, arm: str, labelled: int) -> dict[int, float]:
        """Dice on the test cases by seed, in points."""
        return scores(self.runs, arm, labelled)

    def rows(self) -> list[dict[str, Any]]:
        """The table of the page and of summary.json: a row for each number of labelled cases and arm."""
        return [
            _row(arm.name, number, by_seed)
            for number in self.labelled
            for arm in self.arms
            if (by_seed := self.runs.get((arm.name, number)))
        ]

    def most_changed(self) -> list[str]:
        """The cases that lost most and those that gained most, worst first."""
        order = list(self.cases)
        few = order[:_SHOWN_CASES] + order[-_SHOWN_CASES:]
        return list(dict.fromkeys(few))

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        content: dict[str, Any] = _finite(
            {
                "verdict": self.verdict,
                "scores": sorted(self.rows(), key=lambda row: (row["arm"], row["labelled"])),
                "comparisons": [_comparison_as_json(comparison) for comparison in self.comparisons],
                "mean_gain_by_case": {case: round(dice.gain, 3) for case, dice in self.cases.items()},
            }
        )
        return content


def summarise(arms: Sequence[Arm], records: Iterable[RunRecord]) -> Summary:
    """What records of runs say.

    Args:
        arms: that are compared.
        records: of their runs; those that chose learning rates are left out.
    """
    runs: Runs = defaultdict(dict)
    names = {arm.name for arm in arms}
    for record in records:
        if not record.tuning and record.arm in names:
            runs[record.arm, record.labelled][record.seed] = record
    pairs = _pairs(arms)
    numbers = sorted({number for _, number in runs})
    asking = Counter(weights_alone for *_, weights_alone in pairs)
    together = {question: confidence_for(count * len(numbers)) for question, count in asking.items()}
    comparisons = [
        comparison
        for pair in pairs
        for number in numbers
        if (comparison := _compare(dict(runs), pair, number, together[pair[2]])) is not None
    ]
    first = _by_importance(comparisons)[0] if comparisons else None
    cases = _case_dice(runs, first) if first is not None else {}
    said = [verdict(comparisons), *_hardly_learnt(runs)]
    return Summary(tuple(arms), dict(runs), tuple(comparisons), " ".join(said), cases)


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
    baseline = {n: mean(scores(runs, other, n).values()) for (name, n) in runs if name == other}
    curves, goals = _curves(runs[arm, labelled].values()), _curves(runs[other, labelled].values())
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
        equal_labels(mean(scores(runs, arm, labelled).values()), baseline) if len(baseline) > 1 else None,
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


def _row(arm: str, labelled: int, by_seed: Mapping[int, RunRecord]) -> dict[str, Any]:
    """What an arm reached and took with one number of labelled cases: Dice in points, and hours of all seeds."""
    runs = list(by_seed.values())
    dice = {seed: run.score for seed, run in sorted(by_seed.items())}
    return {
        "arm": arm,
        "labelled": labelled,
        "dice": mean(dice.values()),
        "spread": stdev(dice.values()) if len(dice) > 1 else None,
        "dice_by_seed": dice,
        "dice_by_label": {label: mean(run.label_dice[label] for run in runs) for label in runs[0].label_dice},
        "learning_rates": sorted({run.rate for run in runs}),
        "hours_of_training": sum(run.training_seconds for run in runs) / 3600,
        "hours": sum(run.seconds for run in runs) / 3600,
    }


def _case_dice(runs: Runs, comparison: Comparison) -> dict[str, CaseDice]:
    """Both arms' Dice of each test case, worst gain first; a case counts in the seeds in which both arms have one."""
    mine, theirs = runs[comparison.arm, comparison.labelled], runs[comparison.other, comparison.labelled]
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in sorted(set(mine) & set(theirs)):
        before = theirs[seed].case_dice
        for case, dice in mine[seed].case_dice.items():
            if not math.isnan(dice) and not math.isnan(before[case]):
                pairs[case].append((dice, before[case]))
    cases = {case: CaseDice(*map(mean, zip(*of_case, strict=True))) for case, of_case in pairs.items()}
    return dict(sorted(cases.items(), key=lambda item: item[1].gain))


# ------------------------------------------------------------------ the verdict


def verdict(comparisons: Sequence[Comparison]) -> str:
    """What was shown; first what the weights alone have done, then how arms do beside nnU-Net's own."""
    if not comparisons:
        return "There are no two arms with a finished run of the same seed yet."
    of_weights, of_more = by_question(_by_importance(comparisons))
    asked = of_weights or of_more
    sentences = _all_shown(asked) or [_nothing_shown(asked[0], len(asked)), *_for_all(asked)]
    if of_weights:
        sentences += _all_shown(of_more)
    return " ".join(sentences)


def by_question(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Those that ask what the weights alone do, and those that ask how arms do beside nnU-Net's own."""
    of_weights = [comparison for comparison in comparisons if comparison.weights_alone]
    return of_weights, [comparison for comparison in comparisons if not comparison.weights_alone]


def _by_importance(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What the weights alone have done first; of that what was shown, the largest first, then what is nearest to it."""

    def importance(comparison: Comparison) -> tuple[bool, bool, float, float]:
        shown, difference = comparison.together.shown, comparison.difference
        return not comparison.weights_alone, not shown, 0.0 if shown else difference.p, -abs(difference.mean)

    return sorted(comparisons, key=importance)


def _all_shown(comparisons: Sequence[Comparison]) -> list[str]:
    """What was shown of comparisons that ask the same; no sentence for nothing."""
    groups: dict[tuple[str, bool], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        if comparison.together.shown:
            groups[comparison.other, comparison.difference.mean > 0].append(comparison)
    sentences = [sentence for (other, better), found in groups.items() for sentence in _told(found, other, better)]
    return [*sentences, *_for_all(comparisons)] if sentences else []


def _told(found: Sequence[Comparison], other: str, better: bool) -> list[str]:
    """A sentence for each arm, or one for several that are all better, or worse, than nnU-Net's own."""
    alone = found[0].weights_alone
    by_arm: dict[str, list[str]] = defaultdict(list)
    for comparison in found:
        by_arm[comparison.arm].append(_shown(comparison))
    if not alone and len(by_arm) >= _FEW_ARMS:
        means = sorted((comparison.difference.mean for comparison in found), key=abs)
        than = f"{'better' if better else 'worse'} than {other}"
        return [f"{len(by_arm)} arms are {than}: {points(means[0])} to {points(means[-1])} points of Dice."]
    # Arms that differ in more than the weights are better or worse; weights help or do harm.
    words = ("helped", "did harm") if alone else ("is better", "is worse")
    return [f"{arm} {words[not better]}: {'; '.join(differences)}." for arm, differences in by_arm.items()]


def _for_all(comparisons: Sequence[Comparison]) -> list[str]:
    """That intervals are wider than that of one difference, where they are."""
    if len(comparisons) == 1 or len(comparisons[0].difference.values) == 1:
        return []
    return [f"At 95 % for all {len(comparisons)} differences together."]


def _shown(comparison: Comparison) -> str:
    return (
        f"{points(comparison.difference.mean)} points of Dice against {comparison.other} with {comparison.labelled} "
        f"labelled {interval(comparison.together)}"
    )


def _nothing_shown(nearest: Comparison, comparisons: int) -> str:
    seeds = len(nearest.difference.values)
    of_all = "" if comparisons == 1 else f", the clearest of {comparisons} differences,"
    if seeds < 2:
        return (
            f"Nothing can be shown with one seed: {nearest.arm} minus {nearest.other} is "
            f"{points(nearest.difference.mean)} points of Dice with {nearest.labelled} labelled. Give "
            f"-seeds 3 or more."
        )
    if seeds < 3:
        advice = "two seeds are too few to tell how many would show it: give -seeds 4 or more"
    elif nearest.seeds_needed is None:
        advice = "a difference that small would take more seeds than can be run"
    else:
        first = 1 + max(nearest.seeds)
        advice = (
            f"if it is as large as it looks, {nearest.seeds_needed} fresh seeds would show it four times out of five "
            f"(-first_seed {first} -seeds {nearest.seeds_needed})"
        )
    return (
        f"No difference could be shown with {seeds} seeds: {nearest.arm} minus {nearest.other}{of_all} is "
        f"{points(nearest.difference.mean)} points of Dice with {nearest.labelled} labelled "
        f"{interval(nearest.together)}; {advice}."
    )


def _hardly_learnt(runs: Runs) -> Iterator[str]:
    """A sentence for each arm whose differences from others say that it is not done, and little else."""
    dice = {of: mean(scores(runs, *of).values()) for of in runs}
    for (arm, labelled), reached in dice.items():
        if reached < _HARDLY * max(value for (_, number), value in dice.items() if number == labelled):
            yield (
                f"{arm} has hardly learnt with {labelled} labelled, {reached:.1f} points of Dice: more iterations or "
                f"another learning rate may change that."
            )


def interval(difference: Difference) -> str:
    """`[+1.0, +3.2]`."""
    if math.isinf(difference.low):
        return "[no interval from one seed]"
    return f"[{points(difference.low)}, {points(difference.high)}]"


def points(value: float) -> str:
    """`+1.0`, with a dash for nan."""
    return "-" if math.isnan(value) else f"{value:+.1f}"


def _comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    difference = comparison.difference
    return {
        "arm": comparison.arm,
        "minus": comparison.other,
        "labelled": comparison.labelled,
        "seeds": len(difference.values),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "shown_among_all": comparison.together.shown,
        "seeds_needed": comparison.seeds_needed,
        "labels_of_the_other_for_the_same_dice": comparison.same_labels
        if comparison.same_labels is None or math.isfinite(comparison.same_labels)
        else "more than were trained",
        "iterations_to_the_others_end": comparison.iterations,
        "iterations": comparison.all_iterations,
    }


def _finite(value: Any) -> Any:
    """Content for JSON, which has no numbers that are none or infinite: they become null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
