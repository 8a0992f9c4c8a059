"""What an earlier pretraining run left in nnUNet_results, and whether a new one may follow it or go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import read_json, training_lock
from nnunetv2_misfm.plans.compare import what_a_run_must_keep
from nnunetv2_misfm.plans.files import FINAL, has_checkpoints, nnunet_folder
from nnunetv2_misfm.plans.run_settings import BLOCK
from nnunetv2_misfm.pretrain.tasks import default_settings, task_class


def run_folder(task: str, dataset_name: str, plans_name: str, configuration: str) -> Path:
    """The results folder of a pretraining run."""
    name = f"{task_class(task).trainer()}__{plans_name}__{configuration}"
    return nnunet_folder("nnUNet_results") / dataset_name / name / "fold_all"


class EarlierRun:
    """A results folder in which there may be a run.

    Args:
        folder: from `run_folder`.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def check_ready(self, may_exist: bool) -> None:
        """Before a run starts or goes on.

        Raises:
            LockedError: if another process trains there.
            PlanError: if there is a run, unless that may be.
        """
        if self.folder.is_dir():
            with training_lock(self.folder):
                pass
        if may_exist or not has_checkpoints(self.folder):
            return
        finished = (self.folder / FINAL).is_file()
        state = "a finished" if finished else "an unfinished"
        remedy = "--c -num_epochs N to make it longer" if finished else "--c to continue it"
        raise PlanError(
            f"{self.folder} holds {state} run. Use {remedy}, --overwrite to start anew (its files are kept in a folder "
            f"'earlier_N' there), or -overwrite_plans_name to train beside it (without -i, which would prepare the "
            f"volumes once more)."
        )

    def check_same(self, plans: Mapping[str, Any], configuration: str) -> None:
        """Raise a PlanError if a run that is to go on would become another one, naming what differs."""
        path = self.folder.parent / "plans.json"
        if not has_checkpoints(self.folder) or not path.is_file():
            return
        before = read_json(path, "Start the run anew with --overwrite.")
        differing = what_a_run_must_keep(before, plans, configuration, **default_settings(plans[BLOCK]["task"]))
        if differing:
            lines = "\n  ".join(differing)
            raise PlanError(
                f"{self.folder} was started with other settings:\n  {lines}\n"
                f"Leave these options out to continue it, or train beside it with -overwrite_plans_name."
            )

    def is_finished(self, plans: Mapping[str, Any]) -> bool:
        """Whether the run has done all epochs that its plans ask for."""
        final = self.folder / FINAL
        if not final.is_file():
            return False
        from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint

        return bool(read_checkpoint(final)["current_epoch"] >= plans[BLOCK]["num_epochs"])
