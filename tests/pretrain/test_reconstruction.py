"""What tasks share whose target is an image: the target is one that every network can know."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import validation_samples
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask, Target, standardised
from nnunetv2_misfm.pretrain.tasks import task_class, task_classes

RECONSTRUCTION = [kind.name for kind in task_classes() if issubclass(kind, ReconstructionTask)]
PATCH = (12, 12, 12)


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((2, 20, 20, 20)).astype(np.float32)


def made(name: str, folder: Path, voxels: np.ndarray) -> tuple[torch.Tensor, Target]:
    """A batch of three crops of a volume."""
    folder.mkdir()
    blosc2.asarray(voxels, urlpath=str(folder / "0.b2nd"), mode="w")
    task = task_class(name)(task_class(name).Settings())
    x, target = task.make(
        next(crop_loader(validation_samples(folder, ["0"], PATCH, task, 0, 2), 3, 1)), torch.device("cpu")
    )
    return x, target


def test_there_are_tasks_of_this_kind() -> None:
    assert len(RECONSTRUCTION) >= 3


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_a_crops_own_mean_and_scale_are_not_asked_for(name: str, tmp_path: Path) -> None:
    """A network that begins with InstanceNorm is blind to them: they would be an error that it cannot mend."""
    shifts, scales = np.array([-3.0, 100.0])[:, None, None, None], np.array([0.1, 40.0])[:, None, None, None]
    _, target = made(name, tmp_path / "plain", volume())
    _, other = made(name, tmp_path / "shifted", (volume() * scales + shifts).astype(np.float32))
    assert torch.allclose(target.image, other.image, atol=1e-3)
    assert target.image.mean((2, 3, 4)).abs().max() < 1e-4
    assert target.image.std((2, 3, 4)).numpy() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_the_same_value_everywhere_scores_0_and_no_constant_scores_more(name: str, tmp_path: Path) -> None:
    task = task_class(name)(task_class(name).Settings())
    _, target = made(name, tmp_path / "pool", volume())
    constants = {c: torch.full_like(target.image, c) for c in (-0.3, 0, 0.3)}
    scores = {c: task.scores(task.count(x, target)).values["variance_explained"] for c, x in constants.items()}
    assert scores[0] == 0 and scores[-0.3] < 0.05 and scores[0.3] < 0.05


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_images_without_contrast_score_0(name: str, tmp_path: Path) -> None:
    task = task_class(name)(task_class(name).Settings())
    _, target = made(name, tmp_path / "pool", np.zeros_like(volume()))
    assert task.scores(task.count(torch.ones_like(target.image), target)).main == 0


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0, 1e-30, 3e8])
def test_an_image_without_contrast_is_0(value: float) -> None:
    images = torch.full((1, 2, 5, 6, 7), value)
    images[0, 1, 0, 0, 0] += abs(value) + 1
    out = standardised(images, None)
    assert (out[0, 0] == 0).all() and out[0, 1].std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_the_optimisation_is_that_of_nnssl(name: str) -> None:
    run = task_class(name).run_defaults
    assert (run.optimizer, run.initial_lr, run.weight_decay, run.schedule) == ("sgd", 1e-2, 3e-5, "poly")
