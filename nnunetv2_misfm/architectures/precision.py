"""How a step is run: in which precision under automatic mixed precision (autocast), and whether it is traced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that convolutions on the device of `x` compute in: autocast's where it is on, otherwise that of `x`."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operations inside take tensors as they come. The meta device, where memory is estimated, knows no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def is_traced() -> bool:
    """Whether TorchScript records a network, which can only be saved if it consists of PyTorch's own operations."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return traced
