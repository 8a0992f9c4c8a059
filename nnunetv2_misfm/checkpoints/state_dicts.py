"""Finds the weights of a network in what a checkpoint file holds, whatever project has written it.

They lie under one of several keys, or bare; before their names stand those of wrappers, in any order; and there may be
several networks, such as a student and the average of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError
from nnunetv2_misfm.checkpoints.foreign import GENERIC_UNET, Kind, names_in, recognised
from nnunetv2_misfm.checkpoints.names import SEG_LAYERS, is_copy
from nnunetv2_misfm.checkpoints.unet_weights import each_once, from_generic_unet

_CONTAINERS = ("network_weights", "model_state_dict", "state_dict", "model", "net", "network", "student", "module")
_NOT_WEIGHTS = ("optim", "sched", "scaler", "amp", "logging", "init_args")
# What torch.compile, FSDP and checkpointing put into names, at any place.
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MOST_KEYS = 5


@dataclass(frozen=True)
class Found:
    """The weights of one network.

    Attributes:
        weights: in float32, each parameter once, under the names of the network that they are read as.
        kind: of network; None for one that is not known.
        place: where in the file they were, for people.
        unused: names in the file that belong to no part of this network, each with the reason.
        notes: what had to be decided.
    """

    weights: dict[str, Tensor]
    kind: Kind | None
    place: str
    unused: dict[str, str]
    notes: tuple[str, ...] = ()


def find_weights(content: Mapping[Any, Any], path: str | os.PathLike[str], as_they_are: bool = False) -> Found:
    """The weights in a file's content.

    Args:
        content: of the file.
        path: of the file, for errors.
        as_they_are: do not look for networks that are known: all weights belong to one that is not.

    Raises:
        CheckpointError: if there are none.
    """
    candidates = [
        replace(found, notes=(*found.notes, *_stored_as(found.weights)))
        for place, state_dict in _state_dicts(content)
        for found in _networks(place, state_dict, as_they_are)
    ]
    if not candidates:
        keys = [str(key) for key in content]
        held = ", ".join(keys[:_MOST_KEYS]) + (f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else "")
        raise CheckpointError(
            f"{path} has no weights of a network (it holds: {held or 'nothing'}). Give the file that the project saves "
            f"its weights in."
        )
    best = min(candidates, key=_rank)
    others = [found.place or "the top level" for found in candidates if found is not best and found.kind is not None]
    if others:
        note = f"The file holds {len(others) + 1} networks; {best.place} is used, {', '.join(others[:3])} not."
        best = replace(best, notes=(note, *best.notes))
    weights = {name: _single_precision(value) for name, value in best.weights.items()}
    if best.kind is GENERIC_UNET:
        weights = from_generic_unet(weights)
    note = ""
    if best.kind is not None:  # the names of other networks may mean anything
        weights, note = each_once(weights)
    names = names_in(best.kind)
    _check_values({name: value for name, value in weights.items() if names.part_of(name) != SEG_LAYERS}, path)
    return replace(best, weights=weights, notes=(*best.notes, note) if note else best.notes)


def _state_dicts(
    content: Mapping[Any, Any], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All mappings from names to tensors, each with the keys that lead to it."""
    tensors = {
        key: torch.as_tensor(value)
        for key, value in content.items()
        if isinstance(key, str) and (_is_dense(value) or _is_array_of_numbers(value))
    }
    if tensors and 2 * len(tensors) >= len(content):
        yield place, tensors
        return
    for key, value in content.items() if depth < 2 else ():
        inside = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(inside, Mapping) and not str(key).lower().startswith(_NOT_WEIGHTS):
            yield from _state_dicts(inside, f"{place}.{key}" if place else str(key), depth + 1)


def _is_dense(value: object) -> bool:
    """Whether a value is a tensor with numbers of its own, neither sparse nor quantised nor without memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _is_array_of_numbers(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def _networks(place: str, state_dict: Mapping[str, Tensor], as_they_are: bool) -> Iterator[Found]:
    """The networks in one state dict."""
    names = {_without(name, _INNER_WRAPPERS): name for name in state_dict}
    bare = {_without(name, (*_INNER_WRAPPERS, "module")): name for name in state_dict}
    known = None if as_they_are else recognised(bare)
    if known is None:
        yield Found(_each_stored_once({name: state_dict[given] for name, given in names.items()}), None, place, {})
        return
    kind, prefixes = known
    for prefix in prefixes:
        inside = {name: given for name, given in bare.items() if name.startswith(prefix)}
        # One network's names may all begin with what another's do.
        deeper = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        own = {name: given for name, given in inside.items() if not name.startswith(deeper)}
        weights = {kind.inside + name.removeprefix(prefix): state_dict[given] for name, given in own.items()}
        unused = {given: f"outside of {prefix}" for name, given in bare.items() if not name.startswith(prefix)}
        where = ".".join(filter(None, (place, prefix.removesuffix("."))))
        yield Found(weights, kind, where, unused)


def _each_stored_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those that share their numbers with an earlier one: second names of the same parameter."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, value in weights.items():
        first.setdefault((value.data_ptr(), value.shape), name)
    return {name: weights[name] for name in first.values()}


def _rank(found: Found) -> tuple[bool, bool, bool, int, int]:
    """Networks that can be read first, copies last, then by the usual order of containers."""
    container = found.place.partition(".")[0]
    order = _CONTAINERS.index(container) if container in _CONTAINERS else len(_CONTAINERS)
    return (
        found.kind is None,
        found.kind is not None and bool(found.kind.refusal),
        is_copy(found.place),
        order,
        -sum(value.numel() for value in found.weights.values()),
    )


def _without(name: str, components: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in components)


def _single_precision(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value


def _check_values(weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise a CheckpointError for weights that no network can start from."""
    diverged = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if diverged:
        raise CheckpointError(
            f"{path} holds NaN or infinity in {len(diverged)} of its {len(weights)} tensors, such as {diverged[0]}: "
            f"its training has diverged, or half precision was too little for it. Give an earlier checkpoint."
        )
    whole = [name for name, value in weights.items() if name.endswith(".weight") and not value.is_floating_point()]
    if whole:
        kind = str(weights[whole[0]].dtype).rpartition(".")[2]
        raise CheckpointError(
            f"{path} holds quantised weights, such as {whole[0]} as {kind}, without what they are to be scaled by. "
            f"Give the file from before quantisation."
        )


def _stored_as(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """A note on numbers of less precision than that of training."""
    kinds = {str(value.dtype).rpartition(".")[2] for value in weights.values() if value.is_floating_point()}
    if less := sorted(kinds - {"float32", "float64"}):
        yield f"The weights are stored as {', '.join(less)}."
