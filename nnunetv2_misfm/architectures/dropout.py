"""Dropout, with random numbers that do not dominate a training step on the CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_misfm.architectures import kernels


class Dropout(nn.Module):
    """`nn.Dropout`, which on the CPU draws one Bernoulli number per element: a quarter of PCT-Net's training step.

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
        if not kernels.chosen(kernels.BYTE_MASKS, x):
            return F.dropout(x, self.p)
        dropped: Tensor = kernels.Dropped.apply(x, *kernels.keep_mask(x, self.p), self.inplace)
        return dropped

    def extra_repr(self) -> str:
        """For the module's text form."""
        return f"p={self.p}"
