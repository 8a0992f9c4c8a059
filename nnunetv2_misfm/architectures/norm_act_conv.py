"""BatchNorm, PReLU and convolution in a row, as one step of training that keeps one feature map instead of three.

Run one after the other, each of the three keeps its input for the backward pass. Only the first of these maps is not
cheap to get back: the other two follow from it by a scale, a shift and a slope. Here the backward pass computes them
again. Parameters stay in the modules, so names in a state dict, conversion to SyncBatchNorm and exports do not change.

Only modules that do what they were built to do are taken together. One that was replaced (a subclass, an adapter), has
a hook or parameters of another kind is called, and so are its neighbours. Tensors are (B, C, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from nnunetv2_misfm.architectures import kernels
from nnunetv2_misfm.architectures.checkpointing import recompute
from nnunetv2_misfm.architectures.dropout import Dropout

Conv = nn.Conv3d | nn.ConvTranspose3d
_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS = (nn.Conv3d, nn.ConvTranspose3d)
_STEPS: tuple[tuple[Any, ...], ...] = ((_NORMS, nn.PReLU, _CONVS), (_NORMS, nn.PReLU, Dropout, _CONVS))


class NormActConvSequential(nn.Sequential):
    """A sequence of modules in which every norm, activation, optional dropout and convolution in a row are one step."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) to the last module's output."""
        return run_in_a_row(list(self), x)


def run_in_a_row(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) to the last module's output; plain modules that make up a step are run as one."""
    start = 0
    while start < len(modules):
        count = _length_of_step(modules[start:])
        if count:
            norm, act, *dropout, conv = modules[start : start + count]
            step = (cast(_BatchNorm, norm), cast(nn.PReLU, act), dropout[0] if dropout else None, cast(Conv, conv))
            x = norm_act_conv(x, *step)
        else:
            x = modules[start](x)
        start += max(count, 1)
    return x


def _length_of_step(modules: Sequence[nn.Module]) -> int:
    """How many of the first modules are a norm, activation, optional dropout and convolution, all plain; 0 if not."""
    for kinds in _STEPS:
        step = modules[: len(kinds)]
        if len(step) == len(kinds) and all(isinstance(m, kind) for m, kind in zip(step, kinds, strict=True)):
            act, conv = cast(nn.PReLU, step[1]), cast(Conv, step[-1])
            usual = act.num_parameters == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
            return len(step) if usual and all(map(is_plain, step)) else 0
    return 0


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs just the `forward` of PyTorch's class, or of ours, on its own parameters.

    Subclasses, parametrizations among them, adapters and hooks, with which weight norm and pruning work, are not plain.
    """
    kinds = (*_NORMS, nn.PReLU, Dropout, *_CONVS, nn.Sequential)
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        type(module) in kinds
        and not any(map(len, hooks))
        and not _has_any_global_hook()
        and "forward" not in vars(module)
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
    )


def norm_act_conv(x: Tensor, norm: _BatchNorm, act: nn.PReLU, dropout: nn.Module | None, conv: Conv) -> Tensor:
    """conv(dropout(act(norm(x)))) of (B, C, X, Y, Z), all of them plain; the PReLU has one slope for all channels."""

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
    if not (torch.is_grad_enabled() and kernels.chosen(kernels.ONE_KEPT_MAP, x)):
        return drop_conv(norm_act(x))
    # PyTorch's modules refuse a single value per channel, which has no variance; its kernels do not.
    with_statistics = norm.track_running_stats and norm.running_mean is not None
    known = isinstance(norm, nn.BatchNorm3d) and with_statistics and x.numel() > x.shape[1]
    if not (known and norm.training and norm.momentum is not None):
        return recompute(lambda x: drop_conv(norm_act(x)), x, norms=norm)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    p = dropout.p if isinstance(dropout, Dropout) and dropout.training else 0.0
    parameters = (norm.weight, norm.bias, act.weight, conv.weight, conv.bias)
    statistics = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
    if kernels.chosen(kernels.ONE_KEPT_MAP_CPU, x):
        keep, factor = kernels.keep_mask(x, p) if p else (None, 1.0)
        step: Tensor = kernels.NormActConvOnCPU.apply(x, *parameters, keep, factor, statistics, _geometry(conv))
    else:
        step = kernels.NormActConv.apply(x, *parameters, p, statistics, _geometry(conv))
    return step


def _geometry(conv: Conv) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups, as ATen's convolution takes them."""
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation))
    return (*sizes, conv.transposed, list(conv.output_padding), conv.groups)
