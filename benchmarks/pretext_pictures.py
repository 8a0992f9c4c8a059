"""The pictures of docs/pretext_tasks.md: what each task makes of a CT volume, before any training.

    python benchmarks/pretext_pictures.py torso_ct.nii.gz [--output docs/pretext_tasks]

Made from `torso_ct_3mm.nii.gz`, a test file of wasserth/TotalSegmentator (Apache-2.0), with each task's defaults.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from PIL import Image
from torch import Tensor

from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import CropSamples
from nnunetv2_misfm.pretrain.picture import Panel, classes, grey, write_panels
from nnunetv2_misfm.pretrain.reconstruction import Target
from nnunetv2_misfm.pretrain.tasks import task_class
from nnunetv2_misfm.pretrain.vox2vec import Vox2Vec

PATCH = (64, 96, 96)
SEEDS = {"models_genesis": 8, "vox2vec": 1}  # with which each of the steps is seen
ROWS = 2
NUM_COLOURS = 64  # noise takes ten times the bytes of anatomy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("volume", type=Path, help="a CT volume in Hounsfield units")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "pretext_tasks")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    voxels = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(options.volume)), "LPI"))
    volume = np.clip(voxels / 1000, -1, 1).astype(np.float32)[None]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "0.npy", volume)
        for name in PRETEXT_TASKS:
            draw(name, Path(folder), options.output / f"{name}.png")


def draw(name: str, folder: Path, path: Path) -> None:
    task = task_class(name)(task_class(name).Settings())
    samples = CropSamples(folder, ["0"], PATCH, task, task.augmentation_defaults, SEEDS.get(name, 0), 1)
    x, target = task.make(next(crop_loader(samples, ROWS, 1)), torch.device("cpu"))
    if isinstance(task, Vox2Vec):
        # Vectors of the voxels themselves, which find every voxel again.
        perfect = torch.eye(target.points.shape[1]).expand(2 * ROWS, -1, -1)
        task.picture(path, x, target, perfect)
    elif isinstance(target, Target):
        write_panels(path, [Panel("input", x, grey, like=target.image), Panel("target", target.image, grey)])
    else:
        assert isinstance(target, Tensor)
        write_panels(path, [Panel("input", x, grey), Panel("target", target, classes(int(target.max()) + 1))])
    Image.open(path).quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
