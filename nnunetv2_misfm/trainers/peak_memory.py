"""The most memory that training has used."""

from __future__ import annotations

import importlib
import sys

import torch


def peak_memory_gb(device: torch.device) -> float | None:
    """GB on a GPU since its statistics were reset, of this process otherwise; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    resource = importlib.import_module("resource")  # not there on Windows
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
