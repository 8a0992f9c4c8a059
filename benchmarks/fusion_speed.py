"""Fused, augmented samples per second of one CPU core: this package, nnssl and PyMIC on the same volumes.

    python benchmarks/fusion_speed.py --nnssl <checkout of MIC-DKFZ/nnssl> --pymic <checkout of HiLab-git/PyMIC>

The two checkouts are imported from where they are; what they need (batchgenerators, loguru; h5py, imops) must be
installed. All volumes and patches are (X, Y, Z) in plans axis order. Each implementation starts from volumes in memory
and makes samples with its own published augmentation:

- nnssl: `VolumeFusionTrainer.get_training_transforms`, two crops of patch size per sample
- PyMIC: `Crop4VolumeFusion` and `VolumeFusion` with their defaults
- ours: `AugmentSettings()` with boxes, and with blocks

When the training device is a GPU, the CPU only reads: the last row is the whole work of a data loading process, from
opening the files to the two crops, against nnssl's augmentation and fusion without its reading.

Times are those of the process (all threads) and the three take turns, so that other load on the machine hits all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from provenance import device_name, provenance
from scipy.ndimage import gaussian_filter

from nnunetv2_misfm.pretrain.augment import apply_augmentation, sample_augmentation
from nnunetv2_misfm.pretrain.crops import CropSamples
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings, VolumeFusion, fuse, sample_fusion

PATCH = (64, 128, 128)
VOLUME = (160, 256, 256)
NUM_VOLUMES = 3
ROUNDS = 4
RESULTS = Path(__file__).parent / "results" / "fusion_speed.md"

Job = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nnssl", type=Path, required=True, help="checkout of MIC-DKFZ/nnssl")
    parser.add_argument("--pymic", type=Path, required=True, help="checkout of HiLab-git/PyMIC")
    parser.add_argument(
        "--samples", type=int, default=150, help="samples of each implementation (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    volumes = [make_volume(seed) for seed in range(NUM_VOLUMES)]
    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            "nnssl": nnssl_job(arguments.nnssl, volumes),
            "PyMIC": pymic_job(arguments.pymic, volumes),
            "ours, boxes": our_job(volumes, FusionSettings()),
            "ours, blocks": our_job(volumes, FusionSettings(geometry="blocks")),
            "ours, reading two crops": reading_job(volumes, Path(folder)),
        }
        milliseconds = measure(jobs, arguments.samples)

    checkouts = {"nnssl": arguments.nnssl, "PyMIC": arguments.pymic}
    report = make_report(milliseconds, checkouts, arguments.samples)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(report, encoding="utf-8")
    print(report)


def make_volume(seed: int) -> np.ndarray:
    """Smooth structures with noise, cut off at air and at metal: float32, roughly from -1 to 2."""
    generator = np.random.default_rng(seed)
    volume = 8 * gaussian_filter(generator.standard_normal(VOLUME, dtype=np.float32), 2)
    volume += 0.1 * generator.standard_normal(VOLUME, dtype=np.float32)
    return np.clip(volume, -1, 2)


def our_job(volumes: list[np.ndarray], fusion_settings: FusionSettings) -> Job:
    def one_sample(index: int) -> object:
        generator = np.random.default_rng(index)
        fusion = sample_fusion(PATCH, fusion_settings, generator)
        augmentations = [sample_augmentation(PATCH, AugmentSettings(), generator, num_channels=1) for _ in range(2)]
        crops = [
            torch.from_numpy(random_crop(volumes[(index + i) % NUM_VOLUMES], augmentation.read_size, generator)[None])
            for i, augmentation in enumerate(augmentations)
        ]
        pair = apply_augmentation(crops, augmentations, PATCH)
        return fuse(pair[:1], pair[1:], [fusion], fusion_settings.num_fusion_classes)

    return one_sample


def write_cases(volumes: list[np.ndarray], folder: Path) -> None:
    """Write volumes as nnU-Net writes preprocessed cases, one channel each, under their numbers."""
    blocks, chunks = comp_blosc2_params((1, *VOLUME), PATCH)
    parameters = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
    for index, volume in enumerate(volumes):
        path = str(folder / f"{index}.b2nd")
        blosc2.asarray(volume[None], urlpath=path, chunks=chunks, blocks=blocks, cparams=parameters)


def reading_job(volumes: list[np.ndarray], folder: Path) -> Job:
    """A data loading process' work for one sample, from files."""
    write_cases(volumes, folder)
    names = [str(index) for index in range(len(volumes))]
    task = VolumeFusion(FusionSettings())
    samples = CropSamples(folder, names, PATCH, task, AugmentSettings(), seed=0, num_channels=1)
    return lambda index: samples[0, index, 0]


