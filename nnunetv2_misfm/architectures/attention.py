"""Attention within windows: softmax(query · key / sqrt(d) + bias + mask) · value.

B batches of W windows of N tokens with heads of d channels are (B · W, heads, N, d).

On a GPU this is PyTorch's fused attention. PyTorch has none for training with a learned bias on the CPU, and its
fallback fills memory with several matrices of attention weights per window; there a few windows at a time go through
all steps while their weights are in the processor's cache, and the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_misfm.architectures.dropout import keep_mask
from nnunetv2_misfm.architectures.pieces import ELEMENTS_AT_A_TIME
from nnunetv2_misfm.architectures.precision import is_traced


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of all windows.

    Args:
        query, key, value: (B · W, heads, N, d), the windows of a sample one after the other.
        bias: (heads, N, N), added to the logits of all windows.
        mask: (W, N, N), added to the logits of each window of a sample, or None.
        dropout: probability for attention weights.

    Returns:
        (B · W, heads, N, d)
    """
    # On the meta device too, where memory is estimated: fused kernels keep about as much, PyTorch's fallback far more.
    if (
        query.device.type in ("cpu", "meta")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not is_traced()
    ):
        attended: Tensor = _WindowsInTurn.apply(query, key, value, bias, mask, dropout)
        return attended
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], dropout_p=dropout)
    # One sample at a time: for all at once bias plus mask, as large as attention weights, would be repeated for each.
    windows = mask.shape[0]
    bias = bias + mask[:, None]
    samples = zip(query.split(windows), key.split(windows), value.split(windows), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*qkv, attn_mask=bias, dropout_p=dropout) for qkv in samples])


class _WindowsInTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        keeps: list[Tensor] = []
        ctx.factor = 1.0
        for chunk, masked in _chunks(query, mask):
            weights = _weights(query[chunk], key[chunk], bias, masked)
            if dropout:
                keep, ctx.factor = keep_mask(weights, dropout)
                keeps.append(keep)
                weights.mul_(keep)
            torch.matmul(weights, value[chunk] * ctx.factor, out=output[chunk])
        ctx.save_for_backward(query, key, value, bias, mask, *keeps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, *keeps = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
        grad_bias = torch.zeros_like(bias)
        for index, (chunk, masked) in enumerate(_chunks(query, mask)):
            q, k, g = query[chunk], key[chunk], grad[chunk] * ctx.factor
            weights = _weights(q, k, bias, masked)
            dropped = weights * keeps[index] if keeps else weights
            torch.matmul(dropped.transpose(-2, -1), g, out=grads[2][chunk])
            grad_weights = g @ value[chunk].transpose(-2, -1)
            if keeps:
                grad_weights.mul_(keeps[index])
            grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_bias += grad_logits.sum(0)
            torch.matmul(grad_logits, k * scale, out=grads[0][chunk])
            torch.matmul(grad_logits.transpose(-2, -1), q * scale, out=grads[1][chunk])
        return (*grads, grad_bias, None, None)


def _chunks(query: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of the windows, none across two samples, and their masks."""
    windows, heads, tokens, _ = query.shape
    per_sample = windows if mask is None else mask.shape[0]
    step = max(1, ELEMENTS_AT_A_TIME // (heads * tokens**2))
    for sample in range(0, windows, per_sample):
        for start in range(0, per_sample, step):
            stop = min(start + step, per_sample)
            yield slice(sample + start, sample + stop), None if mask is None else mask[start:stop, None]


def _weights(query: Tensor, key: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    logits = (query @ (key.transpose(-2, -1) * query.shape[-1] ** -0.5)).add_(bias)
    return torch.softmax(logits if mask is None else logits.add_(mask), dim=-1)
