"""Random pairs of sub-volumes from nnU-Net's preprocessed cases, and the fused batches made of them.

Crops are (C, X, Y, Z) in plans axis order, so X is the depth; fused batches are (B, C, X, Y, Z).

The CPU reads, the training device does the rest: workers read crops and draw parameters, `fuse_batch` augments and
fuses on the device. Sample i of epoch e depends on (seed, e, i) alone, so the number of workers, the number of
processes and a resumed run change nothing. Cases are opened one at a time, when a crop of them is wanted, and only the
blocks under the crop are read.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.pretrain.augment import (
    CropAugmentation,
    apply_augmentation,
    sample_pair_augmentations,
)
from nnunetv2_misfm.pretrain.crop_reading import Crop, case_file, open_case, read_crop
from nnunetv2_misfm.pretrain.settings import AugmentSettings, FusionSettings
from nnunetv2_misfm.pretrain.volume_fusion import Fusion, fuse, sample_fusion

Index = tuple[int, int, int]  # epoch, sample within the epoch, degree of anisotropy

MAX_BAD_CASES_PER_SAMPLE = 10
MAX_SHARE_OF_BAD_CASES = 0.05
# Fewer cases than this say too little about the share of bad ones, unless they are all there are.
CASES_BEFORE_JUDGING = 100


WORKER_OUTLIVES_SIGTERM_SECONDS = 60


class CropReadError(UserError, RuntimeError):
    """Crops cannot be read; the message names the files, what is wrong with them and what to do."""


@dataclass(frozen=True, eq=False)
class PairSample:
    """Two crops as they were read, and what is to be done with them.

    Attributes:
        foreground, background: float32 (C, *read_size of their augmentation).
        foreground_augmentation, background_augmentation: applied before fusing.
        fusion: the cuboids of the fused image.
        cases: positions in the list of identifiers of the cases that were read, the foreground's first.
        bad_cases: position and reason of every case that was drawn, could not be used and was replaced.
    """

    foreground: Tensor
    background: Tensor
    foreground_augmentation: CropAugmentation
    background_augmentation: CropAugmentation
    fusion: Fusion
    cases: tuple[int, ...]
    bad_cases: tuple[tuple[int, str], ...]


@dataclass(frozen=True, eq=False)
class FuseBatch:
    """What the workers hand over for one batch: all crops in one flat tensor, so that one copy brings them to the GPU.

    Attributes:
        voxels: float32, the crops one after another: foreground and background of the first sample, then the next.
        augmentations: two for each sample, in the same order.
        fusions: one for each sample.
        num_channels: C of every crop.
        anisotropy: the degree of anisotropy the crops were read for.
        cases, bad_cases: as in `PairSample`, of all samples.
    """

    voxels: Tensor
    augmentations: tuple[CropAugmentation, ...]
    fusions: tuple[Fusion, ...]
    num_channels: int
    anisotropy: int
    cases: tuple[int, ...]
    bad_cases: tuple[tuple[int, str], ...]

    def pin_memory(self) -> FuseBatch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return dataclasses.replace(self, voxels=self.voxels.pin_memory())


class CropPairs(Dataset[PairSample]):
    """Map-style dataset of endless pairs; an item is asked for by (epoch, sample, degree of anisotropy).

    Args:
        folder: a configuration's folder of preprocessed cases of shape (C, X, Y, Z), see `case_file`. Nothing else in
            it is opened, and it is not listed.
        identifiers: the cases to draw from, all equally often.
        patch_size: (X, Y, Z) in voxels.
        fusion, augment: how samples are made.
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
        fusion: FusionSettings,
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
                "pairs need a patch of three positive sizes, at least one channel and a seed of at least 0, not "
                f"patch_size {tuple(patch_size)}, num_channels {num_channels}, seed {seed}"
            )
        self.folder = Path(folder)
        self.patch_size = tuple(int(n) for n in patch_size)
        self.fusion = fusion
        self.augment = augment
        self.seed = seed
        self.num_channels = num_channels
        self.fixed = fixed
        self._identifiers = _SharedStrings(identifiers)

    @property
    def num_cases(self) -> int:
        """How many cases there are to draw from."""
        return len(self._identifiers)

    def file_of(self, case: int) -> Path:
        """The file of the case at a position in the list of identifiers."""
        return case_file(self.folder, self._identifiers[case])

    def __getitem__(self, index: Index) -> PairSample:
        """Draw and read one pair.

        Raises:
            CropReadError: if too many of the cases drawn for it cannot be used.
        """
        epoch, sample, anisotropy = index
        # The first number keeps training and fixed samples apart whatever the seed.
        key = (1, sample) if self.fixed else (0, epoch, sample)
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        fusion = sample_fusion(self.patch_size, self.fusion, generator)
        drawn = sample_pair_augmentations(self.patch_size, self.augment, generator, self.num_channels, anisotropy)
        cases = _RandomCases(self, generator)
        if self.fusion.two_volumes:
            foreground, background = (cases.read([augmentation])[0] for augmentation in drawn)
        else:
            foreground, background = cases.read(drawn)
        return PairSample(
            foreground.voxels,
            background.voxels,
            foreground.augmentation,
            background.augmentation,
            fusion,
            tuple(cases.used),
            tuple(cases.bad.items()),
        )


