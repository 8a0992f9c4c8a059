"""What a training step of a network needs in memory, found without running it.

The forward pass is replayed on PyTorch's meta device, which computes shapes only, and every tensor that autograd keeps
for the backward pass is counted once. That follows the network's code instead of a formula beside it, for any network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.checkpointing import set_checkpointing

# Weights, gradients and Adam's two moments, in float32.
_BYTES_PER_PARAMETER = 16
# Under autocast most, not all, kept activations are half as wide: norms and the loss stay in float32.
_AUTOCAST_SHARE = 0.6
# Gradients in flight, convolution workspaces and the allocator's rounding, on top of what autograd keeps.
_OVERHEAD = 1.2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step.

    Attributes:
        parameters: weights, gradients and optimiser states.
        activations: what the backward pass needs at its peak.
    """

    parameters: int
    activations: int

    @property
    def total(self) -> int:
        """Parameters and activations with overhead, in bytes."""
        return self.parameters + int(_OVERHEAD * self.activations)


def estimate_training_memory(
    build: Callable[[], nn.Module], input_shape: Sequence[int], *, checkpointing: bool = False, autocast: bool = False
) -> MemoryEstimate:
    """The memory of a training step.

    Args:
        build: makes the network; called with the meta device as default, so it must not load weights.
        input_shape: (B, C, X, Y, Z).
        checkpointing: with activation checkpointing, for networks that have it.
        autocast: with automatic mixed precision.
    """
    with torch.device("meta"):
        network = build().train()
        x = torch.empty(tuple(input_shape))
    parameters = _BYTES_PER_PARAMETER * sum(p.numel() for p in network.parameters())
    if not checkpointing:
        activations = _kept_bytes(network, x)
    else:
        largest = _largest_segment(network, x)
        set_checkpointing(network, True)
        # One segment at a time is recomputed while the inputs of all of them are kept.
        activations = _kept_bytes(network, x) + largest
    if autocast:
        activations = int(_AUTOCAST_SHARE * activations)
    return MemoryEstimate(parameters, activations)


def _kept_bytes(network: nn.Module, x: Tensor) -> int:
    with _count_kept(network) as kept:
        network(x)
        return sum(kept.values())


def _largest_segment(network: nn.Module, x: Tensor) -> int:
    segments: list[nn.Module] = network.checkpointed_modules()  # type: ignore[operator]
    sizes = [0]
    with _count_kept(network) as kept:
        started: list[int] = []
        hooks = []
        for module in segments:
            hooks.append(module.register_forward_pre_hook(lambda *_: started.append(sum(kept.values()))))
            hooks.append(module.register_forward_hook(lambda *_: sizes.append(sum(kept.values()) - started.pop())))
        network(x)
        for hook in hooks:
            hook.remove()
    return max(sizes)


@contextmanager
def _count_kept(network: nn.Module) -> Iterator[dict[int, int]]:
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is freed and its address counted for another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
