"""Pretrained weights as a plan names them: where the file is, what is in it, in which network's parameter names."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnunetv2_misfm.checkpoints.checkpoint import (
    LEARNT,
    TRAINED_PARTS,
    WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    checkpoint_info,
    checkpoints_in_archive,
    read_checkpoint,
)
from nnunetv2_misfm.checkpoints.described import (
    channels_of_checkpoint,
    describe_unet,
    how_well_learnt,
    told_preprocessing,
    well_formed,
)
from nnunetv2_misfm.checkpoints.foreign import FMUNET, GENERIC_UNET, PCTNET, PUBLISHED_FMUNET, PUBLISHED_PCTNET, Kind
from nnunetv2_misfm.checkpoints.hub import download, is_hub_name
from nnunetv2_misfm.checkpoints.names import LEARNING_PARTS, SEG_LAYERS, Names, names_in_class
from nnunetv2_misfm.checkpoints.nnssl import ADAPTATION, ADAPTATION_FILE
from nnunetv2_misfm.checkpoints.nnunet_v1 import init_args_beside
from nnunetv2_misfm.checkpoints.own_weights import describe_own
from nnunetv2_misfm.checkpoints.published_weights import read_published
from nnunetv2_misfm.checkpoints.safetensors_file import is_safetensors, read_safetensors
from nnunetv2_misfm.checkpoints.state_dicts import Found, find_weights
from nnunetv2_misfm.files import json_or_nothing
from nnunetv2_misfm.plans.network_entry import DECODER, NETWORKS, own_class


@dataclass(frozen=True)
class Source:
    """A pretrained checkpoint, read.

    Attributes:
        path: of the file.
        weights: in float32, each parameter once, under the names of the network that they are read as.
        kind: of network; None for one that is not known.
        info: what the file says about itself, or its weights tell; None for networks that are not known.
        preprocessing: of the images that the network was trained on, as far as it is known; as in plans.
        sha256: of the file.
        hub_name: the file's place on the Hugging Face Hub, with the exact revision; empty for a file given by its path.
        by_this_package: whether the file says that this package wrote it.
        channels: names of the image channels, as far as they are known.
        untrained: the parts of the network that did not learn, each with the reason.
        learnt: how well, in words; empty if it is not known.
        unused: names in the file that do not belong to this network, with the reasons.
        whole: if there are such, all weights under their names in the file: a network of one's own around the known
            one can start from all of them.
        notes: what had to be decided when the file was read.
    """

    path: Path
    weights: dict[str, Tensor]
    kind: Kind | None = None
    info: CheckpointInfo | None = None
    sha256: str = ""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    hub_name: str = ""
    by_this_package: bool = False
    channels: tuple[str, ...] = ()
    untrained: Mapping[str, str] = field(default_factory=dict)
    learnt: str = ""
    unused: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_images(self) -> int | None:
        """How many of the network's input channels are images, if the file tells; the rest are labels of a cascade."""
        schemes = self.preprocessing.get("normalization_schemes")
        return len(schemes) if schemes else None

    @property
    def arch_kwargs(self) -> Mapping[str, Any]:
        """Constructor arguments of the network, as far as they are known."""
        return {} if self.info is None else self.info.arch_kwargs

    @property
    def network_name(self) -> str:
        """The network's name for people."""
        if self.info is not None:
            return self.info.network_class_name.rpartition(".")[2]
        return "network that is not known here" if self.kind is None else self.kind.name

    def check_is_3d(self) -> None:
        """Raise a CheckpointError for a 2D network."""
        if str(self.arch_kwargs.get("conv_op")).endswith("Conv2d"):
            raise CheckpointError(
                f"{self.path} holds a 2D {self.network_name}, the networks here are 3D. Use 3D weights."
            )

    @property
    def names(self) -> Names | None:
        """The names in its weights; None if they are not known."""
        described = None if self.info is None else names_in_class(self.info.network_class_name)
        return described or (None if self.kind is None else self.kind.names)


