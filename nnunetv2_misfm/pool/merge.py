"""Bringing the parts of a pool together: duplicates, fingerprint, final plans and the report.

Everything the parts wrote down is read once, bundle by bundle; of each volume only what the results need is kept. To
merge again changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunetv2_misfm.files import read_json, write_json
from nnunetv2_misfm.plans.checks import INTENSITIES
from nnunetv2_misfm.pool.case import FAILED, LEFT_OUT, PREPARED, CaseRecord
from nnunetv2_misfm.pool.folder import PoolFolder, report_row, write_report
from nnunetv2_misfm.pool.ledger import MADE_ANEW, JoinedSeries, Ledger
from nnunetv2_misfm.pool.plan import layout_hash, measured_plans, pool_dataset_json, with_medians
from nnunetv2_misfm.pool.settings import pool_block
from nnunetv2_misfm.pool.share import WHOLE
from nnunetv2_misfm.pool.volume_files import LeftOut
from nnunetv2_misfm.pool.wanted import Wanted


class Entry(NamedTuple):
    """What is kept of a record or of what was left out by its header."""

    case: str
    source: str
    status: str
    reason: str
    mended: str
    modality: str
    content: str
    bundle: int
    spacing: tuple[float, ...]
    shape_after_crop: tuple[int, ...]
    share_kept: float
    """Of the voxels, by cropping."""
    intensity: tuple[tuple[float, ...], ...]
    """Per channel, in the order of `INTENSITY`."""
    row: str
    """Of the report, its cells between zero characters."""


@dataclass
class Tally:
    """How many volumes became what, and why, told apart by the first words."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why volumes are missing."""
    mended: Counter[str] = field(default_factory=Counter)
    """How prepared volumes had to be mended."""

    def add(self, status: str, reason: str, mended: str = "") -> None:
        self.statuses[status] += 1
        if status != PREPARED:
            self.reasons[_first_words(reason)] += 1
        elif mended:
            self.mended[_first_words(mended)] += 1


_MOST_NAMED = 10  # parts
INTENSITY = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")


@dataclass
class PoolEntries:
    """What became of the volumes of a pool."""

    entries: list[Entry] = field(default_factory=list)
    num_waiting: int = 0
    """Volumes without a record."""
    sizes: list[tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)
    """Shape and spacing (mm) of all volumes that are there, along the canonical axes."""

    def tally(self) -> Tally:
        tally = Tally()
        for entry in self.entries:
            tally.add(entry.status, entry.reason, entry.mended)
        return tally

    def add(self, one: CaseRecord | LeftOut) -> None:
        row = "\0".join(report_row(one))
        if isinstance(one, LeftOut):
            self.entries.append(
                Entry("", one.source, LEFT_OUT, one.reason, "", "", "", one.bundle, (), (), 0.0, (), row)
            )
            return
        prepared = one.status == PREPARED
        self.entries.append(
            Entry(
                case=one.case,
                source=one.source,
                status=one.status,
                reason=one.reason,
                mended=one.mended,
                modality=one.modality,
                content=one.content,
                bundle=one.bundle,
                spacing=one.spacing,
                shape_after_crop=one.shape_after_crop,
                share_kept=math.prod(one.shape_after_crop) / math.prod(one.original_shape) if prepared else 0.0,
                intensity=tuple(tuple(channel[name] for name in INTENSITY) for channel in one.intensity),
                row=row,
            )
        )


def read_entries(ledger: Ledger, layout: str, there: Collection[str], counts: Wanted) -> PoolEntries:
    """Read what the parts wrote down, each file once.

    Args:
        there: cases whose arrays are in the pool; a record of another one counts for nothing.
        counts: what the pool takes; the sizes of other volumes are not those of the pool.
    """
    result, joined = PoolEntries(), ledger.joined()
    seen: set[str] = set()
    by_header: set[str] = set()
    found_in: dict[str, int] = {}
    for bundle in WHOLE.bundles:
        volumes, left_out = ledger.found(bundle)
        records = _of_arrays(ledger.records(bundle), there)
        by_source: dict[str, list[CaseRecord]] = defaultdict(list)
        for record in records.values():
            by_source[record.source].append(record)
        wanted = [volume for volume in volumes if not joined.covers(volume)]
        for volume in wanted:
            found_in.update(dict.fromkeys((volume.case, volume.own_name), bundle))
            result.num_waiting += not any(one.is_of(volume, layout) for one in by_source[volume.source])
        apart = (one for one in wanted if one.series not in joined.series and not counts.problem_of(one))
        result.sizes += [(one.shape, one.spacing) for one in apart]
        put_together = (records[case] for case in records.keys() & joined.cases)
        result.sizes += [(one.original_shape, one.original_spacing) for one in put_together]
        kept = [one for one in left_out if not joined.covers(one)]
        by_header.update(one.source for one in kept)
        _add_records(result, records.values(), layout, joined, by_header)
        for one in kept:
            result.add(one)
        seen.update(records)
    earlier = _of_arrays(ledger.records_of_earlier_versions(), there)
    _add_records(result, (one for case, one in earlier.items() if case not in seen), layout, joined, by_header)
    # A case that was in another bundle before, by other rules for bundles, has a record there that is out of date.
    result.entries = [one for one in result.entries if found_in.get(one.case, one.bundle) == one.bundle]
    for one in joined.left_out:
        result.add(one)
    return result


