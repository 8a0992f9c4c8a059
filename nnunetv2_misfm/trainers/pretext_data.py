"""What a pretext run has instead of labels and folds: outputs, a hold-out list, and a clock on its data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_misfm.errors import UserError, first_line
from nnunetv2_misfm.pretrain.task import PretextTask

_HELD_OUT_SHARE = 0.05
_MOST_HELD_OUT = 50
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


def pretext_dataset_json(dataset_json: Mapping[str, Any], task: PretextTask) -> dict[str, Any]:
    """The dataset.json of a pretext run: the dataset's channels, and as many labels as the task has outputs.

    nnU-Net's label manager then gives the network as many.
    """
    channels = dataset_json.get("channel_names", dataset_json.get("modality", ()))
    kept = {key: value for key, value in dataset_json.items() if key not in ("labels", "regions_class_order")}
    labels = {"background": 0} | {f"{task.group()}_{k}": k for k in range(1, task.num_outputs(len(channels)))}
    return {**kept, "labels": labels}


def hold_out(identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation volumes; a volume's side does not change much when others join the pool."""
    by_hash = sorted(identifiers, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(by_hash) < _FEWEST_TO_HOLD_OUT_FROM:
        return sorted(by_hash), sorted(by_hash)
    count = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT_SHARE * len(by_hash))))
    return sorted(by_hash[count:]), sorted(by_hash[:count])
