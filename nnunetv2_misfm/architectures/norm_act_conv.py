"""BatchNorm, PReLU and convolution in a row, as one step of training that keeps one feature map instead of three.

Run one after the other, each of the three keeps its input for the backward pass. Only the first of these maps is not
cheap to get back: the other two follow from it by a scale, a shift and a slope. Here the backward pass computes them
again. Parameters stay in the modules, so names in a state dict, conversion to SyncBatchNorm and exports do not change.

Tensors are (B, C, X, Y, Z).
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from nnunetv2_misfm.architectures.checkpointing import recompute
from nnunetv2_misfm.architectures.dropout import Dropout, drop_, keep_mask
from nnunetv2_misfm.architectures.pieces import channels_last, pieces
from nnunetv2_misfm.architectures.precision import autocast_dtype, is_traced, without_autocast

Conv = nn.Conv3d | nn.ConvTranspose3d

# Dividing by a slope below this would lose too many digits.
_SMALLEST_INVERTIBLE_SLOPE = 1e-3
_buffers = threading.local()


class NormActConvSequential(nn.Sequential):
    """A sequence of modules in which every norm, activation, optional dropout and convolution in a row are one step.

    Once one of them has a hook, which the step would not call, they run one after the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) to the last module's output."""
        given, modules = x, list(self)
        if any(map(_has_hooks, modules)):
            output: Tensor = super().forward(x)
            return output
        while modules:
            module = modules.pop(0)
            if isinstance(module, _BatchNorm):
                act = cast(nn.PReLU, modules.pop(0))
                dropout = modules.pop(0) if isinstance(modules[0], Dropout) else None
                x = norm_act_conv(x, module, act, dropout, cast(Conv, modules.pop(0)), overwrite=x is not given)
            else:
                x = module(x)
        return x


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(map(len, hooks))


def norm_act_conv(
    x: Tensor, norm: _BatchNorm, act: nn.PReLU, dropout: nn.Module | None, conv: Conv, overwrite: bool = False
) -> Tensor:
    """conv(dropout(act(norm(x)))) of (B, C, X, Y, Z); the PReLU has one slope for all channels.

    Args:
        overwrite: whether `x` is not needed any more; prediction on a CPU then works in its memory.
    """

    def norm_act(x: Tensor) -> Tensor:
        # As a slope for each channel, its gradient sums over the axes of the norm's: compiled, one pass for all three.
        return F.prelu(norm(x), act.weight.expand(x.shape[1]))

    def drop_conv(y: Tensor) -> Tensor:
        output: Tensor = conv(y if dropout is None else dropout(y))
        return output

    if torch.compiler.is_compiling():
        # Left to itself, the compiler would keep the convolution's input besides the norm's. The norm may be frozen.
        training = conv.training and torch.is_grad_enabled()
        return drop_conv(recompute(norm_act, x, norms=norm) if training else norm_act(x))
    # PyTorch's modules refuse a single value per channel, which has no variance; its kernels do not.
    with_statistics = norm.track_running_stats and norm.running_mean is not None
    known = isinstance(norm, nn.BatchNorm3d) and with_statistics and x.numel() > x.shape[1]
    on_cpu = known and _suits_cpu_kernels(x)
    if is_traced() or not torch.is_grad_enabled():
        return _predict(x, norm, act, conv, overwrite) if on_cpu and not norm.training else drop_conv(norm_act(x))
    if not (known and norm.training and norm.momentum is not None):
        return recompute(lambda x: drop_conv(norm_act(x)), x, norms=norm)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    p = dropout.p if isinstance(dropout, Dropout) and dropout.training else 0.0
    parameters = (norm.weight, norm.bias, act.weight, conv.weight, conv.bias)
    statistics = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
    if on_cpu:
        keep, factor = keep_mask(x, p) if p else (None, 1.0)
        step: Tensor = _NormActConvOnCPU.apply(x, *parameters, keep, factor, statistics, _geometry(conv))
    else:
        step = _NormActConv.apply(x, *parameters, p, statistics, _geometry(conv))
    return step


def _suits_cpu_kernels(x: Tensor) -> bool:
    """Whether a tensor is on the CPU, dense, as the kernels there trust it to be, and neither cast nor traced."""
    dense = x.is_contiguous() or channels_last(x)
    plain = not (torch.is_autocast_enabled("cpu") or is_traced())
    return dense and x.device.type == "cpu" and plain


def _predict(x: Tensor, norm: _BatchNorm, act: nn.PReLU, conv: Conv, overwrite: bool) -> Tensor:
    y = x if overwrite else _scratch(x)
    unused = x.new_empty(0), x.new_empty(0)
    fixed = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    torch.native_batch_norm(x, *fixed, False, 0.0, norm.eps, out=(y, *unused))
    output: Tensor = conv(F.leaky_relu_(y, float(act.weight)))
    return output


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


def _geometry(conv: Conv) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups, as ATen's convolution takes them."""
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation))
    return (*sizes, conv.transposed, list(conv.output_padding), conv.groups)


class _NormActConv(torch.autograd.Function):
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


class _NormActConvOnCPU(torch.autograd.Function):
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
    if transposed or not (channels_last(grad) and channels_last(z)):
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