def nnssl_job(checkout: Path, volumes: list[np.ndarray]) -> Job:
    if not hasattr(typing, "override"):  # nnssl asks for Python 3.12 for this decorator alone
        typing.override = lambda method: method  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout / "src"))
    from nnssl.training.nnsslTrainer.volume_fusion.VolumeFusionTrainer import VolumeFusionTrainer

    # The attributes its constructor sets, for our patch size; the rest of a trainer is not needed here.
    trainer = SimpleNamespace(
        vf_mixing_coefficients=np.linspace(0, 1, 5),
        vf_subpatch_count=(10, 40),
        vf_subpatch_size=[(8, int(0.625 * n) + 1) for n in PATCH],
    )
    transforms = VolumeFusionTrainer.get_training_transforms(trainer, PATCH, None, (0, 1, 2), False)

    def one_sample(index: int) -> object:
        generator = np.random.default_rng(index)
        np.random.seed(index)
        pair = [random_crop(volumes[(index + i) % NUM_VOLUMES], PATCH, generator)[None] for i in range(2)]
        return transforms(data=np.stack(pair))

    return one_sample


def pymic_job(checkout: Path, volumes: list[np.ndarray]) -> Job:
    sys.path.insert(0, str(checkout))
    import random

    from pymic import TaskType
    from pymic.transform.crop4vf import Crop4VolumeFusion, VolumeFusion

    task = {"task": TaskType.RECONSTRUCTION}
    crop = Crop4VolumeFusion({"crop4volumefusion_output_size": list(PATCH), **task})
    fusion = VolumeFusion(task)

    def one_sample(index: int) -> object:
        random.seed(index)
        return fusion(crop({"image": volumes[index % NUM_VOLUMES][None]}))

    return one_sample


def random_crop(
    volume: blosc2.NDArray | np.ndarray, size: tuple[int, ...], generator: np.random.Generator
) -> np.ndarray:
    starts = generator.integers(0, np.subtract(volume.shape, size), endpoint=True).tolist()
    return np.array(volume[tuple(slice(a, a + n) for a, n in zip(starts, size, strict=True))])


def measure(jobs: dict[str, Job], samples: int) -> dict[str, float]:
    """CPU milliseconds per sample, the mean over all samples: most transforms are drawn for some samples only."""
    for job in jobs.values():
        job(0)
    spent = dict.fromkeys(jobs, 0.0)
    for chunk in np.array_split(np.arange(samples), ROUNDS):
        for name, job in jobs.items():
            start = time.process_time()
            for index in chunk.tolist():
                job(index)
            spent[name] += time.process_time() - start
    return {name: 1000 * seconds / samples for name, seconds in spent.items()}


def make_report(milliseconds: dict[str, float], checkouts: dict[str, Path], samples: int) -> str:
    nnssl, pymic = milliseconds["nnssl"], milliseconds["PyMIC"]
    rows = [
        f"| {name} | {ms:.1f} | {1000 / ms:.1f} | {nnssl / ms:.1f}x | {pymic / ms:.1f}x |"
        for name, ms in milliseconds.items()
    ]
    packages = ("torch", "numpy", "scipy", "blosc2", "batchgenerators")
    command = "python benchmarks/fusion_speed.py --nnssl nnssl --pymic PyMIC"
    patch, volume = ("x".join(map(str, size)) for size in (PATCH, VOLUME))
    return "\n".join(
        [
            "# Speed of augmentation and Volume Fusion on one CPU core",
            "",
            f"Fused {patch} samples from {NUM_VOLUMES} synthetic volumes of {volume}, float32, one process and one "
            f"thread; mean CPU time of {samples} samples.",
            "",
            "| | ms per sample | samples per core-second | against nnssl | against PyMIC |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "`reading two crops` is all that is left to the CPU when the training device is a GPU; the others' times "
            "do not include reading.",
            "",
            *provenance(command, packages, checkouts, device_name("cpu")),
            "",
        ]
    )


if __name__ == "__main__":
    main()
