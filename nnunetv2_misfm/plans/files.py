"""Datasets and plans files in nnU-Net's folders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_misfm.environment import without_quotes
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import json_or_nothing, read_json
from nnunetv2_misfm.plans.checks import check_complete, check_dataset, with_present_names
from nnunetv2_misfm.plans.run_settings import PRETRAIN_INFO, pretrain_info

FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"  # nnU-Net's, in a results folder
CHECKPOINTS = "checkpoint_*.pth"
_FOLDS = 5  # of nnU-Net's cross-validation
_OF_A_POOL = "for a pool, remove it and run misfm_pretrain with the -i and the options that made the pool"


def nnunet_folder(variable: str) -> Path:
    """One of nnU-Net's three folders.

    Raises:
        PlanError: if the environment variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise PlanError(f"{variable} is not set. Set nnU-Net's three folders first; misfm_doctor shows them.")
    if (meant := without_quotes(value)) != value:
        raise PlanError(f"{variable} has quotes in its value, {value}. Set it to {meant}")
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


def has_checkpoints(folder: Path) -> bool:
    """Whether there is anything to continue or lose in the results folder of a fold."""
    return any(folder.glob(CHECKPOINTS))


def dataset_number(dataset_name: str) -> str:
    """The digits in the name of a dataset, such as 004."""
    return dataset_name.removeprefix("Dataset").partition("_")[0]


def folds(dataset_folder: Path, num_cases: int) -> list[int | str]:
    """The folds that nnU-Net can train: those of its splits file, of the split it would write, or for few cases all.

    Raises:
        PlanError: if the splits file is damaged.
    """
    path = dataset_folder / "splits_final.json"
    try:
        return list(range(len(json.loads(path.read_text(encoding="utf-8")))))
    except FileNotFoundError:
        return list(range(_FOLDS)) if num_cases >= _FOLDS else ["all"]
    except (TypeError, ValueError) as error:
        raise PlanError(f"{path} is not readable JSON ({error}). Remove it; nnU-Net writes it anew.") from None


def read_dataset_json(dataset_folder: Path) -> dict[str, Any]:
    """The dataset.json of a preprocessed dataset.

    Raises:
        PlanError: if it is missing, damaged or incomplete.
    """
    path = dataset_folder / "dataset.json"
    content = read_json(path, f"Plan the dataset with nnU-Net again; {_OF_A_POOL}.")
    check_dataset(content, path)
    return content


def read_plans(dataset_folder: Path, plans_name: str, configurations: Collection[str]) -> dict[str, Any]:
    """A plans file of a dataset, as plans of that dataset: one that was copied from another dataset is told of.

    Args:
        dataset_folder: in nnUNet_preprocessed.
        plans_name: of the file.
        configurations: that will be used and have to be complete.

    Raises:
        PlanError: if it is missing or damaged; the message lists the plans there are.
    """
    others = sorted(
        path.stem
        for path in dataset_folder.glob("*.json")
        if path.stem != plans_name and _is_to_plan_from(json_or_nothing(path))
    )
    path = dataset_folder / f"{plans_name}.json"
    choice = f"Choose others with -p ({', '.join(others)}), or plan" if others else "Plan"
    remedy = f"{choice} the dataset with nnU-Net{' again' if path.exists() else ''}; {_OF_A_POOL}."
    plans = with_present_names(read_json(path, remedy))
    check_complete(plans, path, remedy, configurations)
    named = plans["dataset_name"]
    if named != dataset_folder.name:
        print(f"Note: {path} names another dataset, {named}; {dataset_folder.name} is used, as asked for.")
        plans["dataset_name"] = dataset_folder.name
    return plans


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """Labels by name in the order of their values, or regions as they are listed: the order of nnU-Net's scores."""
    labels = dataset_json["labels"].items()
    foreground = {name: label for name, label in labels if name != "ignore" and label not in (0, [0])}
    if any(isinstance(label, list) and len(label) > 1 for label in foreground.values()):
        return foreground
    return dict(sorted(foreground.items(), key=lambda one: one[1][0] if isinstance(one[1], list) else one[1]))


def weights_of(plans: Mapping[str, Any]) -> str | None:
    """The checkpoint that a fine-tuning by these plans starts from."""
    return pretrain_info(plans).get("checkpoint_path")


def plans_with_weights(dataset_folder: Path) -> list[str]:
    """Names of the dataset's plans that start from pretrained weights."""
    paths = sorted(dataset_folder.glob("*.json"))
    return [path.stem for path in paths if weights_of(json_or_nothing(path))]


def check_dataset_of_plans(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> None:
    """Raise a PlanError if plans may have been read from another dataset's folder than the one they name.

    nnU-Net gives a trainer the plans and the dataset.json of the dataset that was asked for, but not its name, and then
    trains on the one that the plans name. The command line of nnUNetv2_train tells.
    """
    root, name = os.environ.get("nnUNet_preprocessed"), plans["dataset_name"]
    if not root or _is_first_argument(name):
        return
    for path in sorted(Path(root).glob(f"Dataset*/{plans['plans_name']}.json")):
        if path.parent.name == name or json_or_nothing(path).get("dataset_name") != name:
            continue
        if json_or_nothing(path.parent / "dataset.json") == dataset_json:
            raise PlanError(
                f"{path} names another dataset, {name}, and nnU-Net would train on its data. Plan "
                f"{path.parent.name} itself: misfm_plan -d {path.parent.name} -p {plans['plans_name']} writes plans to "
                f"train with; nnUNetv2_plan_experiment -d {path.parent.name} writes nnU-Net's anew."
            )


def _is_first_argument(dataset_name: str) -> bool:
    """Whether the running program was started for a dataset, given by its name or ID."""
    given, number = next(iter(sys.argv[1:]), ""), dataset_number(dataset_name)
    return given == dataset_name or (given.isdecimal() and number.isdecimal() and int(given) == int(number))


def _is_to_plan_from(content: Mapping[str, Any]) -> bool:
    """Whether a JSON file holds plans, but not those of a fine-tuning, which no others are made from."""
    return "configurations" in content and PRETRAIN_INFO not in content
