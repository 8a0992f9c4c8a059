"""Dropout whose random numbers do not dominate a training step on the CPU.

PyTorch draws one Bernoulli number per element there, which took a quarter of PCT-Net's training step, and keeps the
mask in float32. Here every random 64-bit integer decides eight elements and the mask is boolean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """Which elements a dropout of probability `p` keeps, and the factor that keeps the expectation.

    On the CPU `p` is rounded to a multiple of 1/256; the factor belongs to the rounded value, so the expectation is
    exact.
    """
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= p, 1 / (1 - p)
    count = shape.numel()
    dropped = min(255, round(256 * p))
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 7) // 8,))
    keep = words.view(torch.uint8)[:count].view(shape) >= dropped
    return keep, 256 / (256 - dropped)


class Dropout(nn.Module):
    """`nn.Dropout` with the masks of `keep_mask` on the CPU and PyTorch's own kernel elsewhere."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability must be from 0 up to 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not (self.training and self.p):
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        keep, factor = keep_mask(x.shape, self.p, x.device)
        return torch.where(keep, x * factor, 0.0)

    def extra_repr(self) -> str:
        """For the module's text form."""
        return f"p={self.p}"
