"""The preprocessed data behind a fine-tuning plan: linked from nnU-Net's where the arrays are the same, else made anew.

A small record beside each data folder says which preprocessing its arrays come from and is written last, so a folder
left half-made is never taken for whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunetv2_misfm.datasets import read_dataset_json
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.transfer.plans import preprocessing_key, same_preprocessing


def provide_data(
    dataset_folder: Path, plans: Mapping[str, Any], base: Mapping[str, Any], configuration: str, num_processes: int
) -> str:
    """Make sure the data folder of a configuration holds the arrays its plan describes.

    Args:
        dataset_folder: the dataset in nnUNet_preprocessed; the plans file must be in it.
        plans: our plans.
        base: the plans they were made from.
        configuration: to provide.
        num_processes: for nnU-Net's preprocessing.

    Returns:
        One sentence on what was done.
    """
    folder = dataset_folder / plans["configurations"][configuration]["data_identifier"]
    record = dataset_folder / f"{folder.name}.preprocessing.json"
    wanted = preprocessing_key(plans, configuration)
    if folder.is_dir() and record.is_file() and json.loads(record.read_text()) == json.loads(json.dumps(wanted)):
        return f"{folder} is up to date."
    record.unlink(missing_ok=True)
    stock = dataset_folder / _data_identifier(base, configuration)
    if same_preprocessing(plans, base, configuration) and _looks_complete(stock, dataset_folder):
        _link_cases(stock, folder)
        done = f"{folder} shares the arrays of {stock.name} (hard links, no further disk space)."
    else:
        dataset_id = convert_dataset_name_to_id(dataset_folder.name)
        preprocess_dataset(dataset_id, plans["plans_name"], (configuration,), [num_processes])
        done = f"{folder} was preprocessed."
    write_json(wanted, record)
    return done


def _data_identifier(plans: Mapping[str, Any], configuration: str) -> str:
    entry = plans["configurations"][configuration]
    while "data_identifier" not in entry:
        entry = plans["configurations"][entry["inherits_from"]]
    return entry["data_identifier"]


def _looks_complete(folder: Path, dataset_folder: Path) -> bool:
    dataset = read_dataset_json(dataset_folder)
    properties = {path.stem for path in folder.glob("*.pkl")} if folder.is_dir() else set()
    arrays = {path.stem for path in folder.glob("*.b2nd")} if folder.is_dir() else set()
    return len(properties) >= dataset["numTraining"] and properties <= arrays


def _link_cases(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir()
    for path in sorted(source.iterdir()):
        try:
            os.link(path, target / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(path, target / path.name)
