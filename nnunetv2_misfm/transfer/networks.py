"""A network rebuilt from a checkpoint of ours, and published weights written as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from nnunetv2_misfm import architectures
from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.transfer.checkpoint import (
    PUBLISHED_WEIGHTS,
    WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    write_checkpoint,
)
from nnunetv2_misfm.transfer.pretrained import read_source
from nnunetv2_misfm.transfer.published_weights import read_published


def load_network(path: str | os.PathLike[str], deep_supervision: bool = False) -> nn.Module:
    """The network of a checkpoint of ours or of a published file, with its weights, in evaluation mode on the CPU.

    Args:
        path: of the checkpoint.
        deep_supervision: return four outputs, finest first, instead of one.

    Raises:
        CheckpointError: if the file cannot be used, or holds a network that is not of this package.
    """
    source = read_source(path)
    if source.info is None or source.info.network_class_name not in NETWORKS.values():
        held = "no description" if source.info is None else source.info.network_class_name
        raise CheckpointError(
            f"{path} holds {held}, not a network of this package ({', '.join(NETWORKS.values())}). "
            f"Build it with nnU-Net from the plans.json of its results folder."
        )
    # Looked up by name among our own classes only: the name comes from the file.
    network_class = getattr(architectures, source.info.network_class_name.rpartition(".")[2])
    arguments = {**source.info.arch_kwargs, "deep_supervision": deep_supervision}
    try:
        network: nn.Module = network_class(source.info.input_channels, source.info.num_classes, **arguments)
        network.load_state_dict(source.weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The weights in {path} do not fit the network it describes: {error}") from None
    return network.eval()


def import_published(source: Path, target: Path, stems: Sequence[int] = DEGREES_OF_ANISOTROPY) -> CheckpointInfo:
    """Write a published MIS-FM file as a checkpoint of ours.

    Args:
        source: the published file.
        target: the checkpoint to write.
        stems: degrees of anisotropy to keep (`resolution_mode` of the reference); FMUNet has one anyway.

    Returns:
        What the checkpoint says about itself.

    Raises:
        CheckpointError: if `source` is not a published file, or is not readable.
    """
    checkpoint = read_checkpoint(source)
    if PUBLISHED_WEIGHTS not in checkpoint:
        raise CheckpointError(
            f"{source} has no '{PUBLISHED_WEIGHTS}': it is not a published MIS-FM file. "
            f"Checkpoints of this package and of nnU-Net need no import."
        )
    weights, info = read_published(checkpoint[PUBLISHED_WEIGHTS], source, stems)
    write_checkpoint({WEIGHTS: weights}, info, target)
    return info
