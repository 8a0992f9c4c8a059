"""Dropout whose random numbers do not dominate a training step on the CPU.

PyTorch draws one Bernoulli number per element there, which took a quarter of PCT-Net's training step, and keeps the
mask in float32. Here every random 64-bit integer decides eight elements, and a boolean mask is all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def drop_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of `x` a dropout of probability `p` drops, and the factor for the rest that keeps the expectation.

    On the CPU `p` is rounded to a multiple of 1/256; the factor belongs to the rounded value, so the expectation is
    exact. The mask lies in memory as `x` does.
    """
    if x.device.type != "cpu":
        return torch.rand_like(x, dtype=torch.float32) < p, 1 / (1 - p)
    count = x.numel()
    dropped = min(255, round(256 * p))
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 7) // 8,))
    drop = words.view(torch.uint8)[:count] < dropped
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        drop = drop.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 4, 1, 2, 3)
    return drop.view(x.shape), 256 / (256 - dropped)


class Dropout(nn.Module):
    """`nn.Dropout` with the masks of `drop_mask` on the CPU and PyTorch's own kernel elsewhere.

    Args:
        p: probability of dropping an element.
        inplace: write over the input, where that saves time: on the CPU in training.
    """

    def __init__(self, p: float, inplace: bool = False):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability must be from 0 up to 1, not {p}")
        self.p = p
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not (self.training and self.p):
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        return _Dropped.apply(x, *drop_mask(x, self.p), self.inplace)

    def extra_repr(self) -> str:
        """For the module's text form."""
        return f"p={self.p}"


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Tensor, factor: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(drop)
        ctx.factor = factor
        if inplace:
            ctx.mark_dirty(x)
        return (x.mul_(factor) if inplace else x * factor).masked_fill_(drop, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (drop,) = ctx.saved_tensors
        return (grad * ctx.factor).masked_fill_(drop, 0), None, None, None
