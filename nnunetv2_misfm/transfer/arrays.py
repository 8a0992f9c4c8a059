"""The preprocessed data behind a fine-tuning plan: linked from nnU-Net's where the arrays are the same, else made anew.

A record beside each data folder says which preprocessing its arrays come from and which files they are. It is written
last, so a folder left half-made, or one whose source has changed since, is never taken for up to date. Folders are made
under another name and renamed when they are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import locked, write_json
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.files import nnunet_folder, read_dataset_json
from nnunetv2_misfm.transfer.array_record import changed_labels, label_files, listing, read_record, record_of
from nnunetv2_misfm.transfer.planning import preprocessing_key, same_preprocessing


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
    shared = same_preprocessing(plans, base, configuration) and _looks_complete(stock, dataset_folder)
    record = record_of(folder)
    wanted = json.loads(json.dumps(preprocessing_key(plans, configuration)))
    known = read_record(record)
    files = listing(folder)
    same = known is not None and known.get("preprocessing") == wanted and known.get("files") == files
    if same and (not shared or files == listing(stock)) and not changed_labels(folder):
        return f"{folder} is up to date."
    record.unlink(missing_ok=True)
    if shared:
        _link_cases(stock, folder)
        done = f"{folder} shares the arrays of {stock.name} (hard links, no further disk space)."
    else:
        raw = nnunet_folder("nnUNet_raw") / dataset_folder.name
        if not (raw / "dataset.json").is_file():
            raise PlanError(f"{folder} has to be preprocessed, but {raw} is not there. Put the raw dataset back.")
        _preprocess(folder, plans, configuration, num_processes)
        done = f"{folder} was preprocessed."
    write_json({"preprocessing": wanted, "files": listing(folder), "labels": label_files(dataset_folder)}, record)
    return done


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


def _link_cases(source: Path, target: Path) -> None:
    with _made_whole(target) as temporary:
        for path in sorted(source.iterdir()):
            try:
                os.link(path, temporary / path.name)
            except OSError:  # another file system, or one without hard links
                shutil.copy2(path, temporary / path.name)


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
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
