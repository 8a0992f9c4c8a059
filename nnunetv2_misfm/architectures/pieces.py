"""Large tensors, worked through a piece at a time: a piece that several operations share stays in the cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Several tensors of this size, attention weights among them, fit into a processor's cache together.
ELEMENTS_AT_A_TIME = 2**20


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """One-dimensional views of at most `ELEMENTS_AT_A_TIME` elements of tensors of one shape and layout in memory."""
    return zip(*(in_order_of_memory(tensor).split(ELEMENTS_AT_A_TIME) for tensor in tensors), strict=True)


def in_order_of_memory(x: Tensor) -> Tensor:
    """All elements of a contiguous tensor, or of a (B, C, X, Y, Z) one with its channels last in memory, as a view."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 4, 1).view(-1)


def channels_last(x: Tensor) -> bool:
    """Whether a tensor is (B, C, X, Y, Z) and dense with its channels last in memory."""
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
