"""What the parts of a preparation write down for each other and for later runs; each file has one writer at a time.

<data_identifier>_preparation/
    headers_1/BUNDLE.jsonl      the headers that were read (`header_index.py`); another number once it changes, or the
                                rules by which files make a volume
    headers_1/BUNDLE.groups.jsonl   what groups of files amounted to by these rules
    found/BUNDLE.json           what the last inspection found in the bundle
    records/BUNDLE.jsonl        a line for what became of a volume; a later line about it replaces it
    records/earlier.jsonl       the records of earlier versions, which had a file for each
    joined.json                 the DICOM series that lie in folders of several bundles
    progress/PART.STEP.TOKEN    an empty file: the part has done the step for the archive as it is now
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2_misfm.files import append_json_lines, read_json, read_json_lines, write_json
from nnunetv2_misfm.plans.settings import as_tuples
from nnunetv2_misfm.pool.bundle_files import BundleFiles
from nnunetv2_misfm.pool.case import CaseRecord
from nnunetv2_misfm.pool.header_index import HeaderIndex
from nnunetv2_misfm.pool.inspection import PoolInspection
from nnunetv2_misfm.pool.share import BUNDLES, Share
from nnunetv2_misfm.pool.volume_files import LeftOut
from nnunetv2_misfm.pool.volumes import Volume, volume_as_json, volume_from_json

INSPECTED, PREPARED_ALL = "inspected", "prepared"
MADE_ANEW = "Remove it; it is made anew."
_FIELDS = {field.name for field in dataclasses.fields(CaseRecord)}


@dataclass(frozen=True)
class JoinedSeries:
    """Series in folders of several bundles, which are looked at together once all parts are done."""

    series: frozenset[str] = frozenset()
    cases: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The volumes they make, each with its size and date."""
    left_out: tuple[LeftOut, ...] = ()

    def covers(self, one: Volume | LeftOut | CaseRecord) -> bool:
        """Whether this is a piece of such a series, or what it was before."""
        if one.series not in self.series:
            return False
        return isinstance(one, LeftOut) or self.cases.get(one.case) != (one.num_bytes, one.modified_ns)


