"""What a pretext task draws its samples from: random crops of nnU-Net's preprocessed cases.

Crops are (C, X, Y, Z) in plans axis order, so X is the depth.

Sample i of epoch e depends on (seed, e, i) and the list of cases alone, so the number of workers, the number of
processes and a resumed run change nothing. A run that goes on in a pool that has grown draws other samples. Cases are
opened one at a time, when a crop of them is wanted, and only the blocks under the crop are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.pretrain.augment import CropAugmentation, Size3, sample_augmentation
from nnunetv2_misfm.pretrain.crop_reading import Crop, case_file, open_case, read_crop
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.task import PretextTask

Index = tuple[int, int, int]  # epoch, sample within the epoch, degree of anisotropy

MAX_BAD_CASES_PER_SAMPLE = 10


class CropReadError(UserError, RuntimeError):
    """Crops cannot be read; the message names the files, what is wrong with them and what to do."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Crops as they were read, and what else was drawn for them.

    Attributes:
        crops: as many as the task reads for a sample.
        drawn: the task's own parameters; plain values and numpy arrays.
        cases: positions in the list of identifiers of the cases that were read, in the order in which they were.
        bad_cases: position and reason of every case that was drawn, could not be used and was replaced.
    """

    crops: tuple[Crop, ...]
    drawn: Any
    cases: tuple[int, ...]
    bad_cases: tuple[tuple[int, str], ...]


class CropSamples(Dataset[Sample]):
    """Map-style dataset of endless samples; an item is asked for by (epoch, sample, degree of anisotropy).

    Args:
        folder: a configuration's folder of preprocessed cases of shape (C, X, Y, Z), see `case_file`. Nothing else in
            it is opened, and it is not listed.
        identifiers: the cases to draw from, all equally often.
        patch_size: (X, Y, Z) in voxels.
        task: draws the samples.
        augment: how crops are augmented.
        seed: of every random choice.
        num_channels: C, which every case must have.
        fixed: the same samples in every epoch, from random numbers of their own.

    Raises:
        ValueError: if there are no identifiers or a number is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identifiers: Sequence[str],
        patch_size: Sequence[int],
        task: PretextTask,
        augment: AugmentSettings,
        seed: int,
        num_channels: int,
        *,
        fixed: bool = False,
    ):
        if len(identifiers) == 0:
            raise ValueError(f"there are no cases to draw from in {folder}: the list of identifiers is empty")
        if len(patch_size) != 3 or min(patch_size) < 1 or num_channels < 1 or seed < 0:
            raise ValueError(
                "samples need a patch of three positive sizes, at least one channel and a seed of at least 0, not "
                f"patch_size {tuple(patch_size)}, num_channels {num_channels}, seed {seed}"
            )
        self.folder = Path(folder)
        x, y, z = (int(n) for n in patch_size)
        self.patch_size: Size3 = (x, y, z)
        self.task = task
        self.augment = augment
        self.seed = seed
        self.num_channels = num_channels
        self.fixed = fixed
        # In one block of memory: processes that are forked would copy a list of strings as soon as they read it.
        self._identifiers = np.array([os.fsencode(identifier) for identifier in identifiers])

    @property
    def num_cases(self) -> int:
        """How many cases there are to draw from."""
        return len(self._identifiers)

    def file_of(self, case: int) -> Path:
        """The file of the case at a position in the list of identifiers."""
        return case_file(self.folder, os.fsdecode(self._identifiers[case]))

    def __getitem__(self, index: Index) -> Sample:
        """Draw and read one sample.

        Raises:
            CropReadError: if too many of the cases drawn for it cannot be used.
        """
        epoch, sample, anisotropy = index
        # The first number keeps training and fixed samples apart whatever the seed.
        key = (1, sample) if self.fixed else (0, epoch, sample)
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        reader = SampleReader(self, generator, anisotropy)
        crops, drawn = self.task.sample(reader)
        return Sample(tuple(crops), drawn, tuple(reader.used), tuple(reader.bad.items()))


def validation_samples(
    folder: str | os.PathLike[str],
    identifiers: Sequence[str],
    patch_size: Sequence[int],
    task: PretextTask,
    seed: int,
    num_channels: int,
) -> CropSamples:
    """Samples that are the same in every epoch, of crops that are not augmented; arguments as for `CropSamples`."""
    return CropSamples(folder, identifiers, patch_size, task, AugmentSettings.off(), seed, num_channels, fixed=True)


def too_many_bad(what: str, named: Iterable[str]) -> CropReadError:
    """The error for more bad cases than a run should go on with; `named` are their files with the reasons."""
    lines = "\n".join(f"  - {line}" for line in list(named)[:20])
    return CropReadError(f"{what}:\n{lines}\nPreprocess these cases again or take them out of the pool.")


class SampleReader:
    """What a task draws one sample with: random numbers, and crops of random cases.

    Attributes:
        generator: of every random choice of this sample.
        patch_size: (X, Y, Z) in voxels.
        augment: how crops are augmented.
        num_channels: C of every crop.
        anisotropy: the degree of anisotropy that crops are read for.
        fixed: whether the sample is one of those that are the same in every epoch.
        used, bad: positions of the cases read, and of those that could not be used with the reason.
    """

    def __init__(self, samples: CropSamples, generator: np.random.Generator, anisotropy: int):
        self._samples = samples
        self.generator = generator
        self.patch_size = samples.patch_size
        self.augment = samples.augment
        self.num_channels = samples.num_channels
        self.anisotropy = anisotropy
        self.fixed = samples.fixed
        self.used: list[int] = []
        self.bad: dict[int, str] = {}

    def augmentation(self) -> CropAugmentation:
        """Draw what is done to one crop."""
        return sample_augmentation(self.patch_size, self.augment, self.generator, self.num_channels, self.anisotropy)

    def read(self, augmentations: Sequence[CropAugmentation], overlap: Sequence[int] | None = None) -> list[Crop]:
        """One crop per augmentation, all from one case that was not read for this sample before.

        A case that cannot be used is replaced by another.

        Args:
            augmentations: what the crops are read for.
            overlap: voxels (X, Y, Z) of the patch that the other crops share with the first at least; None lets all of
                them lie anywhere.

        Raises:
            CropReadError: if too many cases cannot be used.
        """
        while len(self.bad) < min(self._samples.num_cases, MAX_BAD_CASES_PER_SAMPLE):
            case = self._draw()
            path = self._samples.file_of(case)
            crops: list[Crop] = []
            try:
                volume = open_case(path, self.num_channels)
                for augmentation in augmentations:
                    beside = crops[0] if crops and overlap is not None else None
                    crop = read_crop(
                        volume, augmentation, self.patch_size, self.generator, beside, overlap or (0, 0, 0)
                    )
                    crops.append(crop)
            except MemoryError as error:
                raise MemoryError(f"not enough memory to read a crop of {path}") from error
            except Exception as error:  # whatever a damaged file makes blosc2 raise
                self.bad[case] = f"{type(error).__name__}: {error}"
                continue
            self.used.append(case)
            return crops
        named = (f"{self._samples.file_of(case)}: {reason}" for case, reason in self.bad.items())
        raise too_many_bad(f"all {len(self.bad)} cases drawn for one sample cannot be used", named)

    def _draw(self) -> int:
        """A case other than those drawn before; if there is no other, the one that was used before."""
        excluded = {*self.used, *self.bad}
        if len(excluded) == self._samples.num_cases:
            return self.used[0]
        case = int(self.generator.integers(self._samples.num_cases - len(excluded)))
        for other in sorted(excluded):
            case += case >= other
        return case
