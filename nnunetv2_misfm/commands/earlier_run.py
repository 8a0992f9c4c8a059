"""What an earlier pretraining run left in nnUNet_results, and whether a new one may follow it or go on from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import is_training, locked, read_json, training_lock
from nnunetv2_misfm.plans.compare import what_a_run_must_keep
from nnunetv2_misfm.plans.files import FINAL, nnunet_folder
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

    @property
    def exists(self) -> bool:
        """Whether there is anything to continue or lose."""
        return any(self.folder.glob("checkpoint_*.pth"))

    def check_ready(self, may_exist: bool) -> None:
        """Before a run starts or goes on; what one that was killed had put aside, without saving anything, comes back.

        Raises:
            LockedError: if another process trains there.
            PlanError: if there is a run, unless that may be.
        """
        self.check_free()
        if self._aside.is_dir():
            with self._claimed():
                self._settle()
        if may_exist or not self.exists:
            return
        finished = (self.folder / FINAL).is_file()
        state = "a finished" if finished else "an unfinished"
        remedy = "--c -num_epochs N to make it longer" if finished else "--c to continue it"
        raise PlanError(
            f"{self.folder} holds {state} run. Use {remedy}, --overwrite to start anew (it comes back if the new one "
            f"saves nothing), or -overwrite_plans_name to train beside it (without -i, which would prepare the volumes "
            f"once more)."
        )

    def check_same(self, plans: Mapping[str, Any], configuration: str) -> None:
        """Raise a PlanError if a run that is to go on would become another one, naming what differs."""
        path = self.folder.parent / "plans.json"
        if not self.exists or not path.is_file():
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

    def check_free(self) -> None:
        """Raise a LockedError if another process trains there."""
        if self.folder.is_dir():
            with training_lock(self.folder):
                pass

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """Make room for a new run, until it ends: then what was here is deleted, or comes back if nothing was saved.

        Raises:
            LockedError: if another process trains there, or makes room for a run.
        """
        self.check_free()
        if not self.folder.is_dir():
            yield
            return
        with self._claimed():
            self._settle()  # another command may have been killed since `check_ready`
            self.folder.rename(self._aside)
            try:
                yield
            finally:
                self._settle()

    def _claimed(self) -> AbstractContextManager[None]:
        return locked(self.folder.with_name(f".{self.folder.name}.lock"), 0.0, "another process replaces this run")

    def _settle(self) -> None:
        if not self._aside.is_dir() or is_training(self.folder):
            return
        if self.exists:
            shutil.rmtree(self._aside)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._aside.rename(self.folder)

    @property
    def _aside(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}_before")
