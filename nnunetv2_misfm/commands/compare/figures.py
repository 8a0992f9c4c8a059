"""The figures of a comparison's page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_misfm.commands.compare.comparison import Comparison
from nnunetv2_misfm.commands.compare.summary import Summary
from nnunetv2_misfm.pages.figures import COLOURS, TEXT, png_uri, svg

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

_LABELS = ("#ef4444", "#22c55e", "#3b82f6", "#eab308", "#a855f7", "#14b8a6", "#f97316", "#ec4899")


def differences(summary: Summary, shown: Sequence[Comparison]) -> str:
    """Paired differences: a dot for each seed, the mean and its interval, as SVG."""

    def draw(axis: Axes) -> None:
        for row, comparison in enumerate(reversed(shown)):
            difference = comparison.difference
            colour = _colour(summary, comparison.arm)
            axis.plot(difference.values, [row] * len(difference.values), "o", color=colour, alpha=0.35, markersize=5)
            if np.isfinite(difference.low):
                axis.plot([difference.low, difference.high], [row, row], color=colour, linewidth=2.5)
            axis.plot(difference.mean, row, "D", color=colour, markersize=8)
        axis.axvline(0, color=TEXT, linewidth=1)
        axis.set_yticks(range(len(shown)), [_name(comparison) for comparison in reversed(shown)])
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.set_xlabel("points of Dice on the test cases")

    return svg(draw, 7.2, 0.9 + 0.5 * len(shown))


def _name(comparison: Comparison) -> str:
    return f"{comparison.arm} − {comparison.other}, {comparison.labelled} labelled"


def learning_curves(summary: Summary, labelled: int) -> str | None:
    """Pseudo Dice of the validation cases, mean and deviation over the seeds, as SVG; None for less than two epochs."""
    curves = {
        arm.name: (next(iter(runs.values())).iterations_per_epoch, np.array([run.curve for run in runs.values()]))
        for arm in summary.arms
        if (runs := summary.runs.get((arm.name, labelled))) and all(len(run.curve) > 1 for run in runs.values())
    }
    if not curves:
        return None

    def draw(axis: Axes) -> None:
        for arm, (length, values) in curves.items():
            iterations = length * np.arange(1, values.shape[1] + 1)
            _band(axis, iterations, 100 * values, _colour(summary, arm), arm)
        axis.set(xlabel="iteration", ylabel="pseudo Dice, validation")
        axis.legend(frameon=False)

    return svg(draw, 7.2, 3.4)


def dice_by_labelled(summary: Summary) -> str | None:
    """Dice against the number of labelled cases, as SVG; None for a single number."""
    numbers = summary.labelled
    if len(numbers) < 2:
        return None

    def draw(axis: Axes) -> None:
        for arm in summary.arms:
            there = [number for number in numbers if summary.scores(arm.name, number)]
            values = [list(summary.scores(arm.name, number).values()) for number in there]
            means = np.array([np.mean(of_number) for of_number in values])
            spread = np.array([np.std(of_number, ddof=1) if len(of_number) > 1 else 0.0 for of_number in values])
            colour = _colour(summary, arm.name)
            axis.plot(there, means, "o-", color=colour, label=arm.name)
            axis.fill_between(there, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.minorticks_off()
        axis.set(xlabel="labelled", ylabel="Dice on the test cases")
        axis.legend(frameon=False)

    return svg(draw, 7.2, 3.4)


def _band(axis: Axes, x: np.ndarray, values: np.ndarray, colour: str, name: str) -> None:
    middle = values.mean(0)
    axis.plot(x, middle, color=colour, label=name)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(x, middle - spread, middle + spread, color=colour, alpha=0.15, linewidth=0)


def _colour(summary: Summary, arm: str) -> str:
    return COLOURS[[known.name for known in summary.arms].index(arm) % len(COLOURS)]


def case_picture(image: Path, segmentations: Sequence[Path], reader: BaseReaderWriter, ignored: int | None) -> str:
    """The slice of a case with most of its truth, once for each segmentation, as the data URI of a PNG.

    Args:
        image: first channel of the case.
        segmentations: the truth first.
        reader: nnU-Net's of the dataset.
        ignored: the label of voxels that nobody has annotated, if there is one.
    """
    images, properties = reader.read_images([str(image)])
    voxels, (_, height, width) = images[0], properties["spacing"]
    labels = [reader.read_seg(str(path))[0][0] for path in segmentations]
    for segmentation in labels:
        segmentation[segmentation == ignored] = 0
    middle = int(np.argmax((labels[0] > 0).sum((1, 2))))
    low, high = np.percentile(voxels, (1, 99))
    figure = Figure(figsize=(2.6 * len(labels), 2.6), layout="constrained")
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        for axis, segmentation in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
            axis.imshow(voxels[middle], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=height / width)
            for label in _present(labels):
                if (segmentation[middle] == label).any():
                    colour = _LABELS[(label - 1) % len(_LABELS)]
                    axis.contour(segmentation[middle] == label, [0.5], colors=colour, linewidths=1.5)
            axis.axis("off")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, transparent=True)
    return png_uri(stream.getvalue())


def _present(segmentations: Iterable[np.ndarray]) -> list[int]:
    return sorted({int(label) for segmentation in segmentations for label in np.unique(segmentation) if label > 0})
