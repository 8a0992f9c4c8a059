"""The folder of a comparison: nnU-Net's three folders within it, so that the user's splits, plans and results stay.

The preprocessed arrays are the user's own, reached by links. Every run has plans of its own (`ARM_nN_seedS.json`) and a
fold of its own in `splits_final.json`, so that nnU-Net's commands work on what is here too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.commands.compare.arms import Arm, Run
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import read_json, write_json
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.files import foreground_labels, nnunet_folder, preprocessed_dataset, read_plans
from nnunetv2_misfm.plans.run_settings import BLOCK

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

_NAMED = 5  # of files that are missing
_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class Workspace:
    """The user's dataset, seen from a folder of its own.

    Args:
        folder: of the comparison.
        dataset: ID or name.
        configuration, plans: to start from.

    Raises:
        PlanError: if the dataset is not there, or the configuration cannot be compared.
    """

    def __init__(self, folder: Path | None, dataset: str, configuration: str, plans: str):
        self.users_preprocessed = preprocessed_dataset(dataset)
        self.dataset = self.users_preprocessed.name
        self.users_raw = nnunet_folder("nnUNet_raw") / self.dataset
        self.configuration = configuration
        # A copy of a plans file may still have the name of the first in it.
        self.base = read_plans(self.users_preprocessed, plans, [configuration]) | {"plans_name": plans}
        if configuration_3d(self.base, configuration).get("previous_stage") is not None:
            raise PlanError(f"-c {configuration} needs predictions of another stage. Compare 3d_fullres or 3d_lowres.")
        if not (self.users_raw / "dataset.json").is_file():
            raise PlanError(f"{self.users_raw} has no dataset.json; the test images are read there. Set nnUNet_raw.")
        for name in ("dataset.json", "dataset_fingerprint.json"):
            if not (self.users_preprocessed / name).is_file():
                raise PlanError(
                    f"{self.users_preprocessed} has no {name}. Plan and preprocess the dataset with nnU-Net first: "
                    f"nnUNetv2_plan_and_preprocess -d {dataset}"
                )
        self.folder = (folder or Path(f"misfm_compare_{self.dataset}")).resolve()
        self.raw = self.folder / "nnUNet_raw" / self.dataset
        self.preprocessed = self.folder / "nnUNet_preprocessed" / self.dataset

    def prepare(self) -> None:
        """Make the folders and links, and let the environment, which nnU-Net reads each time, name them."""
        for variable in _VARIABLES:
            (self.folder / variable).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(self.folder / variable)
        _link(self.users_raw, self.raw)
        self.preprocessed.mkdir(exist_ok=True)
        # Where nnU-Net has not preprocessed yet, misfm_plan does it here.
        for name in ("gt_segmentations", configuration_3d(self.base, self.configuration)["data_identifier"]):
            if (self.users_preprocessed / name).is_dir():
                _link(self.users_preprocessed / name, self.preprocessed / name)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            shutil.copyfile(self.users_preprocessed / name, self.preprocessed / name)
        write_json(self.base, self.preprocessed / f"{self.base['plans_name']}.json")

    @cached_property
    def reader(self) -> BaseReaderWriter:
        """nnU-Net's reader of the dataset's images and labels."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # takes seconds

        reader: BaseReaderWriter = PlansManager(self.base).image_reader_writer_class()
        return reader

    @cached_property
    def raw_dataset_json(self) -> dict[str, Any]:
        """The raw dataset's dataset.json."""
        return read_json(self.users_raw / "dataset.json", "Put the raw dataset back.")

    @property
    def file_ending(self) -> str:
        """Of the dataset's files."""
        return str(self.raw_dataset_json["file_ending"])

    @cached_property
    def cases(self) -> dict[str, tuple[list[str], str]]:
        """The image files and the label file of each case. Raises PlanError if some are not there."""
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        found = get_filenames_of_train_images_and_targets(str(self.users_raw))
        cases = {case: (list(files["images"]), str(files["label"])) for case, files in found.items()}
        missing = [file for images, label in cases.values() for file in (*images, label) if not Path(file).is_file()]
        if missing:
            raise PlanError(
                f"{len(missing)} files of {self.users_raw} are not there: {', '.join(missing[:_NAMED])}"
                f"{' ...' if len(missing) > _NAMED else ''}. Put them back, or take their cases out of the dataset."
            )
        return cases

    def labels(self) -> dict[str, int | list[int]]:
        """The foreground labels or regions by name, in the order of nnU-Net's scores."""
        return foreground_labels(read_json(self.preprocessed / "dataset.json", "Plan the dataset again."))

    def write_folds(self, folds: Sequence[Mapping[str, list[str]]]) -> dict[str, int]:
        """Add folds to the splits file; those of earlier calls keep their numbers.

        Returns:
            The number of each fold, by its content as JSON.
        """
        path = self.preprocessed / "splits_final.json"
        there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        known = {fold_key(fold): number for number, fold in enumerate(there)}
        for fold in folds:
            if fold_key(fold) not in known:
                known[fold_key(fold)] = len(there)
                there.append(dict(fold))
        write_json(there, path)
        return known

    def plans_of(self, name: str) -> dict[str, Any]:
        """Plans of an arm or a run."""
        return read_json(self.preprocessed / f"{name}.json", f"Remove {self.folder} and start again.")

    def write_run_plans(self, arm: Arm, run: Run) -> None:
        """The arm's plans with the seed and the learning rate of a run."""
        plans = self.plans_of(arm.plans) | {"plans_name": run.title}
        if BLOCK in plans:
            plans[BLOCK] |= {"seed": run.seed, "initial_lr": run.rate}
        write_json(plans, self.preprocessed / f"{run.title}.json")

    def results(self, arm: Arm, run: Run) -> Path:
        """Where nnU-Net's trainer puts a run, over all folds."""
        name = f"{arm.trainer}__{run.title}__{self.configuration}"
        return self.folder / "nnUNet_results" / self.dataset / name

    def run_folder(self, run: Run) -> Path:
        """What is kept of a run: its record, log and predictions."""
        return self.folder / "runs" / run.title


def fold_key(fold: Mapping[str, list[str]]) -> str:
    """A fold's content as a string to look it up by."""
    return json.dumps(fold, sort_keys=True)


def _link(source: Path, target: Path) -> None:
    if target.is_symlink():
        if target.resolve() != source.resolve():
            raise PlanError(f"{target} leads to {target.resolve()}, not to {source}. Choose another folder with -o.")
    elif not target.exists():  # else it was made here, when there was nothing to lead to
        target.symlink_to(source.resolve(), target_is_directory=True)
