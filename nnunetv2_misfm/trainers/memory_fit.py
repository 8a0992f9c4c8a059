"""Activation checkpointing for training steps that do not fit into memory without it, an error if not even with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from nnunetv2_misfm.architectures.checkpointing import set_checkpointing
from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.trainers.device_memory import available_memory
from nnunetv2_misfm.trainers.distributed import any_process


def fit_into_memory(
    network: nn.Module,
    build: Callable[[], nn.Module],
    input_shape: Sequence[int],
    device: torch.device,
    remedy: Callable[[float], str],
    say: Callable[[str], None],
) -> None:
    """Switch a network's activation checkpointing on if a training step needs more memory than there is.

    Args:
        network: the one that is trained.
        build: makes another one like it, for the estimate.
        input_shape: (B, C, X, Y, Z) of a batch, in voxels.
        device: where it is trained.
        remedy: what to do when a step does not fit, given the memory there is in GB.
        say: told when checkpointing is switched on.

    Raises:
        PlanError: if a step does not fit even so.
    """
    available = available_memory(device)
    # All processes alike: one that recomputes synchronises its BatchNorms more often, and the others would wait.
    plain = _bytes_of_a_step(build, input_shape, device, checkpointing=False)
    if not any_process(plain > available, device):
        return
    checkpointed = _bytes_of_a_step(build, input_shape, device, checkpointing=True)
    if any_process(checkpointed > available, device):
        raise PlanError(
            f"A training step with patch size {list(input_shape[2:])} and batch size {input_shape[0]} needs about "
            f"{checkpointed / 2**30:.1f} GB even with activation checkpointing; {device} has "
            f"{available / 2**30:.1f} GB. {remedy(available / 2**30)}"
        )
    set_checkpointing(network, True)
    say(
        f"Activation checkpointing is on: a step needs about {plain / 2**30:.1f} GB without it and "
        f"{checkpointed / 2**30:.1f} GB with it; {device} has {available / 2**30:.1f} GB."
    )


def _bytes_of_a_step(
    build: Callable[[], nn.Module], input_shape: Sequence[int], device: torch.device, checkpointing: bool
) -> int:
    autocast = device.type == "cuda"
    return estimate_training_memory(build, input_shape, checkpointing=checkpointing, autocast=autocast).total
