"""A latest checkpoint that was damaged: all processes of a training go on from the same one before it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from typing import Any

import pytest
import torch

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError
from nnunetv2_misfm.trainers import checkpoint_files
from nnunetv2_misfm.trainers.checkpoint_files import LATEST, PREVIOUS, read_latest_or_previous

PROCESSES = 3


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a function in several threads that exchange values as the processes of a training do."""
    barrier, values, rank = Barrier(PROCESSES, timeout=10), [None] * PROCESSES, local()

    def from_all_processes(value: Any) -> list[Any]:
        values[rank.number] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def run(function: Any) -> list[Any]:
        def in_thread(number: int) -> Any:
            rank.number = number
            return function(number)

        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(in_thread, range(PROCESSES)))

    monkeypatch.setattr(checkpoint_files, "from_all_processes", from_all_processes)
    return run


def say_nothing(_: str) -> None:
    pass


def test_all_processes_go_on_from_the_one_before_and_one_renames(tmp_path: Path, processes: Any) -> None:
    (tmp_path / LATEST).write_bytes(b"PK damaged")
    torch.save({"epoch": 4}, tmp_path / PREVIOUS)
    read = processes(lambda rank: read_latest_or_previous(tmp_path / LATEST, say_nothing, rank=rank))
    assert read == [{"epoch": 4}] * PROCESSES
    assert (tmp_path / "checkpoint_damaged.pth").read_bytes() == b"PK damaged"
    assert torch.load(tmp_path / LATEST, weights_only=True) == {"epoch": 4} and not (tmp_path / PREVIOUS).exists()


def test_what_one_process_cannot_read_none_goes_on_from(
    tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"epoch": 5}, tmp_path / LATEST)
    torch.save({"epoch": 4}, tmp_path / PREVIOUS)
    whole, seen = checkpoint_files.read_checkpoint, iter(range(PROCESSES))

    def once_unreadable(path: Path) -> dict[str, Any]:
        if path.name == LATEST and next(seen) == 1:
            raise CheckpointError("not readable on this machine")
        return whole(path)

    monkeypatch.setattr(checkpoint_files, "read_checkpoint", once_unreadable)
    read = processes(lambda rank: read_latest_or_previous(tmp_path / LATEST, say_nothing, rank=rank))
    assert read == [{"epoch": 4}] * PROCESSES


def test_without_one_before_all_processes_end(tmp_path: Path, processes: Any) -> None:
    (tmp_path / LATEST).write_bytes(b"PK damaged")

    def refused(rank: int) -> str:
        with pytest.raises(CheckpointError) as error:
            read_latest_or_previous(tmp_path / LATEST, say_nothing, rank=rank)
        return str(error.value)

    assert len(set(processes(refused))) == 1
