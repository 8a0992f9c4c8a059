"""What is not a finite number in a run: such steps are skipped and counted, and end it if they go on.

A score that is none would make the mean of all later epochs none, by which the best checkpoint is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunetv2_misfm.errors import UserError

MOST_IN_A_ROW = 20  # mixed precision skips a few steps at the start, while it looks for its loss scale


class TrainingDivergedError(UserError, RuntimeError):
    """Loss or gradients stay non-finite; the message says where to go back to and what to change."""


def finite_score(score: float, earlier: Sequence[float]) -> float:
    """The score of an epoch; if it is no finite number, the last of the `earlier` means, or 0."""
    return score if math.isfinite(score) else next(iter(earlier[-1:]), 0.0)


class StepGuard:
    """Keeps a network whole through steps that must not count.

    Args:
        network: that is trained.
        advice: what to do when all steps are like that.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, network: nn.Module, advice: Callable[[], str]):
        self._advice = advice
        # BatchNorm takes its statistics from each forward pass, also from one that overflowed.
        self._statistics = [b for b in network.buffers() if b.is_floating_point()]
        self._kept: list[Tensor] = []
        self.skipped = 0
        self._in_a_row = 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep what a forward pass changes."""
        self._kept = [buffer.clone() for buffer in self._statistics]

    @torch.no_grad()
    def accept(self, norm: Tensor) -> bool:
        """Whether the step counts, by the norm of all gradients or the loss; if not, the statistics are put back.

        Raises:
            TrainingDivergedError: if too many steps in a row do not count.
        """
        if torch.isfinite(norm):
            self._in_a_row = 0
            return True
        for buffer, kept in zip(self._statistics, self._kept, strict=True):
            buffer.copy_(kept)
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > MOST_IN_A_ROW:
            raise TrainingDivergedError(
                f"Loss or gradients were not finite in {self._in_a_row} steps in a row. {self._advice()}"
            )
        return False
