"""A picture of fused samples beside their labels and the network's predictions.

Tensors are (B, C, X, Y, Z) in plans axis order; the middle slice along X is shown, for the first channel.
"""

from __future__ import annotations

import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from nnunetv2_misfm.files import written_whole

_MOST_SAMPLES = 4


def write_fusion_picture(
    path: str | os.PathLike[str], fused: Tensor, labels: Tensor, predictions: Tensor | None, num_fusion_classes: int
) -> None:
    """Write a PNG with one row per sample: fused image, label and, if given, prediction.

    Args:
        path: of the PNG; it appears complete or not at all.
        fused: (B, C, X, Y, Z).
        labels: (B, 1, X, Y, Z) fusion classes.
        predictions: (B, 1, X, Y, Z) fusion classes, or None.
        num_fusion_classes: K + 1, for the colours.
    """
    columns = ["fused", "label"] + (["prediction"] if predictions is not None else [])
    rows = min(_MOST_SAMPLES, fused.shape[0])
    middle = fused.shape[2] // 2
    # nnU-Net's progress plot leaves its large fonts behind in matplotlib's global settings.
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = _draw(columns, rows, middle, fused, labels, predictions, num_fusion_classes)
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=80, format="png")


def _draw(
    columns: list[str],
    rows: int,
    middle: int,
    fused: Tensor,
    labels: Tensor,
    predictions: Tensor | None,
    num_fusion_classes: int,
) -> Figure:
    # The object interface of matplotlib: no global state, no display.
    figure = Figure(figsize=(3 * len(columns), 3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    colours = matplotlib.colormaps["viridis"].resampled(num_fusion_classes)
    for row in range(rows):
        image = _slice(fused, row, middle)
        low, high = np.percentile(image, (0.5, 99.5))
        axes[row][0].imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        for column, classes in enumerate([labels] + ([predictions] if predictions is not None else []), start=1):
            shown = axes[row][column].imshow(
                _slice(classes, row, middle), cmap=colours, vmin=-0.5, vmax=num_fusion_classes - 0.5
            )
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, ticks=range(num_fusion_classes))
    bar.set_label("fusion class k, coefficient k / K")
    return figure


def _slice(x: Tensor, sample: int, middle: int) -> np.ndarray:
    return np.asarray(x[sample, 0, middle].detach().float().cpu())
