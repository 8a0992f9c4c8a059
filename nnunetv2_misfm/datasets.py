"""Datasets and plans files in nnU-Net's folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plan_checks import check_complete, check_dataset


def nnunet_folder(variable: str) -> Path:
    """One of nnU-Net's three folders.

    Raises:
        PlanError: if the environment variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise PlanError(f"{variable} is not set. Set nnU-Net's three folders first; misfm_doctor shows them.")
    return Path(value)


def preprocessed_dataset(dataset_name_or_id: str) -> Path:
    """The folder of a dataset in nnUNet_preprocessed.

    Raises:
        PlanError: if the folder is not set, or the dataset is not there or ambiguous.
    """
    root, wanted = nnunet_folder("nnUNet_preprocessed"), dataset_name_or_id
    if not wanted.strip(" ./"):
        raise PlanError(f"-d {wanted!r} is not the ID or name of a dataset.")
    if wanted.isdigit():
        found = sorted(path for path in root.glob(f"Dataset{int(wanted):03d}_*") if path.is_dir())
    else:
        found = [root / wanted] if (root / wanted).is_dir() else []
    if len(found) != 1:
        problem = "is there more than once: " + ", ".join(f.name for f in found) if found else "is not there"
        raise PlanError(
            f"The dataset {wanted} {problem} in {root}. Plan and preprocess it with nnU-Net first: "
            f"nnUNetv2_plan_and_preprocess -d {wanted}"
        )
    return found[0]


def read_dataset_json(dataset_folder: Path) -> dict[str, Any]:
    """The dataset.json of a preprocessed dataset.

    Raises:
        PlanError: if it is missing, damaged or incomplete.
    """
    path = dataset_folder / "dataset.json"
    content = read_json(path, "Plan the dataset with nnU-Net again.")
    check_dataset(content, path)
    return content


def read_plans(dataset_folder: Path, plans_name: str) -> dict[str, Any]:
    """A plans file of a dataset.

    Raises:
        PlanError: if it is missing or damaged; the message lists the plans there are.
    """
    others = sorted(
        path.stem for path in dataset_folder.glob("*.json") if '"configurations"' in path.read_text(errors="replace")
    )
    there = f"There are: {', '.join(others)}." if others else "There are none yet."
    plans = read_json(
        dataset_folder / f"{plans_name}.json", f"{there} Choose plans with -p, or run nnUNetv2_plan_and_preprocess."
    )
    check_complete(plans, dataset_folder / f"{plans_name}.json", there)
    return plans


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        PlanError: if the file is missing, damaged or holds something else; the message ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist. {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not readable JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{path} holds a JSON {type(content).__name__}, not an object. {remedy}")
    return content
