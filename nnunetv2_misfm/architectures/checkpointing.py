"""Activation checkpointing of a module, with BatchNorm statistics that count each batch once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_module(module: nn.Module, *inputs: Tensor, checkpointed: bool) -> Tensor:
    """`module(*inputs)`; if `checkpointed`, its activations are recomputed in the backward pass instead of kept."""
    return recompute(module, *inputs, norms=module) if checkpointed and torch.is_grad_enabled() else module(*inputs)


def recompute(function: Callable[..., Tensor], *inputs: Tensor, norms: nn.Module) -> Tensor:
    """`function(*inputs)`, run again in the backward pass, as far as that needs it, instead of keeping activations.

    Args:
        norms: the module whose BatchNorms `function` uses.
    """
    if torch.compiler.is_compiling():
        # Compiled code writes the statistics once, whatever it recomputes, and takes no other kind of context.
        return checkpoint(function, *inputs, use_reentrant=False)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=partial(_contexts, norms))


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Switch activation checkpointing of a network that offers it."""
    network.checkpointing = on  # type: ignore[assignment] # torch types every attribute of a module as a tensor or module


def _contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _frozen_running_statistics(module)


@contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    # The recomputation sees the same batch a second time; it must not enter the running statistics again.
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    statistics = [b for m in norms for b in (m.running_mean, m.running_var, m.num_batches_tracked) if b is not None]
    before = [b.clone() for b in statistics]
    try:
        yield
    finally:
        for b, value in zip(statistics, before, strict=True):
            b.copy_(value)
