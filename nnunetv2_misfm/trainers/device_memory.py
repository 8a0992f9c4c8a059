"""Memory of the device that trains: what there is, and the most that was used. 1 GB is 2**30 bytes here."""

from __future__ import annotations

import importlib
import os
import sys

import torch


def available_memory(device: torch.device) -> float:
    """Bytes a training step may use: what is free on a GPU, nine tenths of the machine's memory otherwise.

    Infinite where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if not hasattr(os, "sysconf"):
        return float("inf")
    return 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_gb(device: torch.device) -> float | None:
    """GB on a GPU since its statistics were reset, of this process otherwise; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    resource = importlib.import_module("resource")  # not there on Windows
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
