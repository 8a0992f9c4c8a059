"""The kernels written by hand, and the one place where each is chosen.

Each does what the plain modules do, which the tests compare it with, in less time or memory; each stays only as long
as `benchmarks/network_speed.py --ablation` shows that a training step or a prediction is at least a tenth better for
it on a device it is for (`benchmarks/results/network_ablation_cpu.md`).
Everywhere else (other devices, traced networks) PyTorch's own operations run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BYTE_MASKS = "dropout masks of bytes"
WINDOWS_IN_TURN = "attention, a few windows at a time"
ONE_KEPT_MAP = "norm, activation and convolution, keeping one map"
ONE_KEPT_MAP_CPU = "norm, activation and convolution in reused memory"
WEIGHT_GRADIENTS = "gradients of flat weights in 2D"
KERNELS = (BYTE_MASKS, WINDOWS_IN_TURN, ONE_KEPT_MAP, ONE_KEPT_MAP_CPU, WEIGHT_GRADIENTS)
switched_off: set[str] = set()  # for the ablation and for tests


def chosen(kernel: str, x: Tensor) -> bool:
    """Whether a kernel runs on `x`; if not, PyTorch's own operations do."""
    if kernel in switched_off or is_traced():
        return False
    if torch.compiler.is_compiling():
        return False
    if kernel == ONE_KEPT_MAP:
        return True
    if kernel == BYTE_MASKS:
        return x.device.type == "cpu"
    if torch.is_autocast_enabled("cpu"):
        return False
    if kernel == WINDOWS_IN_TURN:
        # On the meta device too, where memory is estimated: fused attention keeps as much, PyTorch's fallback far more.
        return x.device.type in ("cpu", "meta")
    return x.device.type == "cpu" and is_dense(x)


def is_traced() -> bool:
    """Whether TorchScript records a network, which can only be saved if it consists of PyTorch's own operations."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return traced


def is_dense(x: Tensor) -> bool:
    """Whether the elements of a tensor lie in memory without gaps, its channels last or in the default order."""
    return x.is_contiguous() or channels_last(x)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that convolutions on the device of `x` compute in: autocast's where it is on, otherwise that of `x`."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operations inside take tensors as they come. The meta device, where memory is estimated, knows no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


# Several tensors of this size, attention weights among them, fit into a processor's cache together.
ELEMENTS_AT_A_TIME = 2**20
# Dividing by a slope below this would lose too many digits.
_SMALLEST_INVERTIBLE_SLOPE = 1e-3
_buffers = threading.local()


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """One-dimensional views of at most `ELEMENTS_AT_A_TIME` elements of tensors of one shape and layout in memory."""
    return zip(*(in_order_of_memory(tensor).split(ELEMENTS_AT_A_TIME) for tensor in tensors), strict=True)


def in_order_of_memory(x: Tensor) -> Tensor:
    """All elements of a contiguous tensor, or of a (B, C, X, Y, Z) one with its channels last in memory, as a view."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 4, 1).view(-1)


def channels_last(x: Tensor) -> bool:
    """Whether a tensor is (B, C, X, Y, Z) and dense with its channels last in memory."""
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


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


class Dropped(torch.autograd.Function):
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


class WindowsInTurn(torch.autograd.Function):
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


