"""Pictures of the documents: what each pretext task makes of a CT volume, and what a network makes of Volume Fusion.

    python benchmarks/pretext_pictures.py torso_ct.nii.gz [--output docs]

Made from `torso_ct_3mm.nii.gz`, a test file of wasserth/TotalSegmentator (Apache-2.0). Those of `pretext_tasks/` have
each task's defaults and show no training. For `images/volume_fusion.png`, that of the README, a small U-Net of nnU-Net
learns Volume Fusion of this volume (minutes on a CPU); the picture is of crops that are mixed anew.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from PIL import Image
from torch import Tensor

from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import CropSamples
from nnunetv2_misfm.pretrain.picture import Panel, classes, grey, write_panels
from nnunetv2_misfm.pretrain.planning import plain_unet_entry, plain_unet_stages
from nnunetv2_misfm.pretrain.reconstruction import Target
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.tasks import task_class
from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings, VolumeFusion
from nnunetv2_misfm.pretrain.vox2vec import Vox2Vec

PATCH = (64, 96, 96)
SEEDS = {"models_genesis": 8, "vox2vec": 1}  # with which each of the steps is seen
ROWS = 2
NUM_COLOURS = 64  # noise takes ten times the bytes of anatomy
# The picture of the README. Three fusion classes, few boxes, no augmentation: what minutes of training can learn.
TRAINED_PATCH = (8, 64, 64)
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
BATCH, FEATURES, LEARNING_RATE = 2, [8, 16, 32, 64], 4e-3
SEED_OF_README = 110  # with which both classes are seen well, of a dozen
BOXES = {"box_size_min": (0.25, 0.25, 0.25), "box_size_max": (0.75, 0.75, 0.75), "num_boxes": (3, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("volume", type=Path, help="a CT volume in Hounsfield units")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--iterations", type=int, default=1500, help="of the training for the picture of the README")
    options = parser.parse_args()
    image = sitk.DICOMOrient(sitk.ReadImage(str(options.volume)), "LPI")
    volume = np.clip(sitk.GetArrayFromImage(image) / 1000, -1, 1).astype(np.float32)[None]
    for name in ("pretext_tasks", "images"):
        (options.output / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "whole.npy", volume)
        for task in PRETEXT_TASKS:
            draw(task, folder, options.output / "pretext_tasks" / f"{task}.png")
        draw_anisotropy(volume, image.GetSpacing()[0], options.output / "images" / "anisotropy.png")
        network = trained(folder, options.iterations)
        draw_learnt(network, folder, options.output / "images" / "volume_fusion.png")


def fusion() -> VolumeFusion:
    """Volume Fusion of crops of one volume, as easy as it gets."""
    return VolumeFusion(FusionSettings(num_fusion_classes=3, pairs="same_volume", **BOXES))


def trained(folder: Path, iterations: int) -> torch.nn.Module:
    """A small U-Net of nnU-Net that has learnt to tell the fusion classes of one volume."""
    torch.manual_seed(0)
    task = fusion()
    entry = plain_unet_entry((3, 3, 3), TRAINED_PATCH)
    entry["arch_kwargs"] |= plain_unet_stages(FEATURES, STRIDES)
    network = get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 1, 3, deep_supervision=True
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, iterations, power=0.9)
    samples = CropSamples(folder, ["whole"], TRAINED_PATCH, task, AugmentSettings.off(), 0, 1)
    batches = crop_loader(samples, BATCH, iterations)
    for iteration in range(iterations):
        x, target = task.make(next(batches), torch.device("cpu"))
        loss = task.loss(network(x), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)  # as nnU-Net does
        optimiser.step()
        schedule.step()
        if iteration % 50 == 49:
            print(f"iteration {iteration + 1}: loss {loss.item():.3f}", flush=True)
    return network


def draw_learnt(network: torch.nn.Module, folder: Path, path: Path) -> None:
    """Fused samples that the network has not been trained on, their labels, and what it says."""
    task = fusion()
    samples = CropSamples(folder, ["whole"], TRAINED_PATCH, task, AugmentSettings.off(), SEED_OF_README, 1)
    x, target = task.make(next(crop_loader(samples, ROWS, 1)), torch.device("cpu"))
    with torch.no_grad():
        outputs = network(x)
    task.picture(path, x, target, outputs)
    fewer_colours(path)


def draw_anisotropy(volume: np.ndarray, spacing: float, path: Path) -> None:
    """A coronal section with slices as they are, merged in pairs and in fours: degrees of anisotropy 0, 1 and 2."""
    section = volume[0, : volume.shape[1] // 4 * 4, volume.shape[2] // 2]  # (z, x)
    panels = []
    for degree in DEGREES_OF_ANISOTROPY:
        merged = 2**degree
        slices = section.reshape(-1, merged, section.shape[1]).mean(1)
        shown = np.repeat(slices, merged, axis=0)
        title = f"degree {degree}: {merged * spacing:g} x {spacing:g} x {spacing:g} mm"
        panels.append(Panel(title, torch.from_numpy(shown)[None, None, None], grey))
    write_panels(path, panels)
    fewer_colours(path)


def draw(name: str, folder: Path, path: Path) -> None:
    task = task_class(name)(task_class(name).Settings())
    samples = CropSamples(folder, ["whole"], PATCH, task, task.augmentation_defaults, SEEDS.get(name, 0), 1)
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
    fewer_colours(path)


def fewer_colours(path: Path) -> None:
    """Make a PNG small."""
    Image.open(path).quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
