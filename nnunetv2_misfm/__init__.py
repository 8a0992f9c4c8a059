"""MIS-FM for nnU-Net v2: Volume Fusion pretraining, PCT-Net and weight transfer (arXiv 2306.16925)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load_network(path: str | os.PathLike[str], deep_supervision: bool = False) -> nn.Module:
    """The network of a checkpoint, see `nnunetv2_misfm.checkpoints.source.load_network`."""
    # Imported here, because importing the package must not take the seconds that torch takes.
    from nnunetv2_misfm.checkpoints.source import load_network as load

    return load(path, deep_supervision)
