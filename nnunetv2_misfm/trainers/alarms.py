"""What can be wrong with any pretraining run, and what to try; each task has alarms of its own besides."""

from __future__ import annotations

from torch import nn

from nnunetv2_misfm.transfer.shrunk_weights import shrunk_weights


def shrunk_alarm(network: nn.Module) -> list[str]:
    """A sentence for the log if weight decay has shrunk weights to nothing."""
    shrunk = shrunk_weights(dict(network.named_parameters()))
    if shrunk is None:
        return []
    return [
        f"weight decay has shrunk weights to nothing in {shrunk}; fine-tuning would start from zero there. Start anew "
        f"with -optimizer adamw."
    ]
