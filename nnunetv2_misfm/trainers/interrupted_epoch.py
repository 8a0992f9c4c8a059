"""An epoch that was interrupted, so that it goes on where it was instead of starting again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nnunetv2_misfm.trainers.distributed import from_all_processes


@dataclass
class InterruptedEpoch:
    """Plain data for a checkpoint.

    Attributes:
        losses: of the iterations that are done, each the mean over the processes.
        random_states: PyTorch's on the CPU and on the training device, of each process.
    """

    losses: list[float]
    random_states: list[list[torch.Tensor]]

    @classmethod
    def now(cls, losses: list[float], device: torch.device) -> InterruptedEpoch:
        """The state after the last iteration; all processes have to call this at the same time."""
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        means = np.mean(from_all_processes(list(losses)), axis=0)
        return cls([float(loss) for loss in means], from_all_processes(states))

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> InterruptedEpoch:
        """From the dict that a checkpoint holds."""
        return cls(list(content["losses"]), [list(states) for states in content["random_states"]])

    def restore_random_state(self, device: torch.device) -> None:
        """Go on drawing where this process stopped; another number of processes draws from the epoch's own stream."""
        processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if len(self.random_states) != processes:
            return
        states = self.random_states[rank]
        torch.set_rng_state(states[0])
        if device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
