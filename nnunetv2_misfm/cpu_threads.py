"""Threads of a CPU run that leave the cores to others while they wait."""

from __future__ import annotations

import os


def keep_cores_free() -> None:
    """Let OpenMP threads sleep soon instead of spinning; works only before torch is loaded.

    Spinning threads slow a run on the CPU down tenfold and more as soon as data workers or other processes want the
    same cores. A user's own OpenMP settings are left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
