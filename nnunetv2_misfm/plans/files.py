"""Datasets and plans files in nnU-Net's folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import read_json
from nnunetv2_misfm.plans.checks import check_complete, check_dataset
from nnunetv2_misfm.plans.run_settings import PRETRAIN_INFO

_OF_A_POOL = "for a pool, remove it and run misfm_pretrain with the -i and the options that made the pool"


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
    if wanted.isdecimal():
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
    content = read_json(path, f"Plan the dataset with nnU-Net again; {_OF_A_POOL}.")
    check_dataset(content, path)
    return content


def read_plans(dataset_folder: Path, plans_name: str) -> dict[str, Any]:
    """A plans file of a dataset.

    Raises:
        PlanError: if it is missing or damaged; the message lists the plans there are.
    """
    others = sorted(
        path.stem
        for path in dataset_folder.glob("*.json")
        if path.stem != plans_name and _is_to_plan_from(path.read_text(errors="replace"))
    )
    path = dataset_folder / f"{plans_name}.json"
    choice = f"Choose others with -p ({', '.join(others)}), or plan" if others else "Plan"
    remedy = f"{choice} the dataset with nnU-Net{' again' if path.exists() else ''}; {_OF_A_POOL}."
    plans = read_json(path, remedy)
    check_complete(plans, path, remedy)
    return plans


def _is_to_plan_from(text: str) -> bool:
    """Whether a JSON file holds plans, but not those of a fine-tuning, which no others are made from."""
    return '"configurations"' in text and f'"{PRETRAIN_INFO}"' not in text
