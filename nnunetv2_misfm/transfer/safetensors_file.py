"""Checkpoints as safetensors: the weights and what they are, without the state of a training run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from nnunetv2_misfm.errors import first_line
from nnunetv2_misfm.files import written_whole
from nnunetv2_misfm.transfer.checkpoint import (
    BLOCK,
    FORMAT_VERSION,
    CheckpointError,
    CheckpointInfo,
    checkpoint_info,
    not_written,
)


def write_safetensors(weights: Mapping[str, Tensor], info: CheckpointInfo, path: str | os.PathLike[str]) -> None:
    """Write weights with their description in the file's metadata.

    Weights that a network lists under several names are written under the first.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[tuple[int, int]] = set()
    kept = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.contiguous()
    metadata = {"format": "pt", BLOCK: json.dumps({"format_version": FORMAT_VERSION, **asdict(info)})}
    try:
        with written_whole(path) as temporary:
            save_file(kept, temporary, metadata)
    except (SafetensorError, OSError) as error:
        raise not_written(path, error) from error


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Weights and description from a file of `write_safetensors`.

    Raises:
        CheckpointError: if the file is missing, damaged, or says nothing about its network.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist or is not a file. Give the path of a checkpoint.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        block = json.loads(metadata[BLOCK]) if BLOCK in metadata else None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({first_line(error)}). Copy or download it again."
        ) from None
    info = checkpoint_info({BLOCK: block}, path)
    if info is None:
        raise CheckpointError(
            f"{path} does not say which network it holds. Write safetensors files with misfm_export_checkpoint."
        )
    return weights, info
