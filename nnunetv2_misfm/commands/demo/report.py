"""The demo's one-page report: a picture and the numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from nnunetv2_misfm.transfer.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Arm:
    """One of the two fine-tunings.

    Attributes:
        name: for the reader.
        results: its fold folder in nnUNet_results.
        predictions: folder with its predicted test cases.
        dice: mean Dice of each label on the test cases.
    """

    name: str
    results: Path
    predictions: Path
    dice: Mapping[str, float]

    @property
    def mean_dice(self) -> float:
        """Mean over the labels."""
        return float(np.mean(list(self.dice.values())))


def write_report(
    folder: Path, pretraining: Path, arms: Sequence[Arm], images: Path, labels: Path, minutes: float, commands: str
) -> Path:
    """Write report.png and report.md.

    Args:
        folder: where to.
        pretraining: the results folder of the pretraining run.
        arms: the fine-tunings to compare.
        images, labels: test images and their true labels.
        minutes: how long everything took.
        commands: the next commands to type.

    Returns:
        The Markdown file.
    """
    shutil.copyfile(pretraining / "fused_samples.png", folder / "fused_samples.png")
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        _picture(pretraining, arms, images, labels).savefig(folder / "report.png", dpi=90)
    rows = [
        f"| {arm.name} | {' | '.join(f'{d:.3f}' for d in arm.dice.values())} | {arm.mean_dice:.3f} |" for arm in arms
    ]
    names = list(arms[0].dice)
    text = f"""# misfm_demo

Volumes made on the spot, a very small network, {minutes:.1f} minutes: this shows that every step of the job works here.
It is far too short to say what pretraining is worth.

![learning curves and predictions](report.png)

Dice on the test volumes:

| | {" | ".join(names)} | mean |
|---|{"---|" * (len(names) + 1)}
{chr(10).join(rows)}

Fused samples, their labels and the pretrained network's answers:

![fused samples](fused_samples.png)

## What to type next

```
{commands}
```
"""
    path = folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path


def _picture(pretraining: Path, arms: Sequence[Arm], images: Path, labels: Path) -> Figure:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = cast(Sequence[SubFigure], figure.subfigures(2, 1, height_ratios=[1, 1]))
    left, right = top.subplots(1, 2)
    log = read_checkpoint(pretraining / "checkpoint_final.pth")["logging"]
    _curve(left, log["train_losses"], "training")
    _curve(left, log["val_losses"], "validation")
    left.set(title="Pretraining: Volume Fusion loss", xlabel="epoch")
    for arm in arms:
        _curve(right, read_checkpoint(arm.results / "checkpoint_final.pth")["logging"]["mean_fg_dice"], arm.name)
    right.set(title="Fine-tuning: pseudo Dice", xlabel="epoch", ylim=(0, 1))
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    image_file = sorted(images.glob("*.nii.gz"))[0]
    case = image_file.name.replace("_0000.nii.gz", ".nii.gz")
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(image_file)))
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(labels / case)))
    middle = int(np.argmax((truth > 0).sum((1, 2))))
    shown = [("truth", truth)]
    shown += [(arm.name, sitk.GetArrayFromImage(sitk.ReadImage(str(arm.predictions / case)))) for arm in arms]
    axes = bottom.subplots(1, 1 + len(shown))
    _slice(axes[0], image[middle], None, "test image")
    for axis, (name, segmentation) in zip(axes[1:], shown, strict=True):
        _slice(axis, image[middle], segmentation[middle], name)
    return figure


def _curve(axis: Axes, values: Sequence[float], name: str) -> None:
    axis.plot(range(1, len(values) + 1), values, marker=".", label=name)


def _slice(axis: Axes, image: np.ndarray, segmentation: np.ndarray | None, title: str) -> None:
    axis.imshow(image, cmap="gray", vmin=-200, vmax=300)
    if segmentation is not None:
        shown = np.ma.masked_equal(segmentation, 0)
        axis.imshow(shown, cmap="tab10", vmin=0, vmax=9, alpha=0.6, interpolation="nearest")
    axis.set_title(title)
    axis.set_axis_off()
