"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_misfm.commands.compare import figures
from nnunetv2_misfm.commands.compare.comparison import Comparison, by_question
from nnunetv2_misfm.commands.compare.statistics import CONFIDENCE
from nnunetv2_misfm.commands.compare.summary import Summary
from nnunetv2_misfm.commands.compare.verdict import interval, points
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


def write_page(
    path: Path,
    title: str,
    summary: Summary,
    terms: Sequence[tuple[str, str]],
    differing: Sequence[str],
    cases: Sequence[CasePicture],
    commands: str,
    more: Sequence[Section],
) -> None:
    """Write the page; it appears complete or not at all.

    Args:
        path: of the HTML file.
        title: of the page.
        summary: what came out.
        terms: what all arms have in common, as names and values.
        differing: in what the arms differ, a sentence each.
        cases: pictures.
        commands: to repeat it.
        more: sections before the terms.
    """
    rows = summary.rows()
    values = {
        "title": title,
        "summary": summary,
        "terms": terms,
        "differing": differing,
        "cases": cases,
        "commands": commands,
        "more": more,
        "confidence": round(100 * CONFIDENCE),
        # Those with nnU-Net's own may be ten times as large, and have a figure of their own.
        "differences": [figures.differences(summary, of) for of in by_question(summary.comparisons) if of],
        "curves": [(number, svg) for number in summary.labelled if (svg := figures.learning_curves(summary, number))],
        "several": len(summary.labelled) > 1,  # numbers of labelled cases
        "by_labelled": figures.dice_by_labelled(summary),
        "rows": rows,
        "trained": any(row["hours_of_training"] for row in rows),  # a probe trains no network
        "label_names": list(rows[0]["dice_by_label"]) if rows else [],
    }
    template = "commands/compare/page.html.j2"
    html.write_page(path, template, values, {"points": points, "interval": interval, "labels": _labels})


def _labels(comparison: Comparison, summary: Summary) -> str:
    """With how many labelled cases the other arm reaches this one's Dice."""
    equal = comparison.same_labels
    numbers = [n for n in summary.labelled if summary.scores(comparison.other, n)]
    if len(numbers) < 2:
        return "–"
    if equal is None:
        return f"at most {numbers[0]}"
    return f"more than {numbers[-1]}" if math.isinf(equal) else f"{equal:.1f}"
