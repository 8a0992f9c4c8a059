"""Batches of samples: workers read crops and draw parameters, the training device does the rest.

Crops are (C, X, Y, Z) in plans axis order, so X is the depth; batches of patches are (B, C, X, Y, Z).
"""

from __future__ import annotations

import dataclasses
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nnunetv2_misfm.pretrain.augment import CropAugmentation, Size3, apply_augmentation, voxels_inside
from nnunetv2_misfm.pretrain.crops import CropReadError, CropSamples, Index, Sample, too_many_bad

MAX_SHARE_OF_BAD_CASES = 0.05
# Fewer cases than this say too little about the share of bad ones, unless they are all there are.
CASES_BEFORE_JUDGING = 100
WORKER_OUTLIVES_SIGTERM_SECONDS = 900  # longer than any step, also one that is compiled first


@dataclass(frozen=True, eq=False)
class CropBatch:
    """What the workers hand over for one batch: all crops in one flat tensor, so that one copy brings them to the GPU.

    Attributes:
        voxels: float32, the crops one after another: all of the first sample, then those of the next.
        augmentations: one for each crop, in the same order.
        drawn: the task's own parameters, for each sample.
        patch_size: (X, Y, Z) in voxels, which the crops are brought to.
        num_channels: C of every crop.
        anisotropy: the degree of anisotropy the crops were read for.
        cases, bad_cases: as in `Sample`, of all samples.
    """

    voxels: Tensor
    augmentations: tuple[CropAugmentation, ...]
    drawn: tuple[Any, ...]
    patch_size: Size3
    num_channels: int
    anisotropy: int
    cases: tuple[int, ...]
    bad_cases: tuple[tuple[int, str], ...]

    def pin_memory(self) -> CropBatch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return dataclasses.replace(self, voxels=self.voxels.pin_memory())

    @property
    def crops_per_sample(self) -> int:
        """How many crops each sample has."""
        return len(self.augmentations) // len(self.drawn)

    def patches(self, device: torch.device | str) -> list[Tensor]:
        """Augment the crops on `device`.

        Returns:
            float32 (B, C, *patch_size) for the first crop of every sample, then for the second of every sample, ...
        """
        voxels = self.voxels.to(device, non_blocking=True)
        shapes = [(self.num_channels, *augmentation.read_size) for augmentation in self.augmentations]
        pieces = voxels.split([int(np.prod(shape)) for shape in shapes])
        crops = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        number = self.crops_per_sample
        return [
            apply_augmentation(crops[first::number], self.augmentations[first::number], self.patch_size)
            for first in range(number)
        ]

    def in_volume(self, device: torch.device, which: int = 0) -> Tensor | None:
        """Which voxels of one crop of every sample lie in its volume: bool (B, 1, X, Y, Z), or None if all do."""
        augmentations = self.augmentations[which :: self.crops_per_sample]
        if all(augmentation.inside is None for augmentation in augmentations):
            return None
        return torch.stack([voxels_inside(one, self.patch_size, device)[None] for one in augmentations])


def crop_loader(
    samples: CropSamples,
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
) -> Iterator[CropBatch]:
    """Batches without end, epoch after epoch, always in the same order.

    Args:
        samples: what is drawn.
        batch_size: samples of a batch over all processes, each of which gets a slice of the same size; together the
            slices are the same for any number of processes.
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
        samples,
        batch_sampler=_endless_indices(
            batch_size, num_iterations, (start_epoch, start_iteration), tuple(anisotropy), rank, world_size
        ),
        num_workers=num_workers,
        collate_fn=partial(_collate, samples.patch_size),
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=pin_memory,
        # Its own generator, so that starting a loader does not shift torch's random numbers in the training process.
        generator=torch.Generator(),
    )
    return _watch(loader, samples, report)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Clusters and terminals signal all processes of a job; workers have to live until the trainer has saved.

    They end with the trainer, which tells them to. One that is told by SIGTERM alone ends a while later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where nobody sends SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_OUTLIVES_SIGTERM_SECONDS))


def _endless_indices(
    batch_size: int,
    num_iterations: int,
    start: tuple[int, int],
    anisotropy: tuple[int, ...],
    rank: int,
    world_size: int,
) -> Iterator[list[Index]]:
    """The indices of one process' slice of every batch; arguments are looked at when it is called."""
    if not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(
            f"rank {rank} of {world_size} processes cannot get a slice of batches of {batch_size} samples; there "
            "must be as many for each process"
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
    of_process = batch_size // world_size
    positions = range(rank * of_process, (rank + 1) * of_process)
    steps = count(start_epoch * num_iterations + start_iteration)
    return (
        [(epoch, iteration * batch_size + p, anisotropy[iteration % len(anisotropy)]) for p in positions]
        for epoch, iteration in (divmod(step, num_iterations) for step in steps)
    )


def _collate(patch_size: Size3, samples: Sequence[Sample]) -> CropBatch:
    crops = [crop for sample in samples for crop in sample.crops]
    return CropBatch(
        voxels=torch.cat([crop.voxels.flatten() for crop in crops]),
        augmentations=tuple(crop.augmentation for crop in crops),
        drawn=tuple(sample.drawn for sample in samples),
        patch_size=patch_size,
        num_channels=crops[0].voxels.shape[0],
        anisotropy=crops[0].augmentation.slices_averaged.bit_length() - 1,
        cases=tuple(case for sample in samples for case in sample.cases),
        bad_cases=tuple(bad for sample in samples for bad in sample.bad_cases),
    )


def _with_their_own_words(batches: Iterable[CropBatch]) -> Iterator[CropBatch]:
    """The batches; what PyTorch puts around the message of an error in another process is taken off again."""
    try:
        yield from batches
    except (CropReadError, MemoryError) as error:
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].rstrip()) from None


def _watch(batches: Iterable[CropBatch], samples: CropSamples, report: Callable[[str], None]) -> Iterator[CropBatch]:
    """Pass batches on, report each bad case once, and give up when there are too many.

    Reading begins with the first batch that is asked for: nnU-Net unpacks arrays of its old form after it has made the
    loaders.
    """
    tried: set[int] = set()
    bad: dict[int, str] = {}
    for batch in _with_their_own_words(batches):
        tried.update(batch.cases)
        for case, reason in batch.bad_cases:
            tried.add(case)
            if case not in bad:
                bad[case] = f"{samples.file_of(case)}: {reason}"
                report(f"a case cannot be used and is replaced by another ({len(bad)} so far): {bad[case]}")
        enough = len(tried) >= min(samples.num_cases, CASES_BEFORE_JUDGING)
        if enough and len(bad) > MAX_SHARE_OF_BAD_CASES * len(tried):
            raise too_many_bad(f"{len(bad)} of {len(tried)} cases tried cannot be used", bad.values())
        yield batch