def _of_arrays(records: Mapping[str, CaseRecord], there: Collection[str]) -> dict[str, CaseRecord]:
    return {case: one for case, one in records.items() if one.status != PREPARED or case in there}


def _add_records(
    result: PoolEntries, records: Iterable[CaseRecord], layout: str, joined: JoinedSeries, by_header: set[str]
) -> None:
    for record in records:
        counts = record.layout == layout and not joined.covers(record)
        if counts and (record.status == PREPARED or record.source not in by_header):
            result.add(record)


@dataclass(frozen=True)
class PoolReport:
    """What a pool holds after a run."""

    folder: Path
    """The dataset in nnUNet_preprocessed."""
    plans: dict[str, Any]
    """As written to disk: with the normalisation and the counts of what was really found in the volumes."""
    tally: Tally
    complete: bool
    """Whether every volume has been looked at; False while other parts are at work."""
    waits_for: Mapping[int, bool] = field(default_factory=dict)
    """The parts that are still to be prepared, and whether each was prepared for another archive."""

    @property
    def num_prepared(self) -> int:
        return self.tally.statuses[PREPARED]

    def summary(self) -> str:
        modalities = ", ".join(f"{name} ({n})" for name, n in pool_block(self.plans)["modalities"].items() if name)
        lines = [
            f"Pool {self.folder}: {self.num_prepared} volumes" + (f"; modality {modalities}" if modalities else "")
        ]
        if self.tally.reasons:
            left_out, failed = (self.tally.statuses[status] for status in (LEFT_OUT, FAILED))
            lines.append(f"Not in it: {left_out} left out, {failed} failed (see report.csv)")
            lines += [f"  {count} x {reason}" for reason, count in self.tally.reasons.most_common()]
        if self.tally.mended:
            lines.append(f"Mended while they were read ({self.tally.mended.total()}, see report.csv):")
            lines += [f"  {count} x {what}" for what, count in self.tally.mended.most_common()]
        if not self.complete and not self.waits_for:  # all parts are done, and volumes have come or changed since
            lines.append("Not complete yet: volumes are still to be prepared. Run this again")
        elif not self.complete:
            numbers = ", ".join(map(str, list(self.waits_for)[:_MOST_NAMED]))
            more = f" and {len(self.waits_for) - _MOST_NAMED} more" if len(self.waits_for) > _MOST_NAMED else ""
            lines.append(f"Not complete yet: parts are still to be prepared (-part_id {numbers}{more})")
            if others := [number for number, of_another in self.waits_for.items() if of_another]:
                lines.append(
                    f"Part {others[0]} was prepared for other folders, or for another state of them: give all parts "
                    f"the same -i, and run it again"
                )
        return "\n".join(lines)


def merge_pool(folder: PoolFolder, plans: Mapping[str, Any]) -> PoolReport:
    """Once every volume has its record: drop duplicates and write fingerprint, plans and report.

    The caller marks the pool as complete (`PoolFolder.finish`).
    """
    configuration = folder.configuration
    wanted, layout = Wanted.by_plans(plans, configuration), layout_hash(plans, configuration)
    pool = read_entries(folder.ledger, layout, folder.cases(), wanted)
    if pool.num_waiting:
        return PoolReport(folder.root, dict(plans), pool.tally(), complete=False)
    _drop_duplicates(pool, folder.ledger, _cases_of(folder.fingerprint))
    _free_duplicates(pool, folder.ledger)
    prepared = sorted({e.case: e for e in pool.entries if e.status == PREPARED}.values(), key=lambda entry: entry.case)
    for case in folder.cases() - {entry.case for entry in prepared}:
        folder.remove_case(case)
    if prepared:
        fingerprint = _fingerprint(prepared)
        counts = Counter(entry.modality for entry in prepared if entry.modality)
        modalities = {name: counts[name] for name in sorted(counts)}
        intensity = fingerprint[INTENSITIES]
        plans = with_medians(plans, configuration, pool.sizes) if pool.sizes else plans
        plans = measured_plans(plans, configuration, modalities, intensity)
        write_json(pool_dataset_json(plans, configuration, len(prepared)), folder.dataset_json)
        write_json(plans, folder.plans)
        write_json(fingerprint, folder.fingerprint)
    write_report(folder.root, (entry.row.split("\0") for entry in pool.entries))
    return PoolReport(folder.root, dict(plans), pool.tally(), complete=True)


