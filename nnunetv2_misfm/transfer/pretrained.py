"""Pretrained weights as a plan names them: where the file is, what is in it, in which network's parameter names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunetv2_misfm.transfer.checkpoint import (
    PUBLISHED_WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    checkpoint_info,
    network_weights,
    read_checkpoint,
)
from nnunetv2_misfm.transfer.published_weights import read_published

PRETRAIN_INFO = "pretrain_info"


@dataclass(frozen=True)
class Source:
    """A pretrained checkpoint, read.

    Attributes:
        path: of the file.
        kind: "nnunetv2_misfm", "nnunetv2" or "published".
        weights: state dict under the parameter names of our networks.
        info: what the file says about itself; None for nnU-Net's own checkpoints.
        sha256: of the file.
    """

    path: Path
    kind: str
    weights: dict[str, Tensor]
    info: CheckpointInfo | None
    sha256: str


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a checkpoint of ours, of nnU-Net, or a published MIS-FM file.

    Raises:
        CheckpointError: if the file cannot be used; the message says why and what to do.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    digest = file_sha256(path)
    if PUBLISHED_WEIGHTS in checkpoint:
        weights, info = read_published(checkpoint[PUBLISHED_WEIGHTS], path)
        return Source(path, "published", weights, info, digest)
    block = checkpoint_info(checkpoint, path)
    kind = "nnunetv2" if block is None else "nnunetv2_misfm"
    return Source(path, kind, network_weights(checkpoint, path), block, digest)


def load_source(info: Mapping[str, Any]) -> tuple[dict[str, Tensor], Path]:
    """The weights that a plan's `pretrain_info` names, and the file they came from.

    Raises:
        CheckpointError: if the file is missing, changed since the plan was made, or unreadable.
    """
    path = resolve_checkpoint(info["checkpoint_path"])
    if not path.is_file():
        raise CheckpointError(
            f"The pretrained checkpoint {info['checkpoint_path']} named in the plan does not exist (looked for "
            f"{path}). Put it back, or plan again with misfm_plan -pretrained_weights; misfm_plan --from_scratch "
            f"plans without."
        )
    source = read_source(path)
    expected = info.get("sha256")
    if expected is not None and source.sha256 != expected:
        raise CheckpointError(
            f"{path} is not the file the plan was made with (sha256 {source.sha256[:12]}..., the plan has "
            f"{expected[:12]}...). Run misfm_plan again to use the present file."
        )
    return source.weights, path


def resolve_checkpoint(checkpoint_path: str) -> Path:
    """An absolute path as it is; a relative one within the nnUNet_results folder."""
    path = Path(checkpoint_path)
    results = os.environ.get("nnUNet_results")
    return path if path.is_absolute() or results is None else Path(results) / path


def portable_path(path: Path) -> str:
    """The path relative to nnUNet_results where the file lies in it, so that plans survive moving that folder."""
    results = os.environ.get("nnUNet_results")
    resolved = path.resolve()
    if results is not None and resolved.is_relative_to(Path(results).resolve()):
        return str(resolved.relative_to(Path(results).resolve()))
    return str(resolved)


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