def validation_pairs(
    folder: str | os.PathLike[str],
    identifiers: Sequence[str],
    patch_size: Sequence[int],
    fusion: FusionSettings,
    seed: int,
    num_channels: int,
) -> CropPairs:
    """Pairs that are the same in every epoch and are fused without augmentation; arguments as for `CropPairs`."""
    return CropPairs(folder, identifiers, patch_size, fusion, AugmentSettings.off(), seed, num_channels, fixed=True)


def pair_loader(
    pairs: CropPairs,
    batch_size: int,
    num_iterations: int,
    *,
    start_epoch: int = 0,
    start_iteration: int = 0,
    anisotropy: Sequence[int] = (0,),
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    report: Callable[[str], None] = warnings.warn,
) -> Iterator[FuseBatch]:
    """Batches without end, epoch after epoch, always in the same order.

    Args:
        batch_size: samples of a batch over all processes. Each process gets its slice, the first ones one sample more
            if it does not divide evenly, as in nnU-Net; together the slices are the same for any number of processes.
        num_iterations: batches per epoch.
        start_epoch, start_iteration: epoch of the first batch and its place in it, to resume.
        anisotropy: degrees of anisotropy that the batches of an epoch take turns in.
        num_workers: processes that read; 0 reads in this one.
        rank, world_size: which of how many training processes this is.
        pin_memory: hand over batches in page-locked memory.
        report: told once about each case that cannot be used.

    Raises:
        ValueError: if an argument is out of range.
        CropReadError: from the iterator, if more than 5 % of the cases tried cannot be used.
    """
    loader = DataLoader(
        pairs,
        batch_sampler=_EndlessBatches(
            batch_size, num_iterations, (start_epoch, start_iteration), tuple(anisotropy), rank, world_size
        ),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=pin_memory,
        # Its own generator, so that starting a loader does not shift torch's random numbers in the training process.
        generator=torch.Generator(),
    )
    return _watch(iter(loader), pairs, report)


@torch.no_grad()
def fuse_batch(
    batch: FuseBatch, patch_size: Sequence[int], device: torch.device | str, num_fusion_classes: int
) -> tuple[Tensor, Tensor]:
    """Augment and fuse a batch on `device`.

    Returns:
        the fused images (B, C, *patch_size), float32, and their labels (B, 1, *patch_size), int16.
    """
    voxels = batch.voxels.to(device, non_blocking=True)
    shapes = [(batch.num_channels, *augmentation.read_size) for augmentation in batch.augmentations]
    pieces = voxels.split([int(np.prod(shape)) for shape in shapes])
    crops = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    foreground = apply_augmentation(crops[0::2], batch.augmentations[0::2], patch_size)
    background = apply_augmentation(crops[1::2], batch.augmentations[1::2], patch_size)
    return fuse(foreground, background, batch.fusions, num_fusion_classes)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Clusters and terminals signal all processes of a job; workers have to live until the trainer has saved.

    They end with the trainer, which tells them to. One that is told by SIGTERM alone ends a while later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where nobody sends SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_OUTLIVES_SIGTERM_SECONDS))


class _SharedStrings:
    """A list of strings in two tensors, which worker processes share instead of copying, however they are started."""

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode() for string in strings]
        self._text = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self._stops = torch.tensor(list(accumulate(map(len, encoded))))

    def __len__(self) -> int:
        return len(self._stops)

    def __getitem__(self, index: int) -> str:
        start = int(self._stops[index - 1]) if index else 0
        return self._text[start : int(self._stops[index])].numpy().tobytes().decode()


