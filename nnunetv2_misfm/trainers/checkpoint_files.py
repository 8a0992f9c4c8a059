"""The checkpoints in a results folder: nnU-Net's files, the one before the latest, and what earlier runs have left.

nnU-Net continues from checkpoint_final.pth, else from checkpoint_latest.pth, else from checkpoint_best.pth. What an
earlier run left under these names must not be taken for the present one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError, read_checkpoint
from nnunetv2_misfm.plans.files import CHECKPOINTS, FINAL, LATEST
from nnunetv2_misfm.trainers.distributed import from_all_processes
from nnunetv2_misfm.trainers.metrics_file import METRICS
from nnunetv2_misfm.trainers.run_page import PAGE, PICTURES

PREVIOUS = "checkpoint_previous.pth"
# What tells one run from another on its page and to nnU-Net's commands; what is written when a run starts is replaced.
_OF_A_RUN = (CHECKPOINTS, METRICS, PAGE, "*.png", PICTURES, "validation", "training_log_*.txt")


def left_by_earlier_runs(folder: Path) -> list[str]:
    """The checkpoints in a folder, also those that were ever put aside there, by their paths in it."""
    found = (*folder.glob(CHECKPOINTS), *folder.glob(f"earlier_*/{CHECKPOINTS}"))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def put_aside(folder: Path, log: Path) -> Path | None:
    """Move what another run has left into a folder `earlier_N` beside it, for a new run in the same folder.

    Args:
        folder: results folder of a fold.
        log: of the new run, which stays.

    Returns:
        The folder; None if nothing was left.
    """
    left = sorted(path for pattern in _OF_A_RUN for path in folder.glob(pattern) if path.name != log.name)
    if all(path.name.startswith("training_log_") for path in left):  # of a run that ended in its first epoch
        return None
    number = 1
    while (folder / f"earlier_{number}").exists():
        number += 1
    aside = folder / f"earlier_{number}"
    aside.mkdir()
    for path in left:
        path.replace(aside / path.name)
    return aside


def reopen(folder: Path) -> None:
    """Make the final checkpoint the latest: a run that goes on is not finished any more."""
    final = folder / FINAL
    if final.is_file():
        final.replace(folder / LATEST)


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Have a file under another name, and back under its own in the end."""
    aside = path.with_name(f"kept_{path.name}")
    there = path.is_file()
    if there:
        path.replace(aside)
    try:
        yield
    finally:
        if there:
            aside.replace(path)


def remove_half_written(folder: Path) -> None:
    """Remove what a run that was killed while it saved has left under temporary names."""
    for path in folder.glob(".checkpoint_*.tmp"):
        path.unlink()


def read_latest_or_previous(path: Path, say: Callable[[str], None], *, rank: int) -> dict[str, Any]:
    """The checkpoint at `path`; if that is the latest and was damaged after it was written, the one before it.

    All processes of a training have to call this at the same time. They go on from the same file, and the damaged one
    is renamed, by the first of them, when all have read.

    Args:
        path: of the checkpoint.
        say: told when the one before is taken.
        rank: of this process.

    Raises:
        CheckpointError: if there is none that all processes can read.
    """
    previous = path.with_name(PREVIOUS)
    content, error = _read_by_all(path)
    if not error:
        return content
    if path.name != LATEST or not previous.is_file():
        raise CheckpointError(error)
    content, error_before = _read_by_all(previous)
    if error_before:
        raise CheckpointError(error_before)
    say(f"{error} Going on from {previous.name}, the checkpoint before it.")
    if rank == 0:
        path.replace(path.with_name("checkpoint_damaged.pth"))
        previous.replace(path)  # --c finds it there, should this run be killed before it saves
    return content


def _read_by_all(path: Path) -> tuple[dict[str, Any], str]:
    """What a checkpoint holds; the first error of any process, empty if all have read it."""
    content: dict[str, Any] = {}
    error = ""
    try:
        content = read_checkpoint(path)
    except CheckpointError as refused:
        error = str(refused)
    return content, next(filter(None, from_all_processes(error)), "")
