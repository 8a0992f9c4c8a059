"""Memory of the device that trains: what there is, and the most that was used. 1 GB is 2**30 bytes here."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nnunetv2_misfm.environment import processes_on_this_machine

# As a container sees its own limit, in versions 2 and 1.
_CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_memory(device: torch.device) -> float:
    """Bytes a training step may use: what is free on a GPU, otherwise nine tenths of what this process may have.

    Processes that torchrun starts on one machine share its memory.

    Infinite where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return 0.9 * min(_memory_limits(), default=float("inf")) / processes_on_this_machine()


def _memory_limits() -> Iterator[float]:
    """Bytes of the machine, and of the container or job in it: control groups of both versions, SLURM."""
    if hasattr(os, "sysconf"):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CONTROL_GROUPS:
        try:
            limit = path.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if limit.isdecimal():  # version 2 writes `max` for no limit, version 1 a number larger than any memory
            yield float(limit)
    of_node, of_cpu, cpus = (
        os.environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if of_node.isdecimal() and int(of_node):  # 0 asks for all there is
        yield int(of_node) * 2.0**20
    if of_cpu.isdecimal() and cpus.isdecimal():
        yield int(of_cpu) * int(cpus) * 2.0**20


def peak_memory_gb(device: torch.device) -> float | None:
    """GB on a GPU since its statistics were reset, of this process otherwise; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    resource = importlib.import_module("resource")  # not there on Windows
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
