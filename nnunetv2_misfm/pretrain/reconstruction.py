"""What tasks share whose target is an image: target, outputs, scores, alarms and the picture.

What is asked for is the image with mean 0 and standard deviation 1 in each channel of each crop, as in the masked
autoencoder of He et al. (CVPR 2022) in each patch. InstanceNorm, which nnU-Net's networks begin and end with, leaves no
trace of a crop's own mean and scale, so no such network could tell them; and the loss has the same size for any
normalisation of the volumes, so that one learning rate does.

The score is the variance explained: 1 - squared error / square of the target, both summed over the voxels that count.
It is 1 for the image itself, 0 for the crop's mean everywhere and below 0 for anything worse.

Padding counts in neither of these. Telling it from the image is easy, and where volumes are smaller than the patch it
would be most of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_misfm.plans.run_settings import PretrainingSettings
from nnunetv2_misfm.pretrain.task import PretextTask, Scores, SettingsT, not_moving

_SPATIAL = (2, 3, 4)
_EPOCHS_TO_START = 3
_SAME_EVERYWHERE = 1e-3  # variance of the output, as a share of the image's
_TRIVIAL = 0.02  # of the score
_CONSTANT = 1e-5  # standard deviation of an image without contrast, as a share of its mean: rounding alone


def standardised(images: Tensor, inside: Tensor | None) -> Tensor:
    """Each channel of each image with mean 0 and standard deviation 1; 0 where it has no contrast.

    Args:
        images: (B, C, X, Y, Z).
        inside: bool (B, 1, X, Y, Z), the voxels that are no padding; None for all.
    """
    mean = _mean(images, inside)
    centred = images - mean
    # In one pass over memory; torch.std takes seven times as long.
    size = torch.linalg.vector_norm(centred if inside is None else centred * inside, dim=_SPATIAL, keepdim=True)
    std = size / (images[0, 0].numel() if inside is None else _number(inside)) ** 0.5
    return centred.mul_(torch.where(std > _CONSTANT * mean.abs(), 1 / std, 0.0))


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Of values (B, C, X, Y, Z) over the voxels that count (B, 1, X, Y, Z): (B, C, 1, 1, 1)."""
    if counted is None:
        return values.mean(_SPATIAL, keepdim=True)
    return (values * counted).sum(_SPATIAL, keepdim=True) / _number(counted)


def _number(counted: Tensor) -> Tensor:
    return counted.sum(_SPATIAL, keepdim=True).clamp(min=1)  # 0 where all that would count is padding


@dataclass(frozen=True, eq=False)
class Target:
    """What a network is asked for.

    Attributes:
        image: float32 (B, C, X, Y, Z), see `standardised`.
        counted: bool (B, 1, X, Y, Z), the voxels that count in loss and scores, no padding; None for all.
    """

    image: Tensor
    counted: Tensor | None

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the voxels that count (B, C, 1, 1, 1) of values (B, C, X, Y, Z).

        Means of samples are to be averaged, so that each weighs the same and processes may share a batch evenly.
        """
        return _mean(values, self.counted)


class ReconstructionTask(PretextTask[SettingsT]):
    """A task whose `make` gives a `Target`; the finest output alone is trained, as in all published ones.

    The optimisation is nnssl's for all tasks of this kind (`AbstractTrainer.py`), which for a target of mean 0 and
    standard deviation 1 is right from the first iterations on. AdamW at 1e-3 moves no weight by more than 1e-3 in a
    step, and needs hundreds of them before the output is as small as the target.
    """

    nothing_learnt = "the mean"
    """The output that a score of 0 stands for."""
    picture_caption = (
        "Each row is a sample: what the network sees, the image that it should restore, what it makes of it, and "
        "how far that is off (the brighter, the farther)."
    )
    score_captions = {
        "variance_explained": "Variance explained is 1 for the image itself, 0 for one value everywhere, and below 0 "
        "for anything worse.",
        "output_variance": "The output's variance is a share of the image's. Near 0, the output is nearly the same at "
        "all voxels.",
    }
    run_defaults = PretrainingSettings(optimizer="sgd", initial_lr=1e-2, weight_decay=3e-5, schedule="poly")

    def num_outputs(self, num_channels: int) -> int:
        """One for each channel of the image."""
        return num_channels

    def loss(self, outputs: Tensor, target: Target) -> Tensor:
        """Mean squared error."""
        return target.mean((outputs.float() - target.image).square()).mean()

    def count(self, outputs: Tensor, target: Target) -> dict[str, Any]:
        """Squares of error and image and the output's variance, as means over each sample's voxels, added up."""
        output, image = outputs.detach().float(), target.image
        deviations = {"image": image, "output": output - target.mean(output), "error": output - image}
        return {name: target.mean(values.square()).sum().item() for name, values in deviations.items()}

    def scores(self, sums: Mapping[str, Any]) -> Scores:
        """Variance explained, and the variance of the output as a share of the image's."""
        # Images without any contrast have nothing to explain.
        explained, spread = 0.0, 0.0
        if sums["image"] > 0:
            explained, spread = 1 - sums["error"] / sums["image"], sums["output"] / sums["image"]
        return Scores(
            main=explained,
            parts=[explained],
            values={"variance_explained": explained, "output_variance": spread},
            text=f"variance explained {explained:.4f} (0 for the mean, 1 for the image itself), variance of the output "
            f"{spread:.4f} of the image's",
        )

    def alarms(self, losses: Sequence[float], scores: Scores) -> list[str]:
        """The same output everywhere, or no better than the mean for long."""
        found = []
        if len(losses) >= _EPOCHS_TO_START and float(scores.values["output_variance"]) < _SAME_EVERYWHERE:  # type: ignore[arg-type]
            found.append(
                f"the network's output is nearly the same at all voxels. Try a lower -initial_lr (a third); "
                f"{self.picture_name} shows whether the task can be seen at all."
            )
        if scores.main < _TRIVIAL and (still := not_moving(losses)):
            found.append(
                f"{still}, and the output is no better than {self.nothing_learnt}. Try another -initial_lr, or look at "
                f"{self.picture_name} for volumes without contrast."
            )
        return found

    def picture(self, path: Path, x: Tensor, target: Target, outputs: Tensor) -> None:
        """A row for each sample: input; target and output in the same grey values; the error where it counts."""
        from nnunetv2_misfm.pretrain.picture import Panel, grey, heat, write_panels

        image, error = target.image, (outputs.float() - target.image).abs()
        if target.counted is not None:
            error = error * target.counted
        images = [Panel("input", x, grey), Panel("target", image, grey), Panel("output", outputs, grey, like=image)]
        write_panels(path, [*images, Panel("error, to half of the range", error, heat, like=image)])
