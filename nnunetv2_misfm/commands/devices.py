"""The devices that commands can train on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from nnunetv2_misfm.errors import PlanError


def usable_gpus() -> int:
    """How many GPUs PyTorch can train on; devices that are listed but cannot be started do not count."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def best_device() -> str:
    """The device that misfm_demo and misfm_compare take where none is named."""
    return "cuda" if usable_gpus() else "cpu"


def check_device(device: str, num_gpus: int) -> None:
    """Raise a PlanError if the device is not there; better now than after hours of preparation."""
    import torch

    if device == "cuda" and (there := usable_gpus()) < num_gpus:
        asked = f" with -num_gpus {num_gpus}" if num_gpus > 1 else ""
        remedy = f"Give -num_gpus {there}." if there else "Use -device cpu."
        raise PlanError(f"-device cuda{asked}: there are {there} usable GPUs. {remedy}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise PlanError("-device mps: PyTorch has no MPS device here. Use -device cpu.")


def check_gpus(numbers: Sequence[str]) -> None:
    """Raise a PlanError unless all are numbers of usable GPUs, counted from 0."""
    there = usable_gpus() if numbers else 0
    wrong = [number for number in numbers if not number.isdecimal() or int(number) >= there]
    if wrong:
        raise PlanError(f"-gpus {' '.join(wrong)}: there are {there} usable GPUs here, which are counted from 0.")


def name_of_gpu(number: str) -> str:
    """How CUDA_VISIBLE_DEVICES names a GPU of these numbers: a cluster may let this process see some of them only."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return seen[int(number)] if seen else number
