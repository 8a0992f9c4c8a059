"""The folder of a pool in nnUNet_preprocessed, and how things appear in it: whole, by rename.

DatasetXXX_NAME/
    dataset.json, dataset_fingerprint.json, <plans_name>.json, report.csv
    <data_identifier>/               case.b2nd, case_seg.b2nd, case.pkl, and nothing else
    <data_identifier>_preparation/   records/case.json, temporary/, locks
"""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2_misfm.files import locked, read_json, write_json, written_whole
from nnunetv2_misfm.plans.files import nnunet_folder
from nnunetv2_misfm.plans.settings import as_tuples
from nnunetv2_misfm.pool.case import CASE_ENDINGS, CaseRecord, temporary_files
from nnunetv2_misfm.pool.inspection import PoolError
from nnunetv2_misfm.pool.plan import WRITE_ANEW, existing_plans
from nnunetv2_misfm.pool.volume_files import LeftOut

MERGE_WAITS_SECONDS = 3600.0
REPORT = "report.csv"
REPORT_COLUMNS = (
    "case",
    "status",
    "reason",
    "source",
    "format",
    "channels",
    "modality",
    "modality_from",
    "orientation",
    "original_shape",
    "original_spacing",
    "body_box",
    "shape",
    "mended",
    "content",
)

_PREPARATION = "_preparation"  # ends the name of the folder with what a preparation still needs


class PoolFolder:
    """Paths of one pool and the operations on them that other processes may see."""

    def __init__(self, plans: Mapping[str, Any], configuration: str, num_parts: int, part_id: int):
        data_identifier = plans["configurations"][configuration]["data_identifier"]
        self.root = nnunet_folder("nnUNet_preprocessed") / plans["dataset_name"]
        self.data = self.root / data_identifier
        self.plans = self.root / f"{plans['plans_name']}.json"
        self.dataset_json = self.root / "dataset.json"
        self.fingerprint = self.root / "dataset_fingerprint.json"
        self._preparation = self.root / f"{data_identifier}{_PREPARATION}"
        self._records = self._preparation / "records"
        self._part = f"part_{part_id}_of_{num_parts}"
        self._all_temporary = self._preparation / "temporary"
        self.temporary = self._all_temporary / self._part

    def create(self) -> None:
        """Make the folders. Raises PoolError if something else than a pool lives there."""
        check_is_pool(self.root, self.plans.stem)
        for folder in (self.data, self._records, self._all_temporary):
            folder.mkdir(parents=True, exist_ok=True)

    def clear_temporary(self) -> None:
        """Remove what a killed run of the same part left half-written."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def remove_temporary(self) -> None:
        """Remove the temporary folders of all parts; for when every volume has its record."""
        shutil.rmtree(self._all_temporary, ignore_errors=True)

    @contextmanager
    def lock_part(self) -> Iterator[None]:
        """Keep a second run from preparing the same part; the system frees the lock of a run that was killed."""
        with locked(self._preparation / f"{self._part}.lock", 0.0, "another process is preparing this part"):
            yield

    @contextmanager
    def lock_merge(self) -> Iterator[None]:
        """Let one part at a time bring the results together."""
        message = "another process has been merging the parts for too long"
        with locked(self._preparation / "merge.lock", MERGE_WAITS_SECONDS, message):
            yield

    def is_whole(self, case: str) -> bool:
        return (self.data / f"{case}.b2nd").exists()

    def publish(self, record: CaseRecord) -> None:
        """Move a case from the temporary folder into the pool, its .b2nd last, then write its record."""
        for file in temporary_files(self.temporary, record.case):
            os.replace(file, self.data / file.name)
        self.write_record(record)

    def remove_case(self, case: str) -> None:
        for ending in reversed(CASE_ENDINGS):
            (self.data / f"{case}{ending}").unlink(missing_ok=True)

    def write_record(self, record: CaseRecord) -> None:
        write_json(dataclasses.asdict(record), self._records / f"{record.case}.json")

    def remove_record(self, case: str) -> None:
        (self._records / f"{case}.json").unlink(missing_ok=True)

    def read_records(self) -> dict[str, CaseRecord]:
        """What became of each volume so far, by case name and sorted by it."""
        remedy = "Remove it; its volume is then prepared anew."
        records = (read_json(path, remedy) for path in sorted(self._records.glob("*.json")))
        known = {field.name for field in dataclasses.fields(CaseRecord)}  # other versions have others, too
        return {
            record["case"]: CaseRecord(**{name: as_tuples(value) for name, value in record.items() if name in known})
            for record in records
        }


def check_is_pool(root: Path, plans_name: str) -> None:
    """Raise PoolError if the dataset folder `root` holds something else than a pool."""
    dataset_json = root / "dataset.json"
    if dataset_json.is_file():
        is_pool = read_json(dataset_json, f"{WRITE_ANEW}.").get("misfm_pool")
    else:
        is_pool = existing_plans(root.name, plans_name) is not None
    if not is_pool and any(_is_foreign(path, root) for path in root.rglob("*")):
        raise PoolError(f"{root} exists and is no pretraining pool; choose another dataset ID and name")


def _is_foreign(path: Path, root: Path) -> bool:
    """Whether a file is none of those that runs, also with other plans, make before they write dataset.json."""
    prepares = path.relative_to(root).parts[0].endswith(_PREPARATION)
    return path.is_file() and not path.name.startswith(".") and path != root / REPORT and not prepares


def write_report(root: Path, records: Iterable[CaseRecord], left_out: Sequence[LeftOut]) -> Path:
    """Write report.csv: one row per volume in order of source, whether it is in the pool or not."""
    rows = [{name: _cell(getattr(record, name)) for name in REPORT_COLUMNS} for record in records]
    rows += [{"status": "left out", "reason": one.reason, "source": one.source} for one in left_out]
    root.mkdir(parents=True, exist_ok=True)
    with written_whole(root / REPORT) as temporary:
        # Undecodable bytes in the names of files are written as escapes rather than stopping the report.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.DictWriter(file, REPORT_COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["source"], row.get("case", ""))))
    return root / REPORT


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(":".join(map(str, item)) if isinstance(item, tuple) else f"{item:.6g}" for item in value)
    return str(value)
