"""The folder of a pool in nnUNet_preprocessed, and how things appear in it: whole, by rename.

DatasetXXX_NAME/
    dataset.json, dataset_fingerprint.json, <plans_name>.json, report.csv
    <data_identifier>/               case.b2nd, case_seg.b2nd, case.pkl, and nothing else
    <data_identifier>_preparation/   what `ledger.py` lists, listing/ (`shared_listing.py`), temporary/, locks, and
                                     `incomplete` while volumes are still to be prepared
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_misfm.files import disk_is_full, locked, read_json, written_whole
from nnunetv2_misfm.plans.files import nnunet_folder
from nnunetv2_misfm.pool.case import CASE_ENDINGS, FAILED, LEFT_OUT, PREPARED, CaseRecord, temporary_files
from nnunetv2_misfm.pool.inspection import PoolError
from nnunetv2_misfm.pool.ledger import Ledger
from nnunetv2_misfm.pool.plan import WRITE_ANEW, existing_plans
from nnunetv2_misfm.pool.share import WHOLE, Share
from nnunetv2_misfm.pool.volume_files import LeftOut

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

INCOMPLETE = "incomplete"
_PREPARATION = "_preparation"  # ends the name of the folder with what a preparation still needs


class PoolFolder:
    """Paths of one pool and the operations on them that other processes may see."""

    def __init__(self, dataset_name: str, plans_name: str, configuration: str, share: Share = WHOLE):
        data_identifier = f"{plans_name}_{configuration}"
        self.configuration = configuration
        self.root = nnunet_folder("nnUNet_preprocessed") / dataset_name
        self.data = self.root / data_identifier
        self.plans = self.root / f"{plans_name}.json"
        self.dataset_json = self.root / "dataset.json"
        self.report = self.root / REPORT
        self.fingerprint = self.root / "dataset_fingerprint.json"
        self.share = share
        self._preparation = self.root / f"{data_identifier}{_PREPARATION}"
        self.ledger = Ledger(self._preparation, share)
        self.listing = self._preparation / "listing"
        self.incomplete = self._preparation / INCOMPLETE
        self._all_temporary = self._preparation / "temporary"
        self.temporary = self._all_temporary / str(share)

    @contextmanager
    def full_disk_explained(self) -> Iterator[None]:
        """Raise a PoolError that says what to do in place of what the system says of a full disk."""
        try:
            yield
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise PoolError(f"the disk of {self.root} is full; make room and run this again to continue") from error

    def create(self) -> None:
        """Make the folders. Raises PoolError if something else than this pool lives there."""
        check_is_pool(self.root, self.plans.stem)
        # dataset.json, fingerprint and report are those of one pool.
        plans = [path.stem for path in self.root.glob("*.json")]
        for other in self.root.glob(f"*{_PREPARATION}"):
            if other != self._preparation and any(other.name.startswith(f"{name}_") for name in plans):
                raise PoolError(
                    f"{self.root} holds the pool {other.name.removesuffix(_PREPARATION)}; choose another dataset ID "
                    f"and name for {self.data.name}, or leave -i out to train on the volumes of that pool by other "
                    f"plans"
                )
        for folder in (self.data, self._all_temporary):
            folder.mkdir(parents=True, exist_ok=True)
        self.ledger.create()

    def check_same_settings(self, differences: Sequence[str]) -> None:
        """Raise a PoolError if the pool there differs from the one that is asked for."""
        if differences:
            raise PoolError(
                f"{self.plans} was made with other settings:\n  "
                + "\n  ".join(differences)
                + "\nUse the same settings again, or another dataset ID for a second pool, or remove "
                f"{self.data} and {self.plans} to start anew"
            )

    def clear_temporary(self) -> None:
        """Remove what a killed run of the same part left half-written."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True, exist_ok=True)  # network disks keep files that are still open

    def finish(self) -> None:
        """After a merge: the pool is complete, and the work folders of all parts go."""
        shutil.rmtree(self._all_temporary, ignore_errors=True)
        self.incomplete.unlink(missing_ok=True)

    @contextmanager
    def lock_part(self) -> Iterator[None]:
        """Keep others from preparing the same volumes: a second run of this part, and parts of other numbers of parts.

        A part does not begin while another brings the pool together, which would do without what this one makes. The
        system frees the lock of a run that was killed.
        """
        with ExitStack() as held:
            # One at a time, or parts that start together would take each other for at work.
            with self.lock_merge(), self.lock_start():
                for lock in self._preparation.glob("part_*_of_*.lock"):
                    if Share.of(lock.stem).num_parts != self.share.num_parts:
                        with locked(lock, 0.0, f"{lock.stem.replace('_', ' ')} is being prepared"):
                            pass
                        lock.unlink(missing_ok=True)
                own = self._preparation / f"{self.share}.lock"
                held.enter_context(locked(own, 0.0, "another process is preparing this part"))
                self.ledger.forget_steps()
            yield

    def lock_start(self) -> AbstractContextManager[None]:
        """Let one part at a time write the plans, or take over those that another has just written."""
        return locked(self._preparation / "start.lock", -1.0, "another process is starting")

    def lock_merge(self) -> AbstractContextManager[None]:
        """Let one part bring the results together, while none begins."""
        return locked(self._preparation / "merge.lock", -1.0, "another process is merging the parts")

    def is_whole(self, case: str) -> bool:
        return (self.data / f"{case}.b2nd").exists()

    def cases(self) -> set[str]:
        """All that are whole; no case's name ends in _seg."""
        return {path.stem for path in self.data.glob("*.b2nd") if not path.stem.endswith("_seg")}

    def publish(self, record: CaseRecord) -> None:
        """Move a case from the temporary folder into the pool, its .b2nd last, then write its record."""
        files = temporary_files(self.temporary, record.case)
        if record.status == PREPARED and len(files) == len(CASE_ENDINGS):
            for file in files:
                os.replace(file, self.data / file.name)
        elif record.status == PREPARED and not self.is_whole(record.case):  # an earlier one may serve
            record = replace(record, status=FAILED, reason="its files were removed before they were in the pool")
        self.ledger.write_record(record)

    def remove_case(self, case: str) -> None:
        for ending in reversed(CASE_ENDINGS):
            (self.data / f"{case}{ending}").unlink(missing_ok=True)


