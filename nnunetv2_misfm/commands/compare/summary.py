"""What came out of a comparison: the content of summary.json, which the page shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from nnunetv2_misfm.commands.compare.arms import Arm
from nnunetv2_misfm.commands.compare.comparison import Comparison, Runs, by_importance, compare_arms, scores
from nnunetv2_misfm.commands.compare.records import RunRecord, mean
from nnunetv2_misfm.commands.compare.verdict import verdict

_SHOWN_CASES = 3  # that gained most, and that lost most


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
        return by_importance(self.comparisons)[0] if self.comparisons else None

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
                "comparisons": [comparison.as_json() for comparison in self.comparisons],
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
    comparisons = compare_arms(arms, dict(runs))
    cases = _case_dice(runs, by_importance(comparisons)[0]) if comparisons else {}
    return Summary(tuple(arms), dict(runs), tuple(comparisons), verdict(comparisons, runs), cases)


def _row(arm: str, labelled: int, by_seed: Mapping[int, RunRecord]) -> dict[str, Any]:
    """What an arm reached and took with one number of labelled cases: Dice in points, and hours of all seeds."""
    runs = list(by_seed.values())
    dice = {seed: run.score for seed, run in sorted(by_seed.items())}
    there = [value for value in dice.values() if not math.isnan(value)]
    return {
        "arm": arm,
        "labelled": labelled,
        "dice": mean(dice.values()),
        "spread": stdev(there) if len(there) > 1 else None,
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


def _finite(value: Any) -> Any:
    """Content for JSON, which has no numbers that are none or infinite: they become null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
