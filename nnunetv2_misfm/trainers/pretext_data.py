"""What a pretext run has instead of labels and folds: a task, outputs, a hold-out list, and a clock on its data."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_misfm.errors import PlanError, UserError, first_line
from nnunetv2_misfm.plans.checks import channel_names
from nnunetv2_misfm.plans.run_settings import PretrainingSettings, block_for, pretext_task_of
from nnunetv2_misfm.pretrain.task import PretextTask

_HELD_OUT_SHARE = 0.05
_FEWEST_HELD_OUT, _MOST_HELD_OUT = 2, 50  # Volume Fusion mixes two
_FEWEST_TO_HOLD_OUT_FROM = 10


class TimedIterator:
    """An iterator that adds up how long its user waited for it.

    Attributes:
        waited: seconds; the user may reset it.
    """

    def __init__(self, iterator: Iterator[Any]):
        self.iterator = iterator
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        started = perf_counter()
        item = next(self.iterator)
        self.waited += perf_counter() - started
        return item


@contextmanager
def killed_workers_are_named() -> Iterator[None]:
    """A process that reads crops and is killed ends the block with what to do about it.

    Raises:
        UserError: in place of the plain RuntimeError that PyTorch raises at whatever line training has reached.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"A process that reads crops ended: {first_line(error)} Signal Killed mostly means that the machine ran "
            f"out of memory: use fewer of them (nnUNet_n_proc_DA, now {get_allowed_n_proc_DA()}), and continue the run "
            f"with --c."
        ) from None


def pretext_block(plans: Mapping[str, Any], only: str | None) -> Mapping[str, Any]:
    """The `misfm` block that says which task is trained, and how.

    Args:
        plans: of the run.
        only: the one task that the trainer is for, which it takes plans without a task to mean; None for any.

    Raises:
        PlanError: if the plans name no task or another one.
        SettingsError: if they name one that is not known.
    """
    block, name = block_for(plans, PretrainingSettings), plans["plans_name"]
    if only is None and pretext_task_of(plans) is None:
        raise PlanError(
            f"The plans {name} name no pretext task. Plan and train with misfm_pretrain -d {plans['dataset_name']} "
            f"-pretext NAME."
        )
    if only not in (None, block["task"]):
        raise PlanError(f"The plans {name} are for the pretext task {block['task']}. Use -tr PretrainingTrainer.")
    return block


def pretext_dataset_json(dataset_json: Mapping[str, Any], task: PretextTask) -> dict[str, Any]:
    """The dataset.json of a pretext run: the dataset's channels, and as many labels as the task has outputs.

    nnU-Net's label manager then gives the network as many.
    """
    channels = channel_names(dataset_json)
    kept = {key: value for key, value in dataset_json.items() if key not in ("labels", "regions_class_order")}
    labels = {"background": 0} | {f"{task.group()}_{k}": k for k in range(1, task.num_outputs(len(channels)))}
    return {**kept, "labels": labels}


def forget_frames(error: BaseException) -> None:
    """Let go of what the functions held in which an error came up: worker processes end with the loader they serve."""
    raised: BaseException | None = error
    while raised is not None:
        traceback.clear_frames(raised.__traceback__)
        raised = raised.__context__


def hold_out(identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation volumes; a volume's side does not change much when others join the pool."""
    by_hash = sorted(identifiers, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(by_hash) < _FEWEST_TO_HOLD_OUT_FROM:
        return sorted(by_hash), sorted(by_hash)
    count = min(_MOST_HELD_OUT, max(_FEWEST_HELD_OUT, round(_HELD_OUT_SHARE * len(by_hash))))
    return sorted(by_hash[count:]), sorted(by_hash[:count])
