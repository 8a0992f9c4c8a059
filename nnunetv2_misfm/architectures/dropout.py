"""Dropout whose random numbers do not dominate a training step on the CPU.

PyTorch draws one Bernoulli number per element there, which took a quarter of PCT-Net's training step, and keeps the
mask in float32. Here every random 64-bit integer decides eight elements, and a mask of bytes is all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunetv2_misfm.architectures.pieces import channels_last, pieces


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of `x` a dropout of probability `p` keeps, and the factor that keeps the expectation.

    `p` is rounded to a multiple of 1/256; the factor belongs to the rounded value, so the expectation is exact.

    Returns:
        uint8 of the shape and layout of `x`, 1 where an element is kept and 0 where not; and the factor for the rest.
    """
    count = x.numel()
    dropped = min(255, round(256 * p))
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 7) // 8,), device=x.device)
    # Written over the random bytes: PyTorch has vector instructions for that, but not for comparing bytes to booleans.
    keep = words.view(torch.uint8)[:count].ge_(dropped)
    if not x.is_contiguous() and channels_last(x):
        keep = keep.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 4, 1, 2, 3)
    return keep.view(x.shape), 256 / (256 - dropped)


def drop_(x: Tensor, keep: Tensor | None, factor: float = 1.0) -> Tensor:
    """Overwrite `x` with `x * keep * factor`; without a mask nothing happens.

    Multiplying by bytes takes a seventh of the time of `masked_fill_`, as long as their conversion fits into the cache.
    """
    if keep is None:
        return x
    if x.stride() == keep.stride() and (x.is_contiguous() or channels_last(x)):
        for values, kept in pieces(x, keep):
            values.mul_(kept).mul_(factor)
        return x
    return x.mul_(keep).mul_(factor)


class Dropout(nn.Module):
    """`nn.Dropout` with the masks of `keep_mask` on the CPU and PyTorch's own kernel elsewhere.

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
        return _Dropped.apply(x, *keep_mask(x, self.p), self.inplace)

    def extra_repr(self) -> str:
        """For the module's text form."""
        return f"p={self.p}"


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, factor: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.factor = factor
        if inplace:
            ctx.mark_dirty(x)
        return drop_(x if inplace else x.clone(), keep, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (keep,) = ctx.saved_tensors
        return drop_(grad.clone(), keep, ctx.factor), None, None, None