def _cases_of(fingerprint: Path) -> set[str]:
    """The cases of the pool as it was completed before; none at the first time."""
    return set(read_json(fingerprint, MADE_ANEW)["cases"]) if fingerprint.is_file() else set()


def _drop_duplicates(pool: PoolEntries, ledger: Ledger, in_pool_before: set[str]) -> None:
    """Mark prepared cases with the voxels of another one as left out, for good.

    A case that was in the complete pool before stays; otherwise the first in order of source. So it does not matter
    which part came first, and adding volumes takes nothing away.
    """
    kept: dict[str, Entry] = {}
    dropped: dict[str, Entry] = {}

    def rank(entry: Entry) -> tuple[bool, str]:
        return entry.case not in in_pool_before, entry.source

    for entry in pool.entries:
        if entry.status == PREPARED:
            first, *second = sorted([entry, *filter(None, [kept.get(entry.content)])], key=rank)
            kept[entry.content] = first
            dropped.update({one.case: one for one in second if one.case != first.case})
    _change_records(
        pool, ledger, dropped.values(), LEFT_OUT, lambda e: f"duplicate: the same voxels as {kept[e.content].source}"
    )


def _free_duplicates(pool: PoolEntries, ledger: Ledger) -> None:
    """Let the next run prepare volumes that were left out for the voxels of one that has others now, or is gone."""
    contents = {entry.content for entry in pool.entries if entry.status == PREPARED}
    freed = [one for one in pool.entries if one.status == LEFT_OUT and one.content and one.content not in contents]
    reason = "the volume with the same voxels is in the pool no more; the same command prepares this one"
    _change_records(pool, ledger, freed, FAILED, lambda _: reason)


def _change_records(
    pool: PoolEntries, ledger: Ledger, entries: Collection[Entry], status: str, reason: Callable[[Entry], str]
) -> None:
    """Write down that something else became of volumes, in their records and in place of their entries."""
    changed = {(entry.case, entry.status) for entry in entries}
    pool.entries = [entry for entry in pool.entries if (entry.case, entry.status) not in changed]
    by_bundle: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_bundle[entry.bundle].append(entry)
    earlier = ledger.records_of_earlier_versions() if entries else {}
    for bundle, of_bundle in by_bundle.items():
        records = {**earlier, **ledger.records(bundle)}
        for entry in of_bundle:
            record = dataclasses.replace(records[entry.case], status=status, reason=reason(entry))
            ledger.write_record(record)
            pool.add(record)


def _fingerprint(prepared: Sequence[Entry]) -> dict[str, Any]:
    """nnU-Net's dataset fingerprint, with the case names added.

    There is no foreground without labels: the intensity properties are those of all voxels that are not 0, averaged
    over the cases (lowest and highest value: of all).
    """
    intensity = np.array([entry.intensity for entry in prepared])
    return {
        "spacings": [list(entry.spacing) for entry in prepared],
        "shapes_after_crop": [list(entry.shape_after_crop) for entry in prepared],
        INTENSITIES: {str(channel): _averaged(intensity[:, channel]) for channel in range(intensity.shape[1])},
        "median_relative_size_after_cropping": float(np.median([entry.share_kept for entry in prepared])),
        "cases": [entry.case for entry in prepared],
    }


def _averaged(intensity: np.ndarray) -> dict[str, float]:
    """Of one channel, from (cases, `INTENSITY`)."""
    each = dict(zip(INTENSITY, intensity.T, strict=True))
    average = {name: float(np.mean(values)) for name, values in each.items()}
    average["std"] = float(np.sqrt(np.mean(each["std"] ** 2 + (each["mean"] - average["mean"]) ** 2)))
    return {**average, "min": float(each["min"].min()), "max": float(each["max"].max())}


def _first_words(text: str) -> str:
    return text.split(":")[0].split(" (")[0].split(";")[0]
