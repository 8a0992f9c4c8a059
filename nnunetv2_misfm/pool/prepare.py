"""Bare volumes to a pretraining pool: an nnU-Net dataset without labels in nnUNet_preprocessed.

    inspection = inspect_volumes(folders, settings)
    check_usable(inspection, dataset_name, plans_name)
    plans = plan_pool(inspection, settings, find_geometry(inspection, settings, ...), ...)
    report = prepare_pool(inspection, plans, configuration, num_processes)

A run that was interrupted is continued by running it again; volumes that are new are added. Several machines share
the work by `num_parts` and `part_id`.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunetv2_misfm.files import format_bytes, write_json
from nnunetv2_misfm.plans.files import nnunet_folder
from nnunetv2_misfm.pool.case import (
    FAILED,
    LEFT_OUT,
    PREPARED,
    CaseRecord,
    CaseResult,
    CaseTask,
    prepare_case,
)
from nnunetv2_misfm.pool.folder import PoolFolder, check_is_pool, write_report
from nnunetv2_misfm.pool.inspection import (
    PoolError,
    PoolInspection,
    inspect_volumes,
)
from nnunetv2_misfm.pool.merge import merge_pool
from nnunetv2_misfm.pool.plan import (
    check_names,
    existing_plans,
    expected_shape,
    keep_measured,
    layout_differences,
    layout_hash,
    plan_pool,
    pool_block,
    pool_dataset_json,
)
from nnunetv2_misfm.pool.settings import PoolSettings
from nnunetv2_misfm.pool.volumes import Volume
from nnunetv2_misfm.pool.workers import Killed, run_jobs

__all__ = ["PoolError", "PoolReport", "PoolSettings", "check_usable", "inspect_volumes", "plan_pool", "prepare_pool"]

MEASURED_FIRST = 3
"""Volumes prepared before time and disk are estimated; they stay in the temporary folder until the rest will fit."""
BYTES_PER_VOXEL = 4


@dataclass(frozen=True)
class PoolReport:
    """What a pool holds after a run."""

    folder: Path
    """The dataset in nnUNet_preprocessed."""
    plans: dict[str, Any]
    """As written to disk: with the normalisation and the counts of what was really found in the volumes."""
    num_prepared: int
    num_left_out: int
    num_failed: int
    """Volumes whose preparation broke off; the next run tries them again."""
    reasons: Counter[str]
    """Why volumes are not in the pool, by the first words of the reason."""
    mended: Counter[str]
    """What was done to volumes before their voxels lay on a straight grid, by the first words."""
    complete: bool
    """Whether every volume has been looked at; False while other parts are at work."""

    def summary(self) -> str:
        modalities = ", ".join(f"{name} ({n})" for name, n in pool_block(self.plans)["modalities"].items() if name)
        lines = [
            f"Pool {self.folder}: {self.num_prepared} volumes" + (f"; modality {modalities}" if modalities else "")
        ]
        if self.num_left_out or self.num_failed:
            lines.append(f"Not in it: {self.num_left_out} left out, {self.num_failed} failed (see report.csv)")
            lines += [f"  {count} x {reason}" for reason, count in self.reasons.most_common()]
        if self.mended:
            lines.append(f"Mended while they were read ({self.mended.total()}, see report.csv):")
            lines += [f"  {count} x {what}" for what, count in self.mended.most_common()]
        if not self.complete:
            lines.append("Not complete yet: other parts are still to be prepared")
        return "\n".join(lines)


def check_usable(inspection: PoolInspection, dataset_name: str, plans_name: str) -> None:
    """Raise PoolError if there is no volume to make a pool of; the reasons are in the report.csv of the pool to be."""
    if inspection.volumes:
        return
    root = nnunet_folder("nnUNet_preprocessed") / dataset_name
    check_is_pool(root, plans_name)
    report = write_report(root, (), inspection.left_out)
    raise PoolError(
        f"no usable volume in the given folders; every file and its reason is in {report}\n{inspection.summary()}"
    )


def prepare_pool(
    inspection: PoolInspection,
    plans: Mapping[str, Any],
    configuration: str,
    num_processes: int = 1,
    num_parts: int = 1,
    part_id: int = 0,
) -> PoolReport:
    """Preprocess the volumes of an inspection into the pool that `plans` describe, or continue doing so.

    Args:
        inspection: the volumes; every part must be given the same folders.
        plans: from `plan_pool` or `adopt_plans`; their settings decide which volumes are used.
        configuration: the configuration in `plans`.
        num_processes: worker processes; with 1 everything runs in this process.
        num_parts, part_id: prepare only every `num_parts`-th volume, starting from number `part_id`. The part that
            ends last brings everything together.

    Raises:
        PoolError: if the pool cannot be made: names in use, other settings than the pool's, not enough disk space,
            no usable volume. Finished work stays, and running again continues it.
    """
    if num_processes < 1 or not 0 <= part_id < num_parts:
        raise PoolError(
            f"num_processes {num_processes}, num_parts {num_parts}, part_id {part_id}: there must be at least one "
            "process and one part, and part_id counts from 0 to num_parts - 1"
        )
    check_names(plans["dataset_name"], plans["plans_name"], configuration)
    folder = PoolFolder(plans, configuration, num_parts, part_id)
    with _full_disk_explained(folder):
        folder.create()
        with folder.lock_part():
            plans = _start_or_continue(folder, plans, configuration, len(inspection.volumes))
            folder.clear_temporary()
            tasks = _pending(folder, inspection.volumes[part_id::num_parts], plans, configuration)
            if tasks:
                _prepare_all(folder, tasks, num_processes)
        with folder.lock_merge():
            merged = merge_pool(folder, inspection, plans, configuration)
    report = PoolReport(
        folder=folder.root,
        plans=merged.plans,
        num_prepared=merged.count(PREPARED),
        num_left_out=merged.count(LEFT_OUT) + len(merged.left_out_by_header),
        num_failed=merged.count(FAILED),
        reasons=merged.reasons(),
        mended=merged.mended(),
        complete=merged.complete,
    )
    if report.complete and report.num_prepared == 0:
        raise PoolError(f"none of the volumes can be used\n{report.summary()}")
    return report


@contextmanager
def _full_disk_explained(folder: PoolFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PoolError(f"the disk of {folder.root} is full; make room and run this again to continue") from error


def _start_or_continue(
    folder: PoolFolder, plans: Mapping[str, Any], configuration: str, num_volumes: int
) -> dict[str, Any]:
    """Write the plans, or check that the pool was made by the same ones; what was measured there is kept."""
    existing = existing_plans(plans["dataset_name"], plans["plans_name"])
    plans = dict(plans)
    if existing is not None:
        differences = layout_differences(existing, plans, configuration)
        if differences:
            raise PoolError(
                f"{folder.plans} was made with other settings:\n  "
                + "\n  ".join(differences)
                + "\nUse the same settings again, or another plans name or dataset ID for a second pool, or remove "
                f"{folder.data} and {folder.plans} to start anew"
            )
        plans = keep_measured(plans, existing, configuration)
    if not folder.dataset_json.is_file():
        write_json(pool_dataset_json(plans, configuration, num_volumes), folder.dataset_json)
    write_json(plans, folder.plans)
    return plans


def _pending(
    folder: PoolFolder, volumes: Sequence[Volume], plans: Mapping[str, Any], configuration: str
) -> list[CaseTask]:
    """What is left to do: new, changed and failed volumes. Those with the wrong channels get their record at once."""
    records = folder.read_records()
    channels, layout = pool_block(plans)["num_channels"], layout_hash(plans, configuration)
    tasks = []
    for volume in volumes:
        record = records.get(volume.case)
        if record is not None and not (record.layout == layout and _still_holds(record, volume, folder)):
            record = None
        if volume.num_channels != channels:
            reason = f"{volume.num_channels} channels, but the pool's volumes have {channels}"
            folder.write_record(CaseRecord.of(volume, LEFT_OUT, layout, reason=reason))
        elif record is None or (record.num_bytes, record.modified_ns) != (volume.num_bytes, volume.modified_ns):
            earlier = record if record is not None and record.status == PREPARED else None
            tasks.append(CaseTask(volume, plans, configuration, layout, folder.temporary, earlier))
    for task in tasks:
        # While a volume is being prepared it has no record, so that no other part takes the pool for complete.
        if task.volume.case in records:
            folder.remove_record(task.volume.case)
    return tasks


def _still_holds(record: CaseRecord, volume: Volume, folder: PoolFolder) -> bool:
    """Whether the record is about this volume, final, and what it says was prepared is there."""
    in_place = record.status != PREPARED or folder.is_whole(record.case)
    return in_place and record.status != FAILED and record.source == volume.source


def _prepare_all(folder: PoolFolder, tasks: Sequence[CaseTask], num_processes: int) -> None:
    """Prepare the volumes; publish each as it is done, the first ones once time and disk have been estimated."""
    tasks = _typical_first(tasks)
    unpublished: list[CaseResult] | None = []
    print(f"Preparing {len(tasks)} volumes with {num_processes} process{'es' if num_processes > 1 else ''}")
    try:
        with tqdm(total=len(tasks), desc="Preprocessing volumes") as progress:
            with closing(run_jobs(prepare_case, tasks, num_processes)) as outcomes:
                for number, outcome in enumerate(outcomes, start=1):
                    result = _result(outcome)
                    progress.update()
                    if unpublished is None:
                        folder.publish(result.record)
                        continue
                    unpublished.append(result)
                    written = sum(one.written > 0 for one in unpublished)
                    if written == MEASURED_FIRST or number == len(tasks):
                        progress.write(_check_disk(folder, unpublished, tasks, num_processes))
                        for one in unpublished:
                            folder.publish(one.record)
                        unpublished = None
    finally:
        folder.clear_temporary()


def _result(outcome: CaseResult | Killed[CaseTask]) -> CaseResult:
    if not isinstance(outcome, Killed):
        return outcome
    reason = "its worker process was killed, mostly for want of memory; use fewer processes or more memory"
    return CaseResult(CaseRecord.of(outcome.job.volume, FAILED, outcome.job.layout, reason=reason), 0, 0.0)


def _typical_first(tasks: Sequence[CaseTask]) -> list[CaseTask]:
    """The volumes in their order, but a small, a middling and a large one first, from which the rest is estimated."""
    by_size = sorted(range(len(tasks)), key=lambda index: _work(tasks[index]))
    count = min(MEASURED_FIRST, len(tasks))
    first = [by_size[(2 * number + 1) * len(tasks) // (2 * count)] for number in range(count)]
    return [tasks[index] for index in [*first, *(index for index in range(len(tasks)) if index not in first)]]


def _work(task: CaseTask) -> int:
    """Voxels before and after resampling, which time and disk are taken to be proportional to."""
    before = np.prod(task.volume.shape, dtype=np.int64)
    after = np.prod(expected_shape(task.volume, task.plans, task.configuration), dtype=np.int64)
    return int(before + after)


def _check_disk(
    folder: PoolFolder, measured: Sequence[CaseResult], tasks: Sequence[CaseTask], num_processes: int
) -> str:
    """Estimate time and disk from the first volumes. Raises PoolError if the rest will not fit."""
    done = {result.record.case for result in measured}
    work = {task.volume.case: _work(task) for task in tasks}
    written = [result for result in measured if result.written]
    work_left = sum(amount for case, amount in work.items() if case not in done)
    work_written = sum(work[result.record.case] for result in written)
    bytes_per_work = sum(result.written for result in written) / work_written if written else BYTES_PER_VOXEL
    work_done = sum(work[case] for case in done)
    seconds = sum(result.seconds for result in measured) / work_done * work_left / num_processes
    needed = bytes_per_work * work_left
    free = shutil.disk_usage(folder.data).free
    if needed > free:
        raise PoolError(
            f"the remaining {len(tasks) - len(done)} volumes need about {format_bytes(needed)} in {folder.data}, "
            f"but only {format_bytes(free)} are free; make room, or use a coarser spacing or fewer volumes"
        )
    return (
        f"Measured on {len(done)} of {len(tasks)} volumes: the rest takes about {seconds / 60:.1f} minutes and "
        f"{format_bytes(needed)} of {format_bytes(free)} free"
    )