class NormActConv(torch.autograd.Function):
    """The step in training, also under autocast. Activation checkpointing would do, but costs more than the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, slope: Tensor, *rest: Any) -> Tensor:
        weight, bias, p, (running_mean, running_var, momentum, eps), geometry = rest
        dtype = autocast_dtype(x)
        with without_autocast(x):
            # The fourth output is what cuDNN's backward pass reserves, as large as a map; PyTorch's does not need it.
            y, mean, inverse_std, _, _ = torch.ops.aten._batch_norm_impl_index(
                x, gamma, beta, running_mean, running_var, True, momentum, eps, torch.backends.cudnn.enabled
            )
            z, keep = F.prelu(y, slope.to(y.dtype)), None
            if p:
                z, keep = torch.ops.aten.native_dropout(z, p, True)
            weight = weight.to(dtype)
            bias_there = None if bias is None else bias.to(dtype)
            output: Tensor = torch.ops.aten.convolution(z.to(dtype), weight, bias_there, *geometry)
        ctx.save_for_backward(x, gamma, beta, slope, weight, mean, inverse_std, keep)
        ctx.factor, ctx.eps, ctx.geometry = 1 / (1 - p), eps, geometry
        ctx.bias_size = None if bias is None else list(bias.shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, slope, weight, mean, inverse_std, keep = ctx.saved_tensors
        with without_autocast(x):
            variance = inverse_std.pow(-2) - ctx.eps
            y = F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, ctx.eps)
            slope_there = slope.to(y.dtype)
            z = _drop(F.prelu(y, slope_there), keep, ctx.factor)
            mask = (True, True, ctx.bias_size is not None)
            grad_z, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, z.to(weight.dtype), weight, ctx.bias_size, *ctx.geometry, mask
            )
            del z
            grad_z = _drop(grad_z.to(y.dtype), keep, ctx.factor)
            grad_y, grad_slope = torch.ops.aten._prelu_kernel_backward(grad_z, y, slope_there.view(1, 1, 1, 1, 1))
            del grad_z, y
            grad_x, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
                grad_y, x, gamma, None, None, mean, inverse_std, True, ctx.eps, (True, True, True)
            )
        grad_slope = grad_slope.sum(dtype=slope.dtype).view_as(slope)
        return grad_x, grad_gamma, grad_beta, grad_slope, grad_weight, grad_bias, None, None, None


def _drop(x: Tensor, keep: Tensor | None, factor: float) -> Tensor:
    dropped: Tensor = x if keep is None else torch.ops.aten.native_dropout_backward(x, keep, factor)
    return dropped


class NormActConvOnCPU(torch.autograd.Function):
    """The step on a CPU in training, where a kernel per elementwise operation costs as much as the memory it fills."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, slope: Tensor, *rest: Any) -> Tensor:
        weight, bias, keep, factor, (running_mean, running_var, momentum, eps), geometry = rest
        y, mean, inverse_std = _scratch(x), gamma.new_empty(0), gamma.new_empty(0)
        torch.native_batch_norm(
            x, gamma, beta, running_mean, running_var, True, momentum, eps, out=(y, mean, inverse_std)
        )
        z = drop_(F.leaky_relu_(y, float(slope)), keep, factor)
        ctx.save_for_backward(x, gamma, beta, slope, weight, mean, inverse_std, keep)
        ctx.factor, ctx.eps, ctx.geometry = factor, eps, geometry
        ctx.has_bias = bias is not None
        output: Tensor = torch.ops.aten.convolution(z, weight, bias, *geometry)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, slope, weight, mean, inverse_std, keep = ctx.saved_tensors
        variance = inverse_std.pow(-2) - ctx.eps
        y, unused = _scratch(x), (gamma.new_empty(0), gamma.new_empty(0))
        torch.native_batch_norm(x, gamma, beta, mean, variance, False, 0.0, ctx.eps, out=(y, *unused))
        # What is not needed any more is overwritten. A positive slope keeps signs:
        # then the activation's own output tells where its input was negative, and by how much.
        in_place = keep is None and float(slope) > _SMALLEST_INVERTIBLE_SLOPE
        z = drop_((F.leaky_relu_ if in_place else F.leaky_relu)(y, float(slope)), keep, ctx.factor)
        grad_z, grad_weight, grad_bias = _conv_backward(grad, z, weight, ctx.has_bias, ctx.geometry)
        del z
        grad_z = drop_(grad_z, keep, ctx.factor)
        grad_y, grad_slope = _activation_backward_(grad_z, y, float(slope), in_place)
        del grad_z, y
        grad_x, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, gamma, None, None, mean, inverse_std, True, ctx.eps, (True, True, True)
        )
        return grad_x, grad_gamma, grad_beta, grad_slope.view_as(slope), grad_weight, grad_bias, None, None, None, None


def _activation_backward_(grad: Tensor, y: Tensor, slope: float, y_is_output: bool) -> tuple[Tensor, Tensor]:
    """The gradients of a PReLU's input, written over `grad`, and of its slope.

    Args:
        grad: of the output.
        y: the input, or the output if `y_is_output`; it has to be dense in memory.
    """
    if grad.stride() != y.stride():
        grad = torch.empty_like(y).copy_(grad)
    grad_slope = grad.new_zeros(())
    for grad_piece, y_piece in pieces(grad, y):
        grad_slope += torch.dot(grad_piece, y_piece.clamp(max=0))
        torch.ops.aten.leaky_relu_backward.grad_input(grad_piece, y_piece, slope, y_is_output, grad_input=grad_piece)
    return grad, grad_slope / slope if y_is_output else grad_slope


def _conv_backward(
    grad: Tensor, z: Tensor, weight: Tensor, has_bias: bool, geometry: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a convolution's input, weight and bias.

    Two detours save a quarter of oneDNN's time for weights where channels lie last in memory: kernels of one voxel
    along the first axis get the gradient of a 2D convolution, and the bias gets its own sum.
    """
    stride, padding, dilation, transposed, output_padding, groups = geometry
    if transposed or not (channels_last(grad) and channels_last(z) and chosen(WEIGHT_GRADIENTS, z)):
        bias_size = [grad.shape[1]] if has_bias else None
        mask = (True, True, has_bias)
        return torch.ops.aten.convolution_backward(grad, z, weight, bias_size, *geometry, mask)
    grad_z = torch.ops.aten.convolution_backward(grad, z, weight, None, *geometry, (True, False, False))[0]
    only_weight = (False, True, False)
    if weight.shape[2] == 1 and padding[0] == 0 and stride[0] == 1:
        in_plane = (stride[1:], padding[1:], dilation[1:], False, output_padding[1:], groups)
        planes = (_planes(grad), _planes(z), weight[:, :, 0])
        grad_weight = torch.ops.aten.convolution_backward(*planes, None, *in_plane, only_weight)[1][:, :, None]
    else:
        grad_weight = torch.ops.aten.convolution_backward(grad, z, weight, None, *geometry, only_weight)[1]
    return grad_z, grad_weight, grad.sum((0, 2, 3, 4)) if has_bias else None


def _planes(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) with channels last in memory, as a (B · X, C, Y, Z) view of the same layout."""
    return x.transpose(1, 2).flatten(0, 1)


def _scratch(x: Tensor) -> Tensor:
    """A tensor with the size and layout of `x`, whose content lasts until this is called again.

    Memory that is returned to the system and asked for again has to be mapped and zeroed; for these maps that takes ten
    times as long as the arithmetic. One buffer, as large as the largest map so far, serves all steps of a thread.
    """
    size = x.numel() * x.element_size()
    buffer: Tensor | None = getattr(_buffers, "bytes", None)
    if buffer is None or buffer.numel() < size:
        buffer = _buffers.bytes = torch.empty(size, dtype=torch.uint8)
    like = torch.empty_like(x, device="meta")
    return buffer[:size].view(x.dtype).as_strided(like.shape, like.stride())
