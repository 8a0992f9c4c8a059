"""Training in several processes: the device of each, the network's wrapper, and decisions all have to share.

nnU-Net's own set-up is for one machine with GPUs: it takes a process' number for its GPU's. Here LOCAL_RANK, which
torchrun sets, picks the GPU, and processes without one use the CPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from nnunetv2_misfm.errors import PlanError


def device_of_process(device: torch.device) -> torch.device:
    """The device that this process trains on, if the job was given `device`."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank())))


def wrap(network: nn.Module, device: torch.device, *, some_unused: bool) -> DDP:
    """The network for synchronised training, with BatchNorm over all processes.

    Args:
        network: on `device`.
        device: of this process.
        some_unused: whether parameters go without a gradient in some iterations, the same ones in all processes.

    Raises:
        PlanError: for BatchNorm on CPUs, which PyTorch cannot synchronise.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return DDP(network, device_ids=[device.index], find_unused_parameters=some_unused)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise PlanError(
            "The network has BatchNorm layers, which several processes can only synchronise on GPUs. Train it in one "
            "process, on GPUs, or pretrain a network with InstanceNorm (-network fmunet)."
        )
    return DDP(network, find_unused_parameters=some_unused)


def check_batch_size(batch_size: int, num_processes: int) -> None:
    """Raise a PlanError unless each process gets as many samples of a batch.

    Gradients are averaged over processes, and nnU-Net's Dice over a batch gathers as many values from each.
    """
    if batch_size % num_processes:
        fitting = num_processes * max(1, round(batch_size / num_processes))
        raise PlanError(
            f"A batch of {batch_size} samples cannot be shared by {num_processes} processes, of which each needs as "
            f"many. Plan with -batch_size {fitting}, or use another number of processes."
        )


def any_process(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in any process; all have to ask at the same time."""
    if not dist.is_initialized():
        return condition
    flag = torch.tensor(int(condition), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def from_all_processes(value: Any) -> list[Any]:
    """The value of every process, in order of their ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