class _EndlessBatches(Sampler[list[Index]]):
    """The indices of one process' slice of every batch."""

    def __init__(
        self,
        batch_size: int,
        num_iterations: int,
        start: tuple[int, int],
        anisotropy: tuple[int, ...],
        rank: int,
        world_size: int,
    ):
        if not 0 <= rank < world_size or batch_size < world_size:
            raise ValueError(
                f"rank {rank} of {world_size} processes cannot get a slice of batches of {batch_size} samples; there "
                "must be at least one sample for each process"
            )
        start_epoch, start_iteration = start
        if (
            num_iterations < 1
            or min(start) < 0
            or start_iteration >= num_iterations
            or not anisotropy
            or min(anisotropy) < 0
        ):
            raise ValueError(
                "batches need at least one iteration per epoch, an epoch and iteration to start at and degrees of "
                f"anisotropy of at least 0, not num_iterations {num_iterations}, start {start}, anisotropy {anisotropy}"
            )
        self.batch_size = batch_size
        self.num_iterations = num_iterations
        self.start_epoch = start_epoch
        self.start_iteration = start_iteration
        self.anisotropy = anisotropy
        share, remainder = divmod(batch_size, world_size)
        first = rank * share + min(rank, remainder)
        self.slice = range(first, first + share + (rank < remainder))

    def __iter__(self) -> Iterator[list[Index]]:
        for epoch in count(self.start_epoch):
            first = self.start_iteration if epoch == self.start_epoch else 0
            for iteration in range(first, self.num_iterations):
                degree = self.anisotropy[iteration % len(self.anisotropy)]
                yield [(epoch, iteration * self.batch_size + position, degree) for position in self.slice]


def _collate(samples: Sequence[PairSample]) -> FuseBatch:
    crops = [crop for s in samples for crop in (s.foreground, s.background)]
    augmentations = tuple(a for s in samples for a in (s.foreground_augmentation, s.background_augmentation))
    return FuseBatch(
        voxels=torch.cat([crop.flatten() for crop in crops]),
        augmentations=augmentations,
        fusions=tuple(s.fusion for s in samples),
        num_channels=crops[0].shape[0],
        anisotropy=augmentations[0].slices_averaged.bit_length() - 1,
        cases=tuple(case for s in samples for case in s.cases),
        bad_cases=tuple(bad for s in samples for bad in s.bad_cases),
    )


def _watch(batches: Iterator[FuseBatch], pairs: CropPairs, report: Callable[[str], None]) -> Iterator[FuseBatch]:
    """Pass batches on, report each bad case once, and give up when there are too many."""
    tried: set[int] = set()
    bad: dict[int, str] = {}
    for batch in batches:
        tried.update(batch.cases)
        for case, reason in batch.bad_cases:
            tried.add(case)
            if case not in bad:
                bad[case] = f"{pairs.file_of(case)}: {reason}"
                report(f"a case cannot be used and is replaced by another ({len(bad)} so far): {bad[case]}")
        enough = len(tried) >= min(pairs.num_cases, CASES_BEFORE_JUDGING)
        if enough and len(bad) > MAX_SHARE_OF_BAD_CASES * len(tried):
            raise _too_many_bad(f"{len(bad)} of {len(tried)} cases tried cannot be used", bad.values())
        yield batch


def _too_many_bad(what: str, named: Iterable[str]) -> CropReadError:
    lines = "\n".join(f"  - {line}" for line in list(named)[:20])
    return CropReadError(f"{what}:\n{lines}\nPreprocess these cases again or take them out of the pool.")


class _RandomCases:
    """Reads crops for one sample, each time from a case that was not drawn for it before."""

    def __init__(self, pairs: CropPairs, generator: np.random.Generator):
        self.pairs = pairs
        self.generator = generator
        self.used: list[int] = []
        self.bad: dict[int, str] = {}

    def read(self, augmentations: Sequence[CropAugmentation]) -> list[Crop]:
        """One crop per augmentation, all from one newly drawn case; a case that cannot be used is replaced."""
        while len(self.bad) < min(self.pairs.num_cases, MAX_BAD_CASES_PER_SAMPLE):
            case = self._draw()
            path = self.pairs.file_of(case)
            try:
                volume = open_case(path, self.pairs.num_channels)
                crops = [read_crop(volume, a, self.pairs.patch_size, self.generator) for a in augmentations]
            except MemoryError as error:
                raise MemoryError(f"not enough memory to read a crop of {path}") from error
            except Exception as error:  # whatever a damaged file makes blosc2 raise
                self.bad[case] = f"{type(error).__name__}: {error}"
                continue
            self.used.append(case)
            return crops
        named = (f"{self.pairs.file_of(case)}: {reason}" for case, reason in self.bad.items())
        raise _too_many_bad(f"all {len(self.bad)} cases drawn for one sample cannot be used", named)

    def _draw(self) -> int:
        """A case other than those drawn before; if there is no other, the one that was used before."""
        excluded = {*self.used, *self.bad}
        if len(excluded) == self.pairs.num_cases:
            return self.used[0]
        case = int(self.generator.integers(self.pairs.num_cases - len(excluded)))
        for other in sorted(excluded):
            case += case >= other
        return case
