"""Bringing the parts of a pool together: duplicates, fingerprint, final plans and the report."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_misfm.files import read_json, write_json
from nnunetv2_misfm.pool.case import LEFT_OUT, PREPARED, CaseRecord
from nnunetv2_misfm.pool.folder import PoolFolder, write_report
from nnunetv2_misfm.pool.inspection import PoolInspection
from nnunetv2_misfm.pool.plan import layout_hash, measured_plans, pool_dataset_json
from nnunetv2_misfm.pool.volume_files import LeftOut


@dataclass(frozen=True)
class MergedPool:
    plans: dict[str, Any]
    records: tuple[CaseRecord, ...]
    left_out_by_header: tuple[LeftOut, ...]
    complete: bool

    def count(self, status: str) -> int:
        return sum(record.status == status for record in self.records)

    def reasons(self) -> Counter[str]:
        """How often volumes are missing for which reason, told apart by its first words."""
        texts = [record.reason for record in self.records if record.status != PREPARED]
        texts += [left_out.reason for left_out in self.left_out_by_header]
        return _by_first_words(texts)

    def mended(self) -> Counter[str]:
        """How often prepared volumes had to be mended, and how, told apart by the first words."""
        return _by_first_words(record.mended for record in self.records if record.status == PREPARED and record.mended)


def _by_first_words(texts: Iterable[str]) -> Counter[str]:
    return Counter(text.split(":")[0].split(" (")[0].split(";")[0] for text in texts)


def merge_pool(
    folder: PoolFolder, inspection: PoolInspection, plans: Mapping[str, Any], configuration: str
) -> MergedPool:
    """Write the report; once every volume has its record also drop duplicates and write fingerprint and plans.

    Whichever part calls this last completes the pool; to call it again changes nothing.
    """
    found, layout = folder.read_records(), layout_hash(plans, configuration)
    records = {case: record for case, record in found.items() if record.layout == layout}
    waiting = {volume.case for volume in inspection.volumes} - records.keys()
    complete = not waiting
    if complete:
        for duplicate in _duplicates(list(records.values()), _cases_of(folder.fingerprint)):
            folder.write_record(duplicate)
            records[duplicate.case] = duplicate
        for case in found:
            if case not in records or records[case].status != PREPARED:
                folder.remove_case(case)
        folder.remove_temporary()
    prepared = [record for record in records.values() if record.status == PREPARED]
    if complete and prepared:
        fingerprint = _fingerprint(prepared)
        intensity = fingerprint["foreground_intensity_properties_per_channel"]
        plans = measured_plans(plans, configuration, _modalities(prepared), intensity)
        write_json(fingerprint, folder.fingerprint)
        write_json(pool_dataset_json(plans, configuration, len(prepared)), folder.dataset_json)
        write_json(plans, folder.plans)
    in_header = {left_out.source for left_out in inspection.left_out}
    shown = tuple(r for r in records.values() if r.status == PREPARED or r.source not in in_header)
    write_report(folder.root, shown, inspection.left_out)
    return MergedPool(dict(plans), shown, inspection.left_out, complete)


def _cases_of(fingerprint: Path) -> set[str]:
    """The cases of the pool as it was completed before; none at the first time."""
    return set(read_json(fingerprint, "Remove it; it is then made anew.")["cases"]) if fingerprint.is_file() else set()


def _duplicates(records: Sequence[CaseRecord], in_pool_before: set[str]) -> list[CaseRecord]:
    """Records of prepared cases with the voxels of another one, marked as left out.

    A case that was in the complete pool before stays; otherwise the first in order of source. So it does not matter
    which part came first, and adding volumes takes nothing away.
    """
    by_content: dict[str, list[CaseRecord]] = defaultdict(list)
    for record in records:
        if record.status == PREPARED:
            by_content[record.content].append(record)
    duplicates = []
    for group in by_content.values():
        kept, *others = sorted(group, key=lambda one: (one.case not in in_pool_before, one.source))
        reason = f"duplicate: the same voxels as {kept.source}"
        duplicates += [dataclasses.replace(one, status=LEFT_OUT, reason=reason) for one in others]
    return duplicates


def _modalities(prepared: Sequence[CaseRecord]) -> dict[str, int]:
    counts = Counter(record.modality for record in prepared if record.modality)
    return {name: counts[name] for name in sorted(counts)}


def _fingerprint(prepared: Sequence[CaseRecord]) -> dict[str, Any]:
    """nnU-Net's dataset fingerprint, with the case names added.

    There is no foreground without labels: the intensity properties are those of all voxels that are not 0, averaged
    over the cases (lowest and highest value: of all).
    """
    sizes = [np.prod(record.shape_after_crop) / np.prod(record.original_shape) for record in prepared]
    return {
        "spacings": [list(record.spacing) for record in prepared],
        "shapes_after_crop": [list(record.shape_after_crop) for record in prepared],
        "foreground_intensity_properties_per_channel": {
            str(channel): _averaged([record.intensity[channel] for record in prepared])
            for channel in range(len(prepared[0].intensity))
        },
        "median_relative_size_after_cropping": float(np.median(sizes)),
        "cases": [record.case for record in prepared],
    }


def _averaged(properties: Sequence[Mapping[str, float]]) -> dict[str, float]:
    average = {name: float(np.mean([one[name] for one in properties])) for name in properties[0]}
    average["std"] = float(
        np.sqrt(np.mean([one["std"] ** 2 + (one["mean"] - average["mean"]) ** 2 for one in properties]))
    )
    average["min"] = min(one["min"] for one in properties)
    average["max"] = max(one["max"] for one in properties)
    return average