def pool_is_complete(root: Path, data_identifier: str) -> bool:
    """Whether all volumes of the pool in the dataset folder `root` have been looked at."""
    at_work = root / f"{data_identifier}{_PREPARATION}" / INCOMPLETE
    return (root / "dataset_fingerprint.json").is_file() and not at_work.exists()


def check_is_pool(root: Path, plans_name: str) -> None:
    """Raise PoolError if the dataset folder `root` holds something else than a pool."""
    # Looked for twice, because another part may be writing its first files in between.
    if not _is_pool(root, plans_name) and any(_is_foreign(path, root) for path in root.rglob("*")):
        if not _is_pool(root, plans_name):
            raise PoolError(f"{root} exists and is no pretraining pool; choose another dataset ID and name")


def _is_pool(root: Path, plans_name: str) -> bool:
    dataset_json = root / "dataset.json"
    if dataset_json.is_file():
        return bool(read_json(dataset_json, f"{WRITE_ANEW}.").get("misfm_pool"))
    return existing_plans(root.name, plans_name) is not None


def _is_foreign(path: Path, root: Path) -> bool:
    """Whether a file is none of those that runs, also with other plans, make before they write dataset.json."""
    prepares = path.relative_to(root).parts[0].endswith(_PREPARATION)
    return path.is_file() and not path.name.startswith(".") and path != root / REPORT and not prepares


def report_row(one: CaseRecord | LeftOut) -> tuple[str, ...]:
    """The cells of a volume's row in report.csv."""
    if isinstance(one, LeftOut):
        known = {"status": LEFT_OUT, "reason": one.reason, "source": one.source}
        return tuple(known.get(name, "") for name in REPORT_COLUMNS)
    return tuple(_cell(getattr(one, name)) for name in REPORT_COLUMNS)


def write_report(root: Path, rows: Iterable[Sequence[str]]) -> Path:
    """Write report.csv: one row per volume in order of source, whether it is in the pool or not."""
    root.mkdir(parents=True, exist_ok=True)
    source, case = REPORT_COLUMNS.index("source"), REPORT_COLUMNS.index("case")
    in_order = sorted(rows, key=lambda row: (row[source], row[case]))
    with written_whole(root / REPORT) as temporary:
        # Undecodable bytes in the names of files are written as escapes rather than stopping the report.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(REPORT_COLUMNS)
            writer.writerows(in_order)
    return root / REPORT


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(":".join(map(str, item)) if isinstance(item, tuple) else f"{item:.6g}" for item in value)
    return str(value)
