"""The page of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_misfm.commands.compare import figures
from nnunetv2_misfm.commands.compare.arms import MEANINGS
from nnunetv2_misfm.commands.compare.records import mean
from nnunetv2_misfm.commands.compare.statistics import CONFIDENCE
from nnunetv2_misfm.commands.compare.summary import Comparison, Summary, interval, label_means, points
from nnunetv2_misfm.pages import html


@dataclass(frozen=True)
class Section:
    """A part of the page of its own: text, a figure as SVG, a picture as a data URI."""

    title: str
    text: str
    svg: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class CasePicture:
    """A case, its mean gain in points, what is shown from left to right, and a picture as a data URI."""

    case: str
    gain: float
    titles: tuple[str, ...]
    picture: str


@dataclass(frozen=True)
class Page:
    """What the page shows beside the summary.

    Attributes:
        title: of the page.
        summary: what came out.
        terms: what all arms have in common, as names and values.
        differing: in what the arms differ, a sentence each.
        cases: pictures.
        commands: to repeat it.
        more: sections before the terms.
    """

    title: str
    summary: Summary
    terms: Sequence[tuple[str, str]]
    differing: Sequence[str]
    cases: Sequence[CasePicture] = ()
    commands: str = ""
    more: Sequence[Section] = field(default_factory=tuple)


def write_page(page: Page, path: Path) -> None:
    """Write the page; it appears complete or not at all."""
    summary = page.summary
    values = {
        "page": page,
        "summary": summary,
        "confidence": round(100 * CONFIDENCE),
        "meanings": MEANINGS,
        "differences": figures.differences(summary) if summary.comparisons else None,
        "curves": [(number, svg) for number in summary.labelled if (svg := figures.learning_curves(summary, number))],
        "by_labelled": figures.dice_by_labelled(summary),
        "scores": _score_rows(summary),
        "label_names": _label_names(summary),
        "case_rows": _case_rows(summary),
        "hours": _hours(summary),
    }
    template = "commands/compare/page.html.j2"
    html.write_page(path, template, values, {"points": points, "interval": interval, "labels": _labels})


def _score_rows(summary: Summary) -> list[dict[str, object]]:
    """A row for each arm and number of labelled cases: Dice, its spread, and the Dice of each label."""
    rows = []
    for number in summary.labelled:
        for arm in summary.arms:
            runs = summary.runs.get((arm.name, number))
            if not runs:
                continue
            values = [run.score for run in runs.values()]
            rows.append(
                {
                    "labelled": number,
                    "arm": arm.name,
                    "seeds": len(values),
                    "dice": mean(values),
                    "spread": statistics.stdev(values) if len(values) > 1 else None,
                    "labels": label_means(runs.values()),
                    "rate": ", ".join(f"{rate:g}" for rate in sorted({run.rate for run in runs.values()})),
                }
            )
    return rows


def _label_names(summary: Summary) -> list[str]:
    return next((list(run.label_dice) for by_seed in summary.runs.values() for run in by_seed.values()), [])


def _case_rows(summary: Summary) -> list[tuple[str, float, float, float]]:
    """Case, Dice of the arm and of the other, and gain, for the comparison that the verdict names; worst gain first."""
    first = summary.first
    if first is None:
        return []

    def of(arm: str, case: str) -> float:
        runs = summary.runs[arm, first.labelled]
        values = [run.case_dice[case] for run in runs.values()]
        return sum(values) / len(values)

    ordered = sorted(summary.gains.items(), key=lambda item: item[1])
    return [(case, of(first.arm, case), of(first.other, case), gain) for case, gain in ordered]


def _hours(summary: Summary) -> list[tuple[str, int, float, float]]:
    """Arm, runs, hours of training and hours in all."""
    rows = []
    for arm in summary.arms:
        runs = [run for (name, _), by_seed in summary.runs.items() if name == arm.name for run in by_seed.values()]
        training = sum(run.training_seconds for run in runs) / 3600
        rows.append((arm.name, len(runs), training, sum(run.seconds for run in runs) / 3600))
    return rows


def _labels(comparison: Comparison, summary: Summary) -> str:
    """With how many labelled cases the other arm reaches this one's Dice."""
    equal = comparison.same_labels
    numbers = [n for n in summary.labelled if summary.scores(comparison.other, n)]
    if len(numbers) < 2:
        return "–"
    if equal is None:
        return f"fewer than {numbers[0]}"
    return f"more than {numbers[-1]}" if math.isinf(equal) else f"{equal:.1f}"
