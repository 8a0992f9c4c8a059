"""How fast an epoch of pretraining is, and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch

from nnunetv2_misfm.trainers.device_memory import peak_memory_gb
from nnunetv2_misfm.units import format_duration


@dataclass(frozen=True)
class Speed:
    """Of one epoch; columns of metrics.csv."""

    iterations_per_s: float | None
    """None where all were done before the run was interrupted."""
    data_wait_share: float
    peak_memory_gb: float | None

    def text(self, iterations_left: int) -> str:
        """A sentence for the log."""
        memory = f"peak memory {self.peak_memory_gb or 0:.1f} GB"
        if self.iterations_per_s is None:
            return memory
        time_left = format_duration(iterations_left / self.iterations_per_s / 3600)
        return (
            f"{self.iterations_per_s:.2f} iterations/s, {100 * self.data_wait_share:.0f} % of the time waiting for "
            f"data, {memory}, about {time_left} left"
        )


class EpochClock:
    """Starts with an epoch.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.started = perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def speed(self, iterations: int, waited: float) -> Speed:
        """The speed of so many iterations since the start, of which so many seconds were spent waiting for data."""
        seconds = perf_counter() - self.started
        return Speed(iterations / seconds or None, min(1.0, waited / seconds), peak_memory_gb(self.device))
