"""Samples per second of one CPU core that the pretext tasks make: this package, nnssl and PyMIC on the same volumes.

    python benchmarks/pretext_speed.py --nnssl <checkout of MIC-DKFZ/nnssl> --pymic <checkout of HiLab-git/PyMIC>

The two checkouts are imported from where they are; what they need (batchgenerators, deprecated, imageio, loguru,
pandas, pytorch-msssim, scikit-image; h5py, imops) must be installed. All volumes and patches are (X, Y, Z) in plans
axis order.

- A sample is all that is done from volumes in memory to the network's input and target: with our tasks' defaults, with
  the transforms of nnssl's `ModelGenesisTrainer` and `BaseMAETrainer` (which also rotates a fifth of the crops), and
  with the transforms of PyMIC's recipes (its Models Genesis is a recipe of its own: blocks of one size, intensities
  bent in blocks), collated into a batch of one as its DataLoader does. Volume Fusion is in fusion_speed.py.
- Read from files, a sample is what training takes of a core: ours and nnssl's read a crop of nnU-Net's blosc2 files;
  PyMIC's `NiftyDataset` reads the volume, compressed (.nii.gz) or not (.nii). Files are in the system's cache.
- The corruption alone starts from a crop. Our masks and swaps change it in place, because the target is another image
  by then, the crop with mean 0 and standard deviation 1; nnssl and PyMIC make a new image and keep the crop as target.

Times are those of the process (all threads), and all take turns, so that other load on the machine hits all.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from fusion_speed import NUM_VOLUMES, PATCH, VOLUME, make_volume, random_crop, write_cases
from provenance import device_name, provenance
from torch.utils.data import default_collate

from nnunetv2_misfm.pretrain.augment import CropAugmentation, sample_augmentation
from nnunetv2_misfm.pretrain.batches import CropBatch
from nnunetv2_misfm.pretrain.crop_reading import Crop, open_case, read_crop
from nnunetv2_misfm.pretrain.masked_autoencoder import MaskSettings, hide, sample_mask, voxel_masks
from nnunetv2_misfm.pretrain.models_genesis import ModelsGenesisSettings, corrupt, flip_crops, sample_corruption
from nnunetv2_misfm.pretrain.patch_swap import PatchSwapSettings, apply_swaps, sample_swaps
from nnunetv2_misfm.pretrain.tasks import default_settings, task_class

ROUNDS = 5
CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "pretext_speed.md"

PYMIC_FILES = (".nii.gz", ".nii")
# Of PyMIC's recipes.
PYMIC_BLOCK = [8, 16, 16]
PYMIC_SWAPS: dict[str, Any] = {"PatchSwaping_block_range": [20, 40], "PatchSwaping_block_size": PYMIC_BLOCK}
PYMIC_GENESIS: dict[str, Any] = {
    "LocalShuffling_probability": 1.0,
    "LocalShuffling_block_range": [32, 64],
    "LocalShuffling_block_size": PYMIC_BLOCK,
    "NonLinearTransform_probability": 0.8,
    "NonLinearTransform_block_range": [32, 64],
    "NonLinearTransform_block_size": PYMIC_BLOCK,
    "InOutPainting_probability": 0.9,
    "InPainting_probability": 0.8,
    "InPainting_block_range": [32, 64],
    "InPainting_block_size": PYMIC_BLOCK,
}

Job = Callable[[int], object]
Source = Callable[[int], Any]  # the index-th volume, (1, X, Y, Z): an array, or a file of which parts can be read
Comparison = tuple[str, Job, str, Job]  # what, ours, who else, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nnssl", type=Path, required=True, help="checkout of MIC-DKFZ/nnssl")
    parser.add_argument("--pymic", type=Path, required=True, help="checkout of HiLab-git/PyMIC")
    parser.add_argument("--samples", type=int, default=100, help="samples of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)  # PyMIC warns of a missing label
    volumes = [make_volume(seed) for seed in range(NUM_VOLUMES)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(volumes, folder)
        for index, volume in enumerate(volumes):
            for ending in PYMIC_FILES:
                sitk.WriteImage(sitk.GetImageFromArray(volume), folder / f"{index}{ending}")
        sources = {
            "sample": lambda index: volumes[index % NUM_VOLUMES][None],
            "sample from files": lambda index: open_case(folder / f"{index % NUM_VOLUMES}.b2nd", 1),
        }
        comparisons = [
            *nnssl_comparisons(arguments.nnssl, sources),
            *pymic_comparisons(arguments.pymic, sources, folder),
        ]
        milliseconds = measure(comparisons, arguments.samples)
    checkouts = {"nnssl": arguments.nnssl, "PyMIC": arguments.pymic}
    report = make_report(comparisons, milliseconds, checkouts, arguments.samples)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(report, encoding="utf-8")
    print(report)


# ---------------------------------------------------------------- ours


class VolumeReader:
    """What a task draws a sample with, as `SampleReader`, but from a volume that is open already."""

    num_channels, anisotropy = 1, 0
    patch_size = PATCH

    def __init__(self, volume: Any, name: str, seed: int):
        self.volume = volume
        self.augment = default_settings(name)["augmentation"]
        self.generator = np.random.default_rng(seed)

    def augmentation(self) -> CropAugmentation:
        return sample_augmentation(PATCH, self.augment, self.generator, 1)

    def read(self, augmentations: Sequence[CropAugmentation], overlap: Sequence[int] = (0, 0, 0)) -> list[Crop]:
        crops: list[Crop] = []
        for augmentation in augmentations:
            beside = crops[0] if crops else None
            crops.append(read_crop(self.volume, augmentation, PATCH, self.generator, beside, overlap))
        return crops


def our_sample(name: str, source: Source) -> Job:
    task = task_class(name)(task_class(name).Settings())

    def one_sample(index: int) -> object:
        crops, drawn = task.sample(VolumeReader(source(index), name, index))
        voxels = torch.cat([crop.voxels.flatten() for crop in crops])
        augmentations = tuple(crop.augmentation for crop in crops)
        return task.make(CropBatch(voxels, augmentations, (drawn,), PATCH, 1, 0, (), ()), CPU)

    return one_sample


def our_genesis(crop: torch.Tensor) -> Job:
    def one(index: int) -> object:
        drawn = [sample_corruption(PATCH, ModelsGenesisSettings(), np.random.default_rng(index), 1)]
        target = flip_crops(crop, drawn)
        return corrupt(target, drawn), target

    return one


def our_swaps(crop: torch.Tensor) -> Job:
    changed = crop.clone()
    return lambda index: apply_swaps(changed, [sample_swaps(PATCH, PatchSwapSettings(), np.random.default_rng(index))])


def our_masks(crop: torch.Tensor) -> Job:
    changed = crop.clone()

    def one(index: int) -> object:
        mask = sample_mask(PATCH, MaskSettings(), np.random.default_rng(index))
        return hide(changed, voxel_masks([mask], PATCH, MaskSettings(), CPU))

    return one


# ---------------------------------------------------------------- the others


def nnssl_comparisons(checkout: Path, sources: dict[str, Source]) -> list[Comparison]:
    if not hasattr(typing, "override"):  # nnssl asks for Python 3.12 for this decorator alone
        typing.override = lambda method: method  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout / "src"))
    from nnssl.training.nnsslTrainer.masked_image_modeling.BaseMAETrainer import BaseMAETrainer
    from nnssl.training.nnsslTrainer.models_genesis.ModelGenesisTrainer import ModelGenesisTrainer

    genesis = ModelGenesisTrainer.get_training_transforms()
    angles = dict.fromkeys("xyz", (-np.pi / 6, np.pi / 6))
    spatial = BaseMAETrainer.get_training_transforms(PATCH, angles, (0, 1, 2), False)
    no_labels = np.zeros((1, 1, *PATCH), np.float32)

    def of_crop(crop: np.ndarray, index: int) -> object:
        random.seed(index)
        np.random.seed(index)
        return genesis(data=crop[None].copy(), seg=no_labels.copy())

    def drawn_crop(source: Source, index: int) -> np.ndarray:
        return random_crop(source(index), (1, *PATCH), np.random.default_rng(index))

    def masked(data: torch.Tensor, index: int) -> object:
        torch.manual_seed(index)
        mask = BaseMAETrainer.mask_creation(1, PATCH, 0.75)
        for axis in (2, 3, 4):
            mask = mask.repeat_interleave(PATCH[axis - 2] // mask.shape[axis], dim=axis)
        return data * mask

    def genesis_sample(source: Source) -> Job:
        return lambda index: of_crop(drawn_crop(source, index), index)

    def masked_sample(source: Source) -> Job:
        def one(index: int) -> object:
            np.random.seed(index)
            return masked(spatial(data=drawn_crop(source, index)[None], seg=no_labels.copy())["data"], index)

        return one

    whole = {"models_genesis": genesis_sample, "masked_autoencoder": masked_sample}
    crop = first_crop(sources)
    return [
        *(
            (f"{name}, {what}", our_sample(name, source), "nnssl", theirs(source))
            for name, theirs in whole.items()
            for what, source in sources.items()
        ),
        ("models_genesis, corruption", our_genesis(crop), "nnssl", lambda index: of_crop(crop[0].numpy(), index)),
        ("masked_autoencoder, masking", our_masks(crop), "nnssl", lambda index: masked(crop, index)),
    ]


def pymic_comparisons(checkout: Path, sources: dict[str, Source], folder: Path) -> list[Comparison]:
    sys.path.insert(0, str(checkout))
    from pymic import TaskType
    from pymic.transform.trans_dict import TransformDict

    def recipe(*names: str, **options: Any) -> Callable[[np.ndarray, int], object]:
        parameters = {"task": TaskType.RECONSTRUCTION, **{name.lower(): value for name, value in options.items()}}
        transforms = [TransformDict[name](parameters) for name in names]

        def run(image: np.ndarray, index: int) -> object:
            random.seed(index)
            np.random.seed(index)
            sample: Any = {"image": image}
            for transform in transforms:
                sample = transform(sample)
            return sample

        return run

    size = list(PATCH)
    steps = ("SelfReconstructionLabel", "LocalShuffling", "NonLinearTransform", "InOutPainting")
    whole = {
        "models_genesis": recipe("RandomCrop", *steps, RandomCrop_output_size=size, **PYMIC_GENESIS),
        "patch_swap": recipe("RandomCrop", "PatchSwaping", RandomCrop_output_size=size, **PYMIC_SWAPS),
        "vox2vec": recipe("Crop4Vox2Vec", Crop4Vox2Vec_output_size=size, Crop4Vox2Vec_min_overlap=[48, 96, 96]),
    }

    def sample(run: Callable[[np.ndarray, int], object], source: Source) -> Job:
        return lambda index: default_collate([run(source(index), index)])

    ours, from_files = sources.items()
    pairs = [
        (*ours, ours[1]),
        *((f"{from_files[0]} ({end})", from_files[1], pymic_volumes(folder, end)) for end in PYMIC_FILES),
    ]
    crop = first_crop(sources)
    alone = recipe("PatchSwaping", **PYMIC_SWAPS)
    return [
        *(
            (f"{name}, {what}", our_sample(name, our_source), "PyMIC", sample(run, source))
            for name, run in whole.items()
            for what, our_source, source in pairs
        ),
        ("patch_swap, corruption", our_swaps(crop), "PyMIC", lambda index: alone(crop[0].numpy(), index)),
    ]


def pymic_volumes(folder: Path, ending: str) -> Source:
    """The volumes as its training reads them from files."""
    from pymic import TaskType
    from pymic.io.nifty_dataset import NiftyDataset

    table = folder / f"{ending}.csv"
    table.write_text("\n".join(["image", *(f"{index}{ending}" for index in range(NUM_VOLUMES))]), encoding="utf-8")
    dataset = NiftyDataset(str(folder), str(table), task=TaskType.RECONSTRUCTION)
    return lambda index: dataset[index % NUM_VOLUMES]["image"]


def first_crop(sources: dict[str, Source]) -> torch.Tensor:
    return torch.from_numpy(random_crop(sources["sample"](0), (1, *PATCH), np.random.default_rng(0)))[None]


# ---------------------------------------------------------------- measuring


def measure(comparisons: list[Comparison], samples: int) -> list[tuple[float, float]]:
    """CPU milliseconds per sample, ours and theirs, the means: most changes are made to some samples only."""
    spent = np.zeros((len(comparisons), 2))
    jobs = [(ours, theirs) for _, ours, _, theirs in comparisons]
    for pair in jobs:
        for job in pair:
            job(0)
    for chunk in np.array_split(np.arange(samples), ROUNDS):
        for row, pair in enumerate(jobs):
            for column, job in enumerate(pair):
                start = time.process_time()
                for index in chunk.tolist():
                    job(index)
                spent[row, column] += time.process_time() - start
    return [(ours, theirs) for ours, theirs in (1000 * spent / samples).tolist()]


def make_report(
    comparisons: list[Comparison],
    milliseconds: list[tuple[float, float]],
    checkouts: dict[str, Path],
    samples: int,
) -> str:
    rows = [
        f"| {what} | {ours:.1f} | {1000 / ours:.1f} | {who} | {theirs:.1f} | {theirs / ours:.1f}x |"
        for (what, _, who, _), (ours, theirs) in zip(comparisons, milliseconds, strict=True)
    ]
    packages = ("torch", "numpy", "scipy", "batchgenerators")
    command = "python benchmarks/pretext_speed.py --nnssl nnssl --pymic PyMIC"
    patch, volume = ("x".join(map(str, size)) for size in (PATCH, VOLUME))
    return "\n".join(
        [
            "# Speed of the pretext tasks' samples on one CPU core",
            "",
            f"Samples of {patch} from {NUM_VOLUMES} synthetic volumes of {volume} in memory, float32, one process and "
            f"one thread; mean CPU time of {samples} samples. `sample`: from a volume to input and target; "
            f"`from files`: with reading them, as in training, from nnU-Net's blosc2 files, PyMIC from those in "
            f"brackets; `corruption`: from a crop.",
            "",
            "| | ours, ms | samples per core-second | other | its ms | ours is faster by |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "PyMIC's patch swapping is a few copies of memory. Ours also looks for damaged and constant crops, "
            "normalises the target, keeps the blocks of a pair apart and swaps one pair after another, so that no "
            "value is lost. From volumes in memory twice its speed is out of reach: reading the crop, the "
            "copy that a batch is, the input and the normalised target alone take longer than its "
            "whole sample. In training PyMIC also has to read whole volumes, where ours reads crops.",
            "",
            *provenance(command, packages, checkouts, device_name("cpu")),
            "",
        ]
    )


if __name__ == "__main__":
    main()
