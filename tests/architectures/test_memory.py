"""The estimate of a training step's memory against what a real forward pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.architectures.resolution import strides_of

FEATURES = (8, 16, 32, 64, 128)
NETWORKS = [partial(kind, 1, 3, strides_of(1), FEATURES) for kind in (PCTNet, FMUNet)]
SHAPE = (2, 1, 16, 48, 32)


@pytest.mark.parametrize("build", NETWORKS, ids=["PCT-Net", "FMUNet"])
def test_estimate_is_what_the_forward_pass_keeps(build: Callable[[], nn.Module]) -> None:
    network = build().train()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(SHAPE))
    estimate = estimate_training_memory(build, SHAPE)
    # Masks of dropout are a byte per element on a CPU and on a GPU, but four on the meta device.
    assert estimate.activations == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.1)
    assert estimate.parameters == 16 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("build", NETWORKS, ids=["PCT-Net", "FMUNet"])
def test_checkpointing_and_half_the_width_take_less(build: Callable[[], nn.Module]) -> None:
    plain = estimate_training_memory(build, SHAPE).activations
    assert estimate_training_memory(build, SHAPE, checkpointing=True).activations < 0.7 * plain
    assert estimate_training_memory(build, SHAPE, autocast=True).activations < 0.7 * plain
    assert estimate_training_memory(build, (4, *SHAPE[1:])).activations == pytest.approx(2 * plain, rel=0.05)
