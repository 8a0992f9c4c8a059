"""Bare volumes to a pretraining pool: an nnU-Net dataset without labels in nnUNet_preprocessed.

    folder = PoolFolder(dataset_name, plans_name, configuration)
    inspection = find_volumes(folders)
    check_usable(folder, inspection)
    plans = plan_pool(inspection, settings, find_geometry(inspection, settings, ...), ...)
    report = prepare_pool(folder, inspection, plans, num_processes)

A run that was interrupted is continued by running it again; volumes that are new are added. The parts of a job array
share the work by `num_parts` and `part_id`: each looks after some bundles of the archive (`listing.py`), writes down
what became of them (`ledger.py`), and the one that ends last brings everything together (`merge.py`).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from typing import Any

from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.pool.case import (
    FAILED,
    LEFT_OUT,
    PREPARED,
    CaseRecord,
    CaseResult,
    CaseTask,
    prepare_case,
)
from nnunetv2_misfm.pool.cost import MEASURED_FIRST, check_disk, typical_first
from nnunetv2_misfm.pool.folder import PoolFolder, check_is_pool, report_row, write_report
from nnunetv2_misfm.pool.inspection import PoolError, PoolInspection
from nnunetv2_misfm.pool.ledger import PREPARED_ALL
from nnunetv2_misfm.pool.merge import PoolReport, Tally, merge_pool
from nnunetv2_misfm.pool.plan import (
    existing_plans,
    keep_measured,
    layout_differences,
    layout_hash,
    pool_dataset_json,
)
from nnunetv2_misfm.pool.settings import pool_block
from nnunetv2_misfm.pool.share import BUNDLES
from nnunetv2_misfm.pool.shared_listing import forget_all, forget_share
from nnunetv2_misfm.pool.volume_files import LeftOut
from nnunetv2_misfm.pool.volumes import Volume, joined_series, with_own_names
from nnunetv2_misfm.pool.wanted import Wanted
from nnunetv2_misfm.pool.workers import Killed, run_jobs
from nnunetv2_misfm.progress import progress_bar


def check_usable(folder: PoolFolder, inspection: PoolInspection) -> None:
    """Raise PoolError if there is no volume to make a pool of; the reasons are in the report.csv of the pool to be."""
    if inspection.volumes:
        return
    check_is_pool(folder.root, folder.plans.stem)
    report = write_report(folder.root, [report_row(one) for one in inspection.left_out])
    raise PoolError(
        f"no usable volume in the given folders; every file and its reason is in {report}\n{inspection.summary()}"
    )


def start_pool(folder: PoolFolder, inspection: PoolInspection, plans: Mapping[str, Any]) -> None:
    """Write down what this part has found, and the plans.

    Raises:
        PoolError: if the pool there was made by other settings.
    """
    with folder.full_disk_explained():
        folder.create()
        _start_or_continue(folder, plans, len(inspection.volumes))
        folder.ledger.keep_found(inspection)


def prepare_pool(
    folder: PoolFolder, inspection: PoolInspection, plans: Mapping[str, Any], num_processes: int
) -> PoolReport:
    """Preprocess the volumes of an inspection into the pool that `plans` describe, or continue doing so.

    Args:
        folder: of the pool, for one part of the volumes; the part that ends last brings everything together.
        inspection: the volumes of this part at least; every part must be given the same folders.
        plans: from `plan_pool` or `adopt_plans`; their settings decide which volumes are used.
        num_processes: worker processes; with 1 everything runs in this process.

    Raises:
        PoolError: if the pool cannot be made: other settings than the pool's, not enough disk space, no usable volume.
            Finished work stays, and running again continues it.
        LockedError: if this part is at work already, or parts of another number of parts are.
    """
    with folder.full_disk_explained():
        folder.create()
        with folder.lock_part():
            plans = _start_or_continue(folder, plans, len(inspection.volumes))
            folder.incomplete.touch()
            folder.ledger.keep_found(inspection)
            own = [volume for volume in inspection.volumes if volume.bundle in folder.share.bundles]
            tally = _prepare_pending(folder, own, plans, num_processes)
            for one in inspection.left_out:
                if one.bundle in folder.share.bundles:
                    tally.add(LEFT_OUT, one.reason)
            folder.ledger.mark(PREPARED_ALL, inspection.token)
            forget_share(folder.listing, folder.share)
            merged = _merge_if_last(folder, inspection.token, plans, num_processes)
    report = merged
    if report is None:
        waits_for = folder.ledger.waits_for(PREPARED_ALL, inspection.token)
        report = PoolReport(folder.root, dict(plans), tally, complete=False, waits_for=waits_for)
    if report.complete and report.num_prepared == 0:
        raise PoolError(
            f"none of the volumes can be used; each and its reason is in {folder.report}\n{report.summary()}"
        )
    return report


def _merge_if_last(folder: PoolFolder, token: str, plans: Mapping[str, Any], num_processes: int) -> PoolReport | None:
    """Bring the parts together if all are done; one that has begun anew is not."""
    with folder.lock_merge():
        if folder.ledger.waits_for(PREPARED_ALL, token):
            return None
        _prepare_joined(folder, plans, num_processes)
        merged = merge_pool(folder, plans)
        if merged.complete:
            forget_all(folder.listing)
            folder.finish()
        return merged


def _prepare_joined(folder: PoolFolder, plans: Mapping[str, Any], num_processes: int) -> None:
    """Prepare the volumes whose files lie in folders that different parts have looked after."""
    bundles_of: dict[str, set[int]] = defaultdict(set)
    series_of_case: dict[str, str] = {}
    for bundle in range(BUNDLES):
        for of_one, case, bundles in folder.ledger.series(bundle):
            bundles_of[of_one].update(bundles)
            if case:
                series_of_case[case] = of_one
    several = {series for series, bundles in bundles_of.items() if series and len(bundles) > 1}
    involved = sorted({bundle for series in several for bundle in bundles_of[series]})
    headers = (header for bundle in involved for header in folder.ledger.index.unchanged(bundle))
    found = joined_series(headers, several) if several else []
    joined = with_own_names([one for one in found if isinstance(one, Volume)], series_of_case)
    folder.ledger.write_joined(joined, [one for one in found if isinstance(one, LeftOut)])
    _prepare_pending(folder, joined, plans, num_processes)


def _start_or_continue(folder: PoolFolder, plans: Mapping[str, Any], num_volumes: int) -> dict[str, Any]:
    """Write the plans, or check that the pool was made by the same ones; what was measured there is kept.

    Parts of a job array use the plans that are there as they are: each would plan from what it has seen.
    """
    configuration = folder.configuration
    with folder.lock_start():
        folder.ledger.gather_records_of_earlier_versions()
        existing = existing_plans(plans["dataset_name"], plans["plans_name"])
        wanted = copy.deepcopy(dict(plans))
        if existing is not None:
            if folder.share.num_parts > 1:
                pool_block(wanted)["num_channels"] = pool_block(existing)["num_channels"]
            differences = layout_differences(existing, wanted, configuration)
            folder.check_same_settings(differences)
            wanted = existing if folder.share.num_parts > 1 else keep_measured(wanted, existing, configuration)
        if not folder.dataset_json.is_file():
            write_json(pool_dataset_json(wanted, configuration, num_volumes), folder.dataset_json)
        if wanted != existing:
            write_json(wanted, folder.plans)
    return wanted


def _prepare_pending(
    folder: PoolFolder, volumes: Sequence[Volume], plans: Mapping[str, Any], num_processes: int
) -> Tally:
    """Prepare the new, changed and failed ones of these volumes; what became of all of them."""
    folder.clear_temporary()
    tally = Tally()
    tasks = _pending(folder, volumes, plans, tally)
    if tasks:
        _prepare_all(folder, tasks, num_processes, tally)
    return tally


def _pending(folder: PoolFolder, volumes: Sequence[Volume], plans: Mapping[str, Any], tally: Tally) -> list[CaseTask]:
    """What is left to do; the rest is tallied. Volumes that their headers rule out get their record at once."""
    configuration = folder.configuration
    wanted, layout = Wanted.by_plans(plans, configuration), layout_hash(plans, configuration)
    joined, earlier = folder.ledger.joined(), folder.ledger.records_of_earlier_versions()
    tasks = []
    for bundle, of_bundle in groupby(sorted(volumes, key=lambda volume: volume.bundle), lambda volume: volume.bundle):
        records = folder.ledger.records(bundle)
        present = list(of_bundle)
        known = _Known(folder, layout, records, earlier, {volume.source for volume in present})
        for volume in present:
            if joined.covers(volume):  # a piece of a volume, which comes when all parts are done
                continue
            volume, record, moved_from = known.identify(volume)
            if record is not None and record.is_of(volume, layout):
                tally.add(record.status, record.reason, record.mended)
                record = record.with_files_of(volume)
                if record != records.get(record.case):
                    folder.ledger.write_record(record)
            elif reason := wanted.problem_of(volume):
                tally.add(LEFT_OUT, reason)
                folder.ledger.write_record(CaseRecord.of(volume, LEFT_OUT, layout, reason=reason))
            else:
                tasks.append(CaseTask(volume, plans, configuration, layout, folder.temporary, record or moved_from))
    return tasks


class _Known:
    """The records of a bundle by which volumes are known again.

    Args:
        folder: of the pool.
        layout: of its arrays.
        records: of the bundle, by case name.
        earlier: of versions that had no bundles, by case name.
        sources: where the volumes of the bundle lie that are there now.
    """

    def __init__(
        self,
        folder: PoolFolder,
        layout: str,
        records: Mapping[str, CaseRecord],
        earlier: Mapping[str, CaseRecord],
        sources: Collection[str],
    ):
        self._folder = folder
        self._layout = layout
        self._records = records
        self._earlier = earlier
        self._by_source = {record.source: record for record in records.values()}
        self._sources = sources

    def identify(self, volume: Volume) -> tuple[Volume, CaseRecord | None, CaseRecord | None]:
        """The volume under its name in the pool, its record, and that of a file which may have been moved to here."""
        record = self._standing(self._by_source.get(volume.source))
        if record is not None:
            # Which of two equal names of folders is the longer one depends on the folders that are given together.
            return replace(volume, case=record.case), record, None
        record = self._standing(self._records.get(volume.case) or self._earlier.get(volume.case))
        if record is None or not record.is_of_another(volume):
            return volume, record, None
        # Two folders may hold files of the same names. A file that was moved is known by its voxels.
        moved_from = None if record.source in self._sources else record
        volume = replace(volume, case=volume.own_name)
        return volume, self._standing(self._records.get(volume.case)), moved_from

    def _standing(self, record: CaseRecord | None) -> CaseRecord | None:
        """The record if it is of this layout and of a case that was prepared and is there, or left out; else None."""
        if record is None or record.layout != self._layout or record.status == FAILED:
            return None
        return record if record.status != PREPARED or self._folder.is_whole(record.case) else None


def _prepare_all(folder: PoolFolder, tasks: Sequence[CaseTask], num_processes: int, tally: Tally) -> None:
    """Prepare the volumes; publish each as it is done, the first ones once time and disk have been estimated."""
    tasks = typical_first(tasks)
    measured: list[CaseResult] | None = []
    what = "1 volume" if len(tasks) == 1 else f"{len(tasks)} volumes"
    print(f"Preparing {what} with {num_processes} process{'es' if num_processes > 1 else ''}")
    try:
        with progress_bar(len(tasks), "Preprocessing volumes") as progress:
            with closing(run_jobs(prepare_case, tasks, num_processes)) as outcomes:
                for number, outcome in enumerate(outcomes, start=1):
                    result = _result(outcome)
                    tally.add(result.record.status, result.record.reason, result.record.mended)
                    progress.update()
                    if measured is None or not result.written:  # what takes no space waits for no estimate
                        folder.publish(result.record)
                    if measured is None:
                        continue
                    measured.append(result)
                    held = [one.record for one in measured if one.written]
                    if len(held) == MEASURED_FIRST or number == len(tasks):
                        at_work = len(folder.ledger.waits_for(PREPARED_ALL))  # parts, this one among them
                        said = check_disk(folder.data, measured, tasks, num_processes, at_work)
                        if number < len(tasks):
                            progress.write(said)
                        for record in held:
                            folder.publish(record)
                        measured = None
    finally:
        folder.clear_temporary()


def _result(outcome: CaseResult | Killed[CaseTask]) -> CaseResult:
    if not isinstance(outcome, Killed):
        return outcome
    reason = "its worker process was killed, mostly for want of memory; use fewer processes or more memory"
    return CaseResult(CaseRecord.of(outcome.job.volume, FAILED, outcome.job.layout, reason=reason), 0, 0.0)
