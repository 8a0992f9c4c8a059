"""Which parameter of one network is which of another: stems by anisotropy, stages by resolution, the rest by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from nnunetv2_misfm.architectures.resolution import total_strides
from nnunetv2_misfm.checkpoints.names import Names, is_copy, within


def matching_names(
    source: Collection[str], source_arguments: Mapping[str, Any], target: nn.Module, names: Names
) -> Callable[[str], str | None]:
    """A function from a parameter's name in the target to its name in the source; None where it has no counterpart.

    PCT-Net's stems are matched by their degree of anisotropy, the stages of nnU-Net's U-Nets by their resolution.

    Args:
        source: names of the pretrained parameters, each once.
        source_arguments: constructor arguments of that network; empty if they are not known.
        target: the network that is to be filled.
        names: of the target.
    """
    if names.by_anisotropy:
        return lambda name: _in_nearest_stem(name, names.by_anisotropy, source)
    if names.encoder_stages:
        num_stages = 1 + max((n for key in names.encoder_stages for n in _numbers(source, key)), default=-1)
        strides = source_arguments.get("strides") or []
        target_strides = [list(stride) for stride in target.encoder.strides]  # type: ignore[union-attr]
        if len(strides) != num_stages:  # nothing is known of the source: its stages are counted from the finest
            strides = [[1, 1, 1], *[[2, 2, 2]] * (num_stages - 1)]
            target_strides = strides[:1] + [[2, 2, 2]] * (len(target_strides) - 1)
        stages = _stages_of_equal_resolution(strides, target_strides)
        return lambda name: _in_source_stage(name, names, stages, num_stages)
    around, before = _prefixes(source, [name for name, _ in target.named_parameters()])
    return lambda name: before + name.removeprefix(around) if name.startswith(around) else None


def _prefixes(source: Collection[str], own: Sequence[str]) -> tuple[str, str]:
    """What stands before the names that a network and a file share, in each of them; mostly nothing.

    In the network that is the name under which a class around another holds it, in the file wrappers (`module.`).
    """
    found = []
    for around in dict.fromkeys(["", *(f"{name.partition('.')[0]}." for name in own if "." in name)]):
        bare = [name.removeprefix(around) for name in own if name.startswith(around)]
        before = _prefix(source, bare)
        found.append((sum(before + name in source for name in bare), around, before))
    _, around, before = max(found, key=lambda one: one[0])
    return around, before


def _prefix(source: Collection[str], own: Collection[str]) -> str:
    """What stands before the names of a network in a file: before most of them, of copies last."""
    wanted, found = set(own), Counter[str]()
    for name in source:
        ends = (name[start:] for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")))
        found.update(name.removesuffix(end) for end in ends if end in wanted)
    return max(found, key=lambda prefix: (found[prefix], not is_copy(prefix)), default="")


def _in_nearest_stem(name: str, lists: Sequence[str], source: Collection[str]) -> str:
    for key in lists:
        if within(name, key):
            degree, rest = _entry(name, key)
            there = _numbers(source, key)
            return f"{key}.{min(sorted(there), key=lambda other: abs(other - degree), default=degree)}.{rest}"
    return name


def _stages_of_equal_resolution(
    source: Sequence[Sequence[int]], target: Sequence[Sequence[int]]
) -> dict[int, int | None]:
    """For each stage of the target, the stage of the source whose map is downsampled as much along the finest axis."""
    reached = [max(stride) for stride in total_strides(source)]
    found: dict[int, int | None] = {}
    for stage, stride in enumerate(total_strides(target)):
        # Stages that pool another axis only have the finest axis' stride in common; they are taken in order.
        same = [i for i, factor in enumerate(reached) if factor == max(stride) and i not in found.values()]
        found[stage] = same[0] if same else None
    return found


def _in_source_stage(name: str, names: Names, stages: Mapping[int, int | None], num_stages: int) -> str | None:
    for key in names.encoder_stages:
        if within(name, key):
            index, rest = _entry(name, key)
            stage = stages[index]
            return None if stage is None else f"{key}.{stage}.{rest}"
    for key in names.decoder_stages:
        if within(name, key):
            index, rest = _entry(name, key)
            stage = stages[len(stages) - 2 - index]  # decoders count from the second coarsest stage upwards
            if stage is None or num_stages - 2 - stage < 0:
                return None
            return f"{key}.{num_stages - 2 - stage}.{rest}"
    return name


def _entry(name: str, key: str) -> tuple[int, str]:
    """The number in the list `key`, and what follows it."""
    number, _, rest = name[len(key) + 1 :].partition(".")
    return int(number), rest


def _numbers(names: Collection[str], key: str) -> set[int]:
    """The numbers that names of a file have in the list `key`; what else is called so there is no list of ours."""
    there = {name.removeprefix(f"{key}.").partition(".")[0] for name in names if within(name, key)}
    return {int(number) for number in there if number.isdecimal()}
