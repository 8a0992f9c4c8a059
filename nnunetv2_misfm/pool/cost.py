"""What preparing volumes costs in time and disk, from the first of them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_misfm.plans.files import nnunet_folder
from nnunetv2_misfm.pool.case import PREPARED, CaseResult, CaseTask, check_expected_size, prepare_case
from nnunetv2_misfm.pool.folder import PoolFolder
from nnunetv2_misfm.pool.inspection import PoolError, PoolInspection, find_volumes
from nnunetv2_misfm.pool.plan import expected_shape, layout_hash
from nnunetv2_misfm.pool.share import BUNDLES
from nnunetv2_misfm.pool.volume_files import VolumeProblem
from nnunetv2_misfm.pool.volumes import Volume
from nnunetv2_misfm.pool.wanted import Wanted
from nnunetv2_misfm.units import format_bytes, format_duration

MEASURED_FIRST = 3
"""Volumes prepared before time and disk are estimated; they stay in the temporary folder until the rest will fit."""
BYTES_PER_VOXEL = 4
ENOUGH_VOLUMES = 100
"""By which an archive is judged that is not looked at whole."""


def typical_first(tasks: Sequence[CaseTask]) -> list[CaseTask]:
    """The volumes in their order, but a small, a middling and a large one first, from which the rest is estimated."""
    by_size = sorted(range(len(tasks)), key=lambda index: _work(tasks[index]))
    count = min(MEASURED_FIRST, len(tasks))
    first = [by_size[(2 * number + 1) * len(tasks) // (2 * count)] for number in range(count)]
    return [tasks[index] for index in [*first, *(index for index in range(len(tasks)) if index not in first)]]


def check_disk(
    folder: Path, measured: Sequence[CaseResult], tasks: Sequence[CaseTask], num_processes: int, num_parts: int
) -> str:
    """Tell time and disk for the rest of the tasks from those measured.

    Args:
        folder: of the arrays.
        measured: the first volumes.
        tasks: all volumes of this part.
        num_processes: of this part.
        num_parts: that have still to do theirs, this one among them; their shares are equal.

    Raises:
        PoolError: if the volumes of all these parts will not fit.
    """
    rest = len(tasks) - len(measured)
    seconds_per_work, bytes_per_work = _per_work(measured, tasks)
    done = {result.record.source for result in measured}
    work_left = sum(_work(task) for task in tasks if task.volume.source not in done)
    needed, free = bytes_per_work * work_left, shutil.disk_usage(folder).free
    if num_parts * needed > free:
        others = f" and those of the {num_parts - 1} other parts that are not done" if num_parts > 1 else ""
        raise PoolError(
            f"the remaining {rest} volumes{others} need about {format_bytes(num_parts * needed)} in {folder}, "
            f"but only {format_bytes(free)} are free; make room, or use a coarser spacing or fewer volumes"
        )
    time_left = format_duration(seconds_per_work * work_left / num_processes / 3600)
    return (
        f"Measured on {len(measured)} of {len(tasks)} volumes: the rest takes about {time_left} and "
        f"{format_bytes(needed)} of the {format_bytes(free)} that are free"
    )


@dataclass(frozen=True)
class Sample:
    """Some bundles of an archive."""

    inspection: PoolInspection
    share: float
    """Of the archive."""
    seconds: float
    """That reading the headers took."""


def sample_volumes(folders: Sequence[Path], join_channels: bool, num_processes: int) -> Sample:
    """Look at one bundle of the archive, or at as many as it takes to find `ENOUGH_VOLUMES`.

    Raises:
        UserError: naming every folder that does not exist.
    """
    count = 1
    while True:
        started = time.monotonic()
        inspection = find_volumes(folders, join_channels, num_processes, range(count))
        if len(inspection.volumes) >= ENOUGH_VOLUMES or count == BUNDLES:
            return Sample(inspection, count / BUNDLES, time.monotonic() - started)
        count *= 4


def estimate(sample: Sample, plans: Mapping[str, Any], configuration: str, num_processes: int) -> str:
    """Prepare a few volumes of the sample in a folder that is removed, and tell what the archive will take.

    Raises:
        PoolError: if no volume of the sample can be used.
    """
    volumes, target = sample.inspection.volumes, nnunet_folder("nnUNet_preprocessed")
    target.mkdir(parents=True, exist_ok=True)
    done = _prepared(volumes, plans, configuration)
    with tempfile.TemporaryDirectory(dir=target) as folder:
        wanted = Wanted.by_plans(plans, configuration)
        problems = [(one, wanted.problem_of(one)) for one in volumes]
        unwanted = [f"{one.source}: {problem}" for one, problem in problems if problem]
        new = [one for one, problem in problems if not problem and one.case not in done]
        usable, wrong_size = _by_size([CaseTask(one, plans, configuration, "", Path(folder)) for one in new])
        if done and not usable:
            return "All usable volumes that were looked at are in the pool already"
        if not usable:
            raise PoolError(f"no usable volume in the given folders; the first is {[*wrong_size, *unwanted][0]}")
        tasks = typical_first(usable)
        measured = [prepare_case(task) for task in tasks[:MEASURED_FIRST]]
    seconds_per_work, bytes_per_work = _per_work(measured, tasks)
    work = sum(map(_work, tasks)) / sample.share
    hours = (seconds_per_work * work + sample.seconds / sample.share) / 3600
    free = format_bytes(shutil.disk_usage(target).free)
    read = format_bytes(sum(volume.num_bytes for volume in volumes) / sample.share)
    left_out = [f"{one.record.source}: {one.record.reason}" for one in measured if one.record.status != PREPARED]
    if unwanted:
        left_out.append(f"about {round(len(unwanted) / sample.share):,} by their headers, such as {unwanted[0]}")
    if wrong_size:
        left_out.append(f"about {round(len(wrong_size) / sample.share):,} for their size, such as {wrong_size[0]}")
    return "\n".join(
        [
            f"About {round(len(usable) / sample.share):,} volumes in {sample.inspection.num_files:,} files, {read}, "
            f"judged by the headers of {len(volumes)} and by preparing {len(measured)} of them",
            *([f"About {round(len(done) / sample.share):,} more are in the pool already"] if done else []),
            *(f"Would be left out: {line}" for line in left_out),
            f"Preparing them takes one process about {format_duration(hours)}, and -np {num_processes} about "
            f"{format_duration(hours / num_processes)}; parts (-num_parts) share the work",
            f"The pool takes about {format_bytes(bytes_per_work * work)}; {free} are free in {target}",
        ]
    )


def _by_size(tasks: Sequence[CaseTask]) -> tuple[list[CaseTask], list[str]]:
    """The tasks whose volumes have a size that can be used by their headers, and what is wrong with the others."""
    usable, wrong = [], []
    for task in tasks:
        try:
            check_expected_size(task)
            usable.append(task)
        except VolumeProblem as problem:
            wrong.append(f"{task.volume.source}: {problem}")
    return usable, wrong


def _prepared(volumes: Sequence[Volume], plans: Mapping[str, Any], configuration: str) -> set[str]:
    """The cases of those that are in the pool as they are now."""
    folder = PoolFolder(plans["dataset_name"], plans["plans_name"], configuration)
    if not folder.data.is_dir():
        return set()
    layout = layout_hash(plans, configuration)
    records = {bundle: folder.ledger.records(bundle) for bundle in {volume.bundle for volume in volumes}}
    found = [(volume, records[volume.bundle].get(volume.case)) for volume in volumes]
    return {one.case for one, record in found if record and record.status == PREPARED and record.is_of(one, layout)}


def _work(task: CaseTask) -> int:
    """Voxels before and after resampling, which time and disk are taken to be proportional to."""
    before = np.prod(task.volume.shape, dtype=np.int64)
    after = np.prod(expected_shape(task.volume, task.plans, task.configuration), dtype=np.int64)
    return int(before + after)


def _per_work(measured: Sequence[CaseResult], tasks: Sequence[CaseTask]) -> tuple[float, float]:
    """Seconds and bytes for a unit of work, also of those volumes that are left out when their voxels are seen."""
    work_of = {task.volume.source: _work(task) for task in tasks}
    work = sum(work_of[result.record.source] for result in measured)
    written = sum(result.written for result in measured)
    return sum(result.seconds for result in measured) / work, written / work if written else BYTES_PER_VOXEL
