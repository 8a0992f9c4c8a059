"""The preprocessed data behind a fine-tuning plan: linked from where the arrays are the same, else made anew.

They are the same in nnU-Net's own folder, or in that of other plans of ours, such as those of the baseline.

A record beside each data folder says which preprocessing its arrays come from, which files they are, and with which
labels they were made (nnU-Net copies the label files that it preprocesses to `gt_segmentations`). It is written last,
so a folder left half-made, or one whose source has changed since, is never taken for up to date. Folders are made under
another name and renamed when they are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4
from zlib import crc32

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import json_or_nothing, locked, write_json
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.compare import preprocessing_key
from nnunetv2_misfm.plans.files import nnunet_folder, read_dataset_json

_RECORD = ".preprocessing.json"


def provide_data(
    dataset_folder: Path, plans: Mapping[str, Any], base: Mapping[str, Any], configuration: str, num_processes: int
) -> str:
    """Make sure the data folder of a configuration holds the arrays its plan describes.

    Args:
        dataset_folder: the dataset in nnUNet_preprocessed; the plans file must be in it.
        plans: our plans, under a name of their own.
        base: the plans they were made from.
        configuration: to provide.
        num_processes: for nnU-Net's preprocessing.

    Returns:
        One sentence on what was done.

    Raises:
        PlanError: if the data has to be preprocessed and the raw dataset is not there.
        LockedError: if another process provides the same data.
    """
    folder = dataset_folder / plans["configurations"][configuration]["data_identifier"]
    with locked(dataset_folder / f".{folder.name}.lock", 0.0, "another process provides this data"):
        return _provide(folder, plans, base, configuration, num_processes)


def _provide(
    folder: Path, plans: Mapping[str, Any], base: Mapping[str, Any], configuration: str, num_processes: int
) -> str:
    dataset_folder = folder.parent
    stock = dataset_folder / configuration_3d(base, configuration)["data_identifier"]
    wanted = _as_recorded(plans, configuration)
    shared = wanted == _as_recorded(base, configuration) and _looks_complete(stock, dataset_folder)
    record = record_of(folder)
    files, of_stock = listing(folder), listing(stock) if shared else {}
    as_stock, changed = shared and same_files(files, of_stock), _changed(folder, _record_of(record, files))
    if as_stock and changed.labels:
        shared = False  # nnU-Net's arrays are those that were made with the labels of before
    same = changed.preprocessing == wanted
    if same and (as_stock or not shared) and not changed.labels and not changed.cases:
        return f"{folder} is up to date."
    # Of nnU-Net's own arrays it is not known from which files they were made.
    made_from = {} if shared else raw_files(nnunet_folder("nnUNet_raw") / dataset_folder.name)
    recorded = {"preprocessing": wanted, **({"files": of_stock} if shared else {"raw": made_from})}
    source = stock if shared else None
    if shared or made_from:
        source = _with_record(folder, recorded) or source
    if source is not None:
        linked = _link_cases(source, folder)
        how = "hard links, no further disk space" if linked else "copied: another disk, or one without hard links"
        done = f"{folder} shares the arrays of {source.name} ({how})."
    else:
        raw = nnunet_folder("nnUNet_raw") / dataset_folder.name
        if not (raw / "dataset.json").is_file():
            raise PlanError(f"{folder} has to be preprocessed, but {raw} is not there. Put the raw dataset back.")
        _preprocess(folder, plans, configuration, num_processes)
        done = f"{folder} was preprocessed."
    made = {"preprocessing": wanted, "files": listing(folder), "labels": label_files(dataset_folder), "raw": made_from}
    if shared:
        made["shared_with"] = stock.name
    write_json(made, record)
    return done


def _as_recorded(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """What a record says of the preprocessing of such plans, whose tuples JSON makes lists."""
    recorded: dict[str, Any] = json.loads(json.dumps(preprocessing_key(plans, configuration)))
    return recorded


def _with_record(folder: Path, recorded: Mapping[str, Any]) -> Path | None:
    """Another data folder of ours beside this one whose record says all of this, and whose files are as it says."""
    for record in sorted(folder.parent.glob(f"*{_RECORD}")):
        other, known = record.with_name(record.name.removesuffix(_RECORD)), json_or_nothing(record)
        if other != folder and recorded.items() <= known.items() and known.get("files") == listing(other):
            return other
    return None


def _looks_complete(folder: Path, dataset_folder: Path) -> bool:
    names = set(listing(folder))
    cases = [name.removesuffix(".pkl") for name in names if name.endswith(".pkl")]
    forms = (".b2nd", "_seg.b2nd"), (".npz",)  # nnU-Net's today, and of before 2.6
    whole = any(all({f"{case}{ending}" for ending in form} <= names for case in cases) for form in forms)
    return whole and len(cases) >= read_dataset_json(dataset_folder)["numTraining"]


def _preprocess(folder: Path, plans: Mapping[str, Any], configuration: str, num_processes: int) -> None:
    """nnU-Net's preprocessing, which takes the folder's name from a plans file."""
    with _made_whole(folder) as temporary:
        named = deepcopy(dict(plans))
        named["configurations"][configuration]["data_identifier"] = temporary.name
        plans_file = temporary.with_name(f"{temporary.name}.json")
        write_json(named, plans_file)
        try:
            dataset_id = convert_dataset_name_to_id(folder.parent.name)
            preprocess_dataset(dataset_id, temporary.name, (configuration,), [num_processes])
        finally:
            plans_file.unlink()


def _link_cases(source: Path, target: Path) -> bool:
    """Whether all files could be linked; others were copied."""
    linked = True
    with _made_whole(target) as temporary:
        for path in sorted(source.iterdir()):
            try:
                os.link(path, temporary / path.name)
            except OSError:  # another file system, or one without hard links
                shutil.copy2(path, temporary / path.name)
                linked = False
    return linked


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, whose place it takes when the block ends without an error.

    Its name is never used twice: worker processes of a run that was killed may go on for a while in theirs.
    """
    start = f".{folder.name}."
    for left_behind in folder.parent.iterdir():
        if left_behind.name.startswith(start) and left_behind.name.endswith((".tmp", ".tmp.json")):
            if left_behind.is_dir():
                shutil.rmtree(left_behind, ignore_errors=True)
            else:
                left_behind.unlink()
    temporary = folder.with_name(f"{start}{uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        before = folder.with_name(f"{start}{uuid4().hex}.tmp")
        if folder.is_dir():  # removing it takes time, in which there would be neither
            folder.rename(before)
        temporary.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def record_of(folder: Path) -> Path:
    """The record of a data folder."""
    return folder.with_name(f"{folder.name}{_RECORD}")


def listing(folder: Path) -> dict[str, list[int]]:
    """Size and time of last change of each file, but for those that nnU-Net unpacks from .npz files to train."""
    if not folder.is_dir():
        return {}
    return {path.name: _size_and_time(path) for path in sorted(folder.iterdir()) if path.suffix != ".npy"}


def same_files(one: Mapping[str, list[int]] | None, other: Mapping[str, list[int]]) -> bool:
    """Whether two listings are of the same arrays; copies of a dataset have other times.

    nnU-Net compresses arrays: those of other images or labels have other sizes.
    """
    return one is not None and _sizes(one) == _sizes(other)


def _sizes(files: Mapping[str, list[int]]) -> dict[str, int]:
    return {name: size for name, (size, *_) in files.items()}


def _record_of(record: Path, files: Mapping[str, list[int]]) -> dict[str, Any]:
    """What a record says of these files; empty if there is none, or it is of others: nnU-Net has made them anew."""
    known = json_or_nothing(record)
    return known if same_files(known.get("files"), files) else {}


def label_files(dataset_folder: Path) -> dict[str, list[int]]:
    """Size, time of last change and checksum of each label file of a preprocessed dataset."""
    folder = dataset_folder / "gt_segmentations"
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return {path.name: [*_size_and_time(path), _checksum(path)] for path in files}


def raw_files(raw: Path) -> dict[str, list[int]]:
    """Size, time of last change and checksum of each file of a raw dataset's cases; empty if they lie elsewhere."""
    description = json_or_nothing(raw / "dataset.json")
    if "dataset" in description:  # which names the files of each case
        return {}
    files = [path for name in ("imagesTr", "labelsTr") for path in (raw / name).glob("*") if path.is_file()]
    return {f"{path.parent.name}/{path.name}": [*_size_and_time(path), _checksum(path)] for path in sorted(files)}


class Changed(NamedTuple):
    """How the arrays in a data folder of ours were made, and what has been corrected since.

    Attributes:
        labels: names of the label files that are others now; those that are gone do not count.
        source: what the arrays were made of, or linked from.
        cases: names of the files there that are others now, or gone: corrected images, and cases that were withdrawn.
        preprocessing: what they were made with, as in `_as_recorded`; empty if that is not known.
    """

    labels: list[str]
    source: Path
    cases: list[str]
    preprocessing: Mapping[str, Any]


def changed_since(folder: Path) -> Changed:
    """What a data folder's record says; nothing is known of arrays without one, or that nnU-Net has made anew."""
    return _changed(folder, _record_of(record_of(folder), listing(folder)))


def _changed(folder: Path, record: Mapping[str, Any]) -> Changed:
    return Changed(_changed_labels(folder, record), *_changed_cases(folder, record), record.get("preprocessing", {}))


def _changed_labels(folder: Path, record: Mapping[str, Any]) -> list[str]:
    known = record.get("labels")
    if not known:
        return []
    changed = []
    for path in sorted((folder.parent / "gt_segmentations").glob("*")):
        before = known.get(path.name)
        if before is None or _is_changed(path, before):
            changed.append(path.name)
    return changed


def _changed_cases(folder: Path, record: Mapping[str, Any]) -> tuple[Path, list[str]]:
    if "shared_with" in record:
        source = folder.with_name(record["shared_with"])
        before, now = _sizes(record["files"]), _sizes(listing(source))
        there, changed = bool(now), [name for name, size in before.items() if now.get(name) != size]
    else:
        source = Path(os.environ.get("nnUNet_raw", ""), folder.parent.name)
        made_from = record.get("raw", {})
        gone = [name for name in made_from if not (source / name).is_file()]
        there = len(gone) < len(made_from)
        changed = gone + [name for name in made_from.keys() - gone if _is_changed(source / name, made_from[name])]
    # Where nothing is left, the files lie elsewhere now.
    return source, sorted(changed) if there else []


def check_data_unchanged(folder: Path, plans: Mapping[str, Any], configuration: str) -> None:
    """Raise a PlanError if a data folder is not there, or was made by other plans, labels or images than these."""
    plans_name = plans["plans_name"]
    anew = f"nnUNetv2_preprocess -d {folder.parent.name} -plans_name {plans_name} -c {configuration}"
    if not folder.is_dir():
        raise PlanError(f"{folder} is not there. Repeat the misfm_plan that made {plans_name}, or run: {anew}")
    changed, wanted = changed_since(folder), _as_recorded(plans, configuration)
    made = changed.preprocessing or wanted
    others = [f"{key} was {made.get(key)}, is {wanted.get(key)}" for key in wanted if made.get(key) != wanted[key]]
    for names, problem in (
        (others, f"was preprocessed by other plans than {plans_name} are now"),
        (changed.labels, f"was made with other labels than {folder.parent / 'gt_segmentations'} holds now"),
        (changed.cases, f"was made from other files than {changed.source} holds now"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise PlanError(
                f"{folder} {problem} ({names[0]}{more}). Repeat the misfm_plan that made {plans_name}, or preprocess "
                f"it anew: {anew}"
            )


def _is_changed(path: Path, before: list[int]) -> bool:
    """Whether a file is not the one whose size, time and checksum are known; copies of a dataset have other times."""
    return before[:2] != _size_and_time(path) and before[2:] != [_checksum(path)]


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = crc32(block, checksum)
    return checksum


def _size_and_time(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]
