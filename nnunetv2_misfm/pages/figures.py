"""Figures of the pages: SVG that takes the page's text colour, in light and dark, and PNG as data URIs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6", "#ec4899", "#84cc16")
TEXT = "#7b7c7d"  # a colour that nothing else has; in the SVG it becomes that of the page's text
_MOST_INSIDE = 3  # lines in a legend within the axes
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def curve(
    lines: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    x: Sequence[float] | None = None,
    *,
    log: bool = False,
) -> str:
    """Lines by name, as SVG; of more than can be told apart the mean, the extremes, and what lies between.

    Args:
        lines: values, nan where there is none.
        xlabel, ylabel: of the axes.
        x: of the values; 1, 2, 3, ... if there is none.
        log: whether the y axis is logarithmic.
    """

    shown, between = (lines, None) if len(lines) <= len(COLOURS) else _extremes(lines)

    def places(line: Sequence[float]) -> Sequence[float]:
        return range(1, len(line) + 1) if x is None else x

    def draw(axis: Axes) -> None:
        if between is not None:
            axis.fill_between(places(between[0]), *between, color=COLOURS[0], alpha=0.2)
        for (name, line), colour in zip(shown.items(), COLOURS, strict=False):
            label = name.replace("$", r"\$")  # which would begin a formula
            axis.plot(places(line), line, color=colour, label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # no epoch 2.5
        outside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(shown) > _MOST_INSIDE else {}
        axis.legend(frameon=False, **outside)

    return svg(draw, 7.2, 3.0)


def _extremes(lines: Mapping[str, Sequence[float]]) -> tuple[dict[str, Sequence[float]], np.ndarray]:
    """Of many lines the mean, and those that end highest and lowest; the lowest and highest of all (2, values)."""
    values = np.array(list(lines.values()), float)
    ends = dict(zip(lines, np.nan_to_num(values[:, -1]), strict=True))
    highest, lowest = max(ends, key=lambda name: ends[name]), min(ends, key=lambda name: ends[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where all are nan, so is what is drawn
        mean, between = np.nanmean(values, 0), np.array([np.nanmin(values, 0), np.nanmax(values, 0)])
    shown = {
        f"mean of {len(lines)}": mean,
        f"highest at the end: {highest}": lines[highest],
        f"lowest at the end: {lowest}": lines[lowest],
    }
    return shown, between


def svg(draw: Callable[[Axes], None], width: float, height: float) -> str:
    """What `draw` draws, as SVG of this size in inches."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault), matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        axis.grid(alpha=0.25, color=TEXT)
        draw(axis)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    # The page decides how wide the figure is; its own size is in the viewBox.
    return re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)


def png_file(path: Path) -> str:
    """A PNG file as a data URI."""
    return png_uri(path.read_bytes())


def png_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