class Ledger:
    """The files above, for one part."""

    def __init__(self, folder: Path, share: Share):
        self.folder = folder
        self.share = share
        self._found, self._joined, self._progress = folder / "found", folder / "joined.json", folder / "progress"
        self._records = BundleFiles(folder / "records", share.bundles)
        self._earlier = self._records.folder / "earlier.jsonl"

    @cached_property
    def index(self) -> HeaderIndex:
        return HeaderIndex(self.folder / "headers_1", self.share.bundles)

    def create(self) -> None:
        for folder in (self._found, self._records.folder, self._progress, self.folder / "headers_1"):
            folder.mkdir(parents=True, exist_ok=True)

    def keep_found(self, inspection: PoolInspection) -> None:
        """Write down what an inspection found in the bundles of this part, which is to be prepared from now on."""
        self.forget_steps()
        found: dict[int, dict[str, list[Any]]] = defaultdict(lambda: {"volumes": [], "left_out": []})
        for volume in inspection.volumes:
            found[volume.bundle]["volumes"].append(volume_as_json(volume))
        for one in inspection.left_out:
            found[one.bundle]["left_out"].append(list(vars(one).values()))
        before = {path.name for path in self._found.iterdir()}
        for bundle in self.share.bundles:
            path = self._found / f"{bundle:04d}.json"
            if bundle not in found:
                path.unlink(missing_ok=True)
            elif path.name not in before or read_json(path, MADE_ANEW) != found[bundle]:
                write_json(found[bundle], path, indent=None)
        self.mark(INSPECTED, inspection.token)

    def found(self, bundle: int) -> tuple[list[Volume], list[LeftOut]]:
        """What was found in a bundle; the volumes without their files' names."""
        content = self._found_in(bundle)
        volumes = [volume_from_json(one) for one in content["volumes"]]
        return volumes, [LeftOut(*one) for one in content["left_out"]]

    def found_by_all(self, token: str) -> PoolInspection | None:
        """What all parts have found, for planning; None if some have not looked yet at the archive as it is now."""
        if self.waits_for(INSPECTED, token):
            return None
        found = [self.found(bundle) for bundle in range(BUNDLES)]
        volumes = sorted((volume for one, _ in found for volume in one), key=lambda volume: volume.case)
        left_out = tuple(one for _, of_bundle in found for one in of_bundle)
        return PoolInspection(tuple(volumes), left_out, Counter(), token=token)

    def series(self, bundle: int) -> Iterator[tuple[str, str, Sequence[int]]]:
        """Series, case and bundles (as in `Volume`) of all that was found in a bundle; no case if it was left out."""
        content = self._found_in(bundle)
        yield from ((one["series"], one["case"], one["bundles"]) for one in content["volumes"])
        yield from ((LeftOut(*one).series, "", (bundle,)) for one in content["left_out"])

    def _found_in(self, bundle: int) -> dict[str, Any]:
        path = self._found / f"{bundle:04d}.json"
        return read_json(path, MADE_ANEW) if path.exists() else {"volumes": [], "left_out": []}

    def forget_steps(self) -> None:
        """This part begins anew."""
        for step in self._progress.glob(f"{self.share}.*"):
            step.unlink(missing_ok=True)

    def mark(self, step: str, token: str) -> None:
        """Note that this part has done a step for the archive with that token."""
        (self._progress / f"{self.share}.{step}.{token}").touch()

    def waits_for(self, step: str, token: str = "") -> dict[int, bool]:
        """The numbers of the parts that have still to do a step, and whether each has done it for another archive.

        Args:
            step: to do.
            token: of the archive as it is now; without it, any will do.
        """
        found: dict[str, set[str]] = defaultdict(set)
        for path in self._progress.glob(f"*.{step}.*"):
            part, _, of_archive = path.name.split(".")
            found[part].add(of_archive)
        tokens = {number: found[str(Share(self.share.num_parts, number))] for number in range(self.share.num_parts)}
        return {number: bool(there) for number, there in tokens.items() if not (token in there if token else there)}

    def write_record(self, record: CaseRecord) -> None:
        self._records.append(record.bundle, [json.dumps(vars(record))])

    def records(self, bundle: int) -> dict[str, CaseRecord]:
        """What became of the volumes of a bundle so far, by case name."""
        return _records_of(self._records.read(bundle))

    def records_of_earlier_versions(self) -> dict[str, CaseRecord]:
        """By case name; what `records` says of a case is newer."""
        return _records_of(read_json_lines(self._earlier))

    def gather_records_of_earlier_versions(self) -> None:
        """Put the records that have a file each into one; for one process at a time."""
        paths = sorted(self._records.folder.glob("*.json"))
        if not paths:
            return
        remedy = "Remove it; its volume is then prepared anew."
        append_json_lines(self._earlier, (json.dumps(read_json(path, remedy)) for path in paths))
        for path in paths:
            path.unlink()

    def write_joined(self, volumes: Iterable[Volume], left_out: Sequence[LeftOut]) -> None:
        """Write down what series in folders of several bundles amount to."""
        made = list(volumes)
        series = sorted({volume.series for volume in made} | {one.series for one in left_out})
        cases = {volume.case: (volume.num_bytes, volume.modified_ns) for volume in made}
        if series or self._joined.exists():
            content = {"series": series, "cases": cases, "left_out": [list(vars(one).values()) for one in left_out]}
            write_json(content, self._joined, indent=None)

    def joined(self) -> JoinedSeries:
        """As they were last written down."""
        if not self._joined.exists():
            return JoinedSeries()
        content = read_json(self._joined, MADE_ANEW)
        cases = {case: (size, date) for case, (size, date) in content["cases"].items()}
        return JoinedSeries(frozenset(content["series"]), cases, tuple(LeftOut(*one) for one in content["left_out"]))


def _records_of(lines: Iterable[Any]) -> dict[str, CaseRecord]:
    """By case; the last line about it counts."""
    records = {}
    for line in lines:
        # Other versions have other fields, too.
        values = line if line.keys() <= _FIELDS else {name: line[name] for name in line.keys() & _FIELDS}
        lists = {name: as_tuples(value) for name, value in values.items() if isinstance(value, list)}
        records[line["case"]] = CaseRecord(**{**values, **lists})
    return records
