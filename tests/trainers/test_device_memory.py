"""How much memory a training step may take: that of the machine, or of the container or job in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunetv2_misfm.trainers import device_memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device_memory, "_CONTROL_GROUPS", (tmp_path / "memory.max",))
    return tmp_path


def test_without_limits_it_is_the_machine() -> None:
    assert 2**30 < device_memory.available_memory(CPU) < float("inf")


@pytest.mark.parametrize(
    ("written", "limit"), [("1073741824\n", 2**30), ("max\n", None), ("9223372036854771712\n", None)]
)
def test_the_limit_of_a_container_counts(no_limits: Path, written: str, limit: int | None) -> None:
    of_machine = device_memory.available_memory(CPU)
    (no_limits / "memory.max").write_text(written, encoding="utf-8")
    assert device_memory.available_memory(CPU) == (of_machine if limit is None else 0.9 * limit)


@pytest.mark.parametrize(
    ("variables", "limit"),
    [
        ({"SLURM_MEM_PER_NODE": "512"}, 512 * 2**20),
        ({"SLURM_MEM_PER_CPU": "256", "SLURM_CPUS_ON_NODE": "3"}, 768 * 2**20),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
    ],
)
def test_the_limit_of_a_slurm_job_counts(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], limit: int | None
) -> None:
    of_machine = device_memory.available_memory(CPU)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device_memory.available_memory(CPU) == (of_machine if limit is None else 0.9 * limit)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine = device_memory.available_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as torchrun sets it
    assert device_memory.available_memory(CPU) == of_machine / 4
