"""Threads of a run on the CPU: how many, and that they leave the cores to others while they wait."""

from __future__ import annotations

import os

from nnunetv2_misfm.environment import processes_on_this_machine


def keep_cores_free() -> None:
    """Let OpenMP threads sleep soon instead of spinning; works only before torch is loaded.

    Spinning threads slow a run on the CPU down tenfold and more as soon as data workers or other processes want the
    same cores. A user's own OpenMP settings are left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def training_threads() -> int:
    """How many threads a process that trains on the CPU should have.

    nnU-Net takes a thread for every core of the machine, whatever the user or a scheduler allows. Two runs side by side
    then slow each other down by far more than half.

    Returns:
        `OMP_NUM_THREADS` if the user set it; otherwise a share of the cores that the process may use. With several
        processes of torchrun on this machine the variable does not count, because torchrun sets it to 1 by itself.
    """
    processes_here = processes_on_this_machine()
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if processes_here == 1 and chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    return max(1, usable_cores() // processes_here)


def usable_cores() -> int:
    """The cores that this process may use, which schedulers and containers make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
