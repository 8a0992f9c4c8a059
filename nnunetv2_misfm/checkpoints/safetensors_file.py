"""Weights as safetensors: those that are exported, and those of others."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_misfm.checkpoints.checkpoint import (
    CHANNEL_NAMES,
    DESCRIPTION,
    FORMAT_VERSION,
    TRAINED_PARTS,
    WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    not_written,
)
from nnunetv2_misfm.errors import first_line
from nnunetv2_misfm.files import written_whole


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever it is called: with the length of a header in JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(9)
    return start[4:] == bytes(4) + b"{"


def write_safetensors(
    weights: Mapping[str, Tensor],
    info: CheckpointInfo,
    path: str | os.PathLike[str],
    trained_parts: Collection[str],
    channels: Collection[str],
) -> None:
    """Write weights, each parameter once, with their description, and the names of the image channels, in the metadata.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full.
    """
    from safetensors.torch import save

    # The format has no tensors that share memory: each gets its own.
    kept = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    metadata = {"format": "pt", DESCRIPTION: json.dumps({"format_version": FORMAT_VERSION, **asdict(info)})}
    metadata[TRAINED_PARTS] = json.dumps(list(trained_parts))
    metadata[CHANNEL_NAMES] = json.dumps(list(channels))
    try:
        with written_whole(path) as temporary:
            Path(temporary).write_bytes(save(kept, metadata))  # its own writer lets nobody else read the file
    except OSError as error:
        raise not_written(path, error) from error


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a safetensors file, of ours or of others, as `read_checkpoint` gives it.

    Raises:
        CheckpointError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        ours = (DESCRIPTION, TRAINED_PARTS, CHANNEL_NAMES)
        described = {key: json.loads(metadata[key]) for key in ours if key in metadata}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({first_line(error)}). Copy or download it again."
        ) from None
    return {WEIGHTS: weights, **described}