def read_source(given: str | os.PathLike[str]) -> Source:
    """Read a checkpoint of ours, of nnU-Net, of nnssl or of another project, as far as it can be used.

    Args:
        given: a path, or a name on the Hugging Face Hub, see `hub.py`.

    Raises:
        CheckpointError: if the file cannot be read; the message says why and what to do.
    """
    path, name = Path(given), ""
    beside: Path | None = path.with_name(ADAPTATION_FILE)
    if is_hub_name(str(given)):
        file = download(str(given))
        path, name, beside = file.path, file.name, file.adaptation_plan
    content = read_safetensors(path) if is_safetensors(path) else read_checkpoint(path)
    own, plan = checkpoint_info(content, path), _plan_beside(content, beside)
    # Only the classes known here have names that are known; those of another may hold such networks as parts.
    of_other_class = own is not None and names_in_class(own.network_class_name) is None
    found = find_weights(content, path, as_they_are=of_other_class)
    weights, info, notes = found.weights, own, [*_of_archive(path), *found.notes]
    if plan and own is None:
        notes.append(f"Its images are described by {ADAPTATION_FILE}, which lies beside it.")
    if own is None and found.kind is GENERIC_UNET and "init_args" not in content:
        init_args, note = init_args_beside(path)
        content, notes = {**content, "init_args": init_args}, [*notes, *([note] if note else [])]
    if own is None:
        weights, info = _told_by_weights(found, content, path, plan)
    told = told_preprocessing(content, plan) if info is None else well_formed(info.preprocessing)
    return Source(
        path=path,
        kind=found.kind,
        weights=weights,
        info=info,
        sha256=file_sha256(path),
        preprocessing=told,
        hub_name=name,
        by_this_package=own is not None,
        channels=channels_of_checkpoint(content),
        untrained=_untrained(content, path, info, weights),
        learnt=(info.training.get(LEARNT) if info else None) or how_well_learnt(content),
        unused=found.unused,
        whole=_whole(content, path) if found.unused else {},
        notes=tuple(notes),
    )


def _told_by_weights(
    found: Found, content: Mapping[str, Any], path: Path, plan: Mapping[str, Any]
) -> tuple[dict[str, Tensor], CheckpointInfo | None]:
    """The weights of a file that does not describe itself, under the names of a network known here, and what it is."""
    if found.kind in (PUBLISHED_PCTNET, PUBLISHED_FMUNET):
        return read_published(found.weights, path)
    if found.kind in (PCTNET, FMUNET):
        return found.weights, describe_own(found.weights, found.kind)
    return found.weights, describe_unet(content, found.weights, plan)


def _whole(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    try:
        return find_weights(content, path, as_they_are=True).weights
    except CheckpointError:  # no network can start from them, but from those of the known one
        return {}


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
    # A link is not followed: what it leads to may have another ending, and not the files that belong to it beside it.
    absolute, results = Path(os.path.abspath(path)), os.environ.get("nnUNet_results")
    if results is not None and os.path.isdir(results):
        for folder in absolute.parents:
            if folder.samefile(results):
                return str(absolute.relative_to(folder))
    return str(absolute)


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_network(path: str | os.PathLike[str], deep_supervision: bool = False) -> nn.Module:
    """The network of a checkpoint of ours or of a published file, with its weights, in evaluation mode on the CPU.

    Args:
        path: of the checkpoint.
        deep_supervision: return four outputs, finest first, instead of one.

    Raises:
        CheckpointError: if the file cannot be used, or holds a network that is not of this package.
    """
    source = read_source(path)
    if source.untrained:
        warnings.warn(f"{path}: {'; '.join(source.untrained.values())}, and is random.", stacklevel=2)
    if source.info is None or source.info.network_class_name not in NETWORKS.values():
        raise CheckpointError(
            f"{path} holds a {source.network_name}, not a network of this package ({', '.join(NETWORKS.values())}). "
            f"Build it with nnU-Net from the plans.json of its results folder."
        )
    # Looked up by name among our own classes only: the name comes from the file.
    network_class: Any = own_class(source.info.network_class_name)
    arguments = {**source.info.arch_kwargs, "deep_supervision": deep_supervision}
    try:
        network: nn.Module = network_class(source.info.input_channels, source.info.num_classes, **arguments)
        network.load_state_dict(source.weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The weights in {path} do not fit the network it describes: {error}") from None
    return network.eval()


def _plan_beside(content: Mapping[str, Any], beside: Path | None) -> dict[str, Any]:
    """nnssl's adaptation plan, for a checkpoint as nnssl saves it that does not hold it; empty if there is none."""
    if beside is None or WEIGHTS not in content or ADAPTATION in content:
        return {}
    return json_or_nothing(beside)


def _untrained(
    content: Mapping[str, Any], path: Path, info: CheckpointInfo | None, weights: Mapping[str, Tensor]
) -> dict[str, str]:
    """The parts that did not learn, by what the file says, or because it has none of their weights."""
    trained = content.get(TRAINED_PARTS, LEARNING_PARTS)
    if not isinstance(trained, (list, tuple)) or not set(trained) <= set(LEARNING_PARTS):
        raise CheckpointError(
            f"{path} names trained parts {trained!r} that this version does not know. Update nnunetv2_misfm."
        )
    task = "pretraining" if info is None else info.training.get("task", info.task)
    untrained = {part: f"the {part} was not trained by {task}" for part in LEARNING_PARTS if part not in trained}
    names = None if info is None else names_in_class(info.network_class_name)
    if names is not None and not any(names.part_of(name) in (DECODER, SEG_LAYERS) for name in weights):
        untrained[DECODER] = "the checkpoint has no decoder"
    return untrained


def _of_archive(path: Path) -> Iterator[str]:
    """A note on which of several checkpoints was read."""
    names = checkpoints_in_archive(path) or []
    if len(names) > 1:
        yield f"The archive holds {len(names)} checkpoints; {names[0]} is used. Unpack it to use another."
