"""Finding a pretext task by its name, and reading all that steers a pretraining run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS, PretrainingSettings, without_groups
from nnunetv2_misfm.plans.settings import Settings, read_settings, write_settings
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.task import PretextTask

AUGMENTATION = "augmentation"


def task_class(name: str) -> type[PretextTask]:
    """The class of a task of `PRETEXT_TASKS`."""
    module, _, attribute = PRETEXT_TASKS[name].rpartition(".")
    found: type[PretextTask] = getattr(importlib.import_module(module), attribute)
    return found


def task_classes() -> list[type[PretextTask]]:
    """All tasks."""
    return [task_class(name) for name in PRETEXT_TASKS]


def default_settings(name: str) -> dict[str, Any]:
    """What a run of this task has where nothing is given: `run`, and its groups by their names in the plans."""
    kind = task_class(name)
    return {"run": kind.run_defaults, kind.group(): kind.Settings(), AUGMENTATION: kind.augmentation_defaults}


def too_short(task: str, num_iterations: int) -> str:
    """A sentence about a pretraining of so few iterations that its weights may do harm; empty if it is long enough."""
    least = task_class(task).least_iterations
    if num_iterations >= least:
        return ""
    return (
        f"{num_iterations:,} iterations of {task} are few: where it had hardly learnt its task, its weights made "
        f"fine-tuning worse in a study. Give it {least:,} or more (-num_epochs of misfm_pretrain), or take another "
        f"-pretext for short runs."
    )


def settings_of(block: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """The group (empty for the run's own), name, value and default of each setting in the block of a pretraining."""
    groups = default_settings(block["task"])
    groups = {"": groups.pop("run"), **groups}
    for group, settings in groups.items():
        values = block.get(group, {}) if group else block
        for name, default in write_settings(settings).items():
            yield group, name, values.get(name, default), default


@dataclass(frozen=True)
class PretextSettings:
    """All that steers a pretraining run.

    Attributes:
        kind: the class of the task.
        run, own, augmentation: settings of the run, of the task and of the augmentation.
    """

    kind: type[PretextTask]
    run: PretrainingSettings
    own: Settings
    augmentation: AugmentSettings

    @classmethod
    def read(cls, block: Mapping[str, Any], where: str) -> PretextSettings:
        """From a `misfm` block whose task is known.

        Args:
            block: as in plans.
            where: what error messages call it.

        Raises:
            SettingsError: listing every unknown name and bad value of one of the groups.
        """
        kind = task_class(block["task"])
        own, augmentation = (block.get(name, {}) for name in (kind.group(), AUGMENTATION))
        of_run = without_groups(block, kind.group(), AUGMENTATION, "pool")
        return cls(
            kind=kind,
            run=read_settings(PretrainingSettings, of_run, where, kind.run_defaults),
            own=read_settings(kind.Settings, own, f"{where}, group '{kind.group()}',"),
            augmentation=read_settings(
                AugmentSettings, augmentation, f"{where}, group '{AUGMENTATION}',", kind.augmentation_defaults
            ),
        )

    def block(self) -> dict[str, Any]:
        """The `misfm` block of the plans."""
        return {
            "task": self.kind.name,
            **write_settings(self.run),
            self.kind.group(): write_settings(self.own),
            AUGMENTATION: write_settings(self.augmentation),
        }

    def task(self) -> PretextTask:
        """A new task with these settings."""
        return self.kind(self.own)
