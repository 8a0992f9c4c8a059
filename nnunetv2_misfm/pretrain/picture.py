"""A picture of samples beside what a network makes of them: one row for each sample, one column for each panel.

Tensors are (B, C, X, Y, Z) in plans axis order; the middle slice along X is shown, for the first channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nnunetv2_misfm.files import written_whole

_MOST_SAMPLES = 4
_SHOWN_PERCENTILES = (0.5, 99.5)
Style = Callable[[np.ndarray], Mapping[str, Any]]  # of a slice: the arguments of matplotlib's imshow


@dataclass(frozen=True)
class Panel:
    """One column.

    Attributes:
        title: above it.
        values: (B, C, X, Y, Z).
        style: how a slice is coloured: `grey`, `classes(number)` or `heat`.
        like: (B, C, X, Y, Z), the image whose range the colours stand for; None for that of the values.
        marks: for each row, places (N, 2) along Y and Z, and whether each is right: green if so, else red.
    """

    title: str
    values: Tensor
    style: Style
    like: Tensor | None = None
    marks: Sequence[tuple[np.ndarray, np.ndarray]] | None = None


def grey(image: np.ndarray) -> dict[str, Any]:
    """An image by its own range."""
    low, high = np.percentile(image, _SHOWN_PERCENTILES)
    return {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}


def heat(image: np.ndarray) -> dict[str, Any]:
    """Distances from 0 to half of an image's range."""
    low, high = np.percentile(image, _SHOWN_PERCENTILES)
    return {"cmap": "magma", "vmin": 0, "vmax": max((high - low) / 2, 1e-6)}


def classes(number: int) -> Style:
    """Whole numbers 0 to `number` - 1; those below are white."""
    colours = matplotlib.colormaps["viridis"].resampled(number).with_extremes(under="white")
    return lambda image: {"cmap": colours, "vmin": -0.5, "vmax": number - 0.5}


def write_panels(path: str | os.PathLike[str], panels: Sequence[Panel], bar: str | None = None) -> None:
    """Write a PNG, which appears complete or not at all.

    Args:
        path: of the PNG.
        panels: the columns, from left to right.
        bar: what the colours of the last panel stand for, to be written beside a colour bar.
    """
    # nnU-Net's progress plot leaves its large fonts behind in matplotlib's global settings.
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = _draw(panels, bar)
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=80, format="png")


def _draw(panels: Sequence[Panel], bar: str | None) -> Figure:
    rows = min(_MOST_SAMPLES, panels[0].values.shape[0])
    # The object interface of matplotlib: no global state, no display.
    figure = Figure(figsize=(3 * len(panels), 3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(panels), squeeze=False)
    for row in range(rows):
        for axis, panel in zip(axes[row], panels, strict=True):
            image = _middle_slice(panel.values[row])
            like = image if panel.like is None else _middle_slice(panel.like[row])
            shown = axis.imshow(image, **panel.style(like))
            if panel.marks is not None:
                places, right = panel.marks[row]
                axis.scatter(places[:, 1], places[:, 0], s=12, c=np.where(right, "lime", "red"), linewidths=0)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(panel.title)
    if bar is not None:
        figure.colorbar(shown, ax=axes, shrink=0.6, ticks=MaxNLocator(integer=True)).set_label(bar)
    return figure


def _middle_slice(volume: Tensor) -> np.ndarray:
    return np.asarray(volume[0, volume.shape[1] // 2].detach().float().cpu())
