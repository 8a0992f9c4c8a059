"""Pretrained weights as a plan names them: where the file is, what is in it, in which network's parameter names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from nnunetv2_misfm.transfer.hub import download, is_hub_name
from nnunetv2_misfm.transfer.published_weights import read_published
from nnunetv2_misfm.transfer.safetensors_file import read_safetensors


@dataclass(frozen=True)
class Source:
    """A pretrained checkpoint, read.

    Attributes:
        path: of the file.
        kind: "nnunetv2_misfm", "nnunetv2" or "published".
        weights: state dict under the parameter names of our networks, or of nnU-Net's.
        info: what the file says about itself; None for nnU-Net's own checkpoints.
        sha256: of the file.
        arch_kwargs: constructor arguments of the network, as far as they are known.
        hub_name: the file's place on the Hugging Face Hub, with the exact revision; empty for a file given by its path.
    """

    path: Path
    kind: str
    weights: dict[str, Tensor]
    info: CheckpointInfo | None
    sha256: str
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    hub_name: str = ""

    @property
    def num_images(self) -> int | None:
        """How many of the network's input channels are images, if the file tells; the rest are labels of a cascade."""
        schemes = None if self.info is None else self.info.preprocessing.get("normalization_schemes")
        return len(schemes) if schemes else None


def read_source(given: str | os.PathLike[str]) -> Source:
    """Read a checkpoint of ours (.pth or .safetensors), of nnU-Net, or a published MIS-FM file.

    Args:
        given: a path, or "hf:OWNER/NAME" for a repository on the Hugging Face Hub.

    Raises:
        CheckpointError: if the file cannot be used; the message says why and what to do.
    """
    path, name = Path(given), ""
    if is_hub_name(str(given)):
        path, name = download(str(given))
    if path.suffix == ".safetensors":
        weights, info = read_safetensors(path)
        return Source(path, "nnunetv2_misfm", weights, info, file_sha256(path), info.arch_kwargs, name)
    checkpoint = read_checkpoint(path)
    digest = file_sha256(path)
    if PUBLISHED_WEIGHTS in checkpoint:
        weights, info = read_published(checkpoint[PUBLISHED_WEIGHTS], path)
        return Source(path, "published", weights, info, digest, info.arch_kwargs, name)
    block = checkpoint_info(checkpoint, path)
    weights = network_weights(checkpoint, path)
    if block is None:
        return Source(path, "nnunetv2", weights, None, digest, _stock_arch_kwargs(checkpoint), name)
    return Source(path, "nnunetv2_misfm", weights, block, digest, block.arch_kwargs, name)


def _stock_arch_kwargs(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Constructor arguments of the network in one of nnU-Net's own checkpoints, which keep the plans they were made by.

    They only help to align stages; a file without them can still be used.
    """
    try:
        made_by = checkpoint["init_args"]
        arguments = made_by["plans"]["configurations"][made_by["configuration"]]["architecture"]["arch_kwargs"]
    except (KeyError, TypeError):
        return {}
    return arguments if isinstance(arguments, Mapping) else {}


def load_source(info: Mapping[str, Any]) -> Source:
    """The checkpoint that a plan's `pretrain_info` names.

    Raises:
        CheckpointError: if the file is missing, changed since the plan was made, or unreadable.
    """
    named: str = info["checkpoint_path"]
    path: str | Path = named if is_hub_name(named) else resolve_checkpoint(named)
    if isinstance(path, Path) and not path.is_file():
        raise CheckpointError(
            f"The pretrained checkpoint {named} named in the plan does not exist (looked for "
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
    return source


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
