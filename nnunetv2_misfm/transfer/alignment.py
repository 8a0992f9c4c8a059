"""Which parameter of a pretrained network belongs to which of the target, where the two are not built alike.

PCT-Net's stems are matched by their degree of anisotropy, the stages of nnU-Net's U-Nets by their resolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnunetv2_misfm.architectures.resolution import total_strides

_STEM = re.compile(r"^(encoder\.stems|decoder\.heads)\.(\d)\.")
_ENCODER_STAGE = re.compile(r"^((?:decoder\.)?encoder\.stages)\.(\d+)\.")
_DECODER_STAGE = re.compile(r"^(decoder\.(?:stages|transpconvs))\.(\d+)\.")


def source_names(
    source: Mapping[str, Tensor], source_arguments: Mapping[str, Any], target: nn.Module
) -> Callable[[str], str | None]:
    """A function from a parameter's name in the target to its name in the source; None where it has no counterpart.

    Args:
        source: state dict of the pretrained network.
        source_arguments: constructor arguments of that network; empty if they are not known.
        target: the network that is to be filled.
    """
    stems = sorted({int(match[2]) for key in source if (match := _STEM.match(key))})
    if stems:
        return lambda name: _with_nearest_stem(name, stems)
    target_strides = getattr(getattr(target, "encoder", None), "strides", None)
    if target_strides is None or not any(key.startswith("encoder.stages.") for key in source):
        return lambda name: name
    num_stages = 1 + max(int(match[2]) for key in source if (match := _ENCODER_STAGE.match(key)))
    strides = source_arguments.get("strides") or [list(stride) for stride in target_strides]
    if len(strides) != num_stages:  # nothing is known about the source: its stages are counted from the finest
        strides = [[1, 1, 1], *[[2, 2, 2]] * (num_stages - 1)]
        target_strides = [[1, 1, 1], *[[2, 2, 2]] * (len(target_strides) - 1)]
    stages = _stages_of_equal_resolution(strides, [list(stride) for stride in target_strides])
    return lambda name: _with_source_stage(name, stages, num_stages)


def _with_nearest_stem(name: str, stems: Sequence[int]) -> str:
    match = _STEM.match(name)
    if match is None or int(match[2]) in stems:
        return name
    nearest = min(stems, key=lambda degree: abs(degree - int(match[2])))
    return f"{match[1]}.{nearest}.{name[match.end() :]}"


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


def _with_source_stage(name: str, stages: Mapping[int, int | None], num_stages: int) -> str | None:
    match = _ENCODER_STAGE.match(name)
    if match is not None:
        stage = stages[int(match[2])]
        return None if stage is None else f"{match[1]}.{stage}.{name[match.end() :]}"
    match = _DECODER_STAGE.match(name)
    if match is not None:
        # Decoders count from the second coarsest stage upwards.
        stage = stages[len(stages) - 2 - int(match[2])]
        if stage is None or num_stages - 2 - stage < 0:
            return None
        return f"{match[1]}.{num_stages - 2 - stage}.{name[match.end() :]}"
    return name
