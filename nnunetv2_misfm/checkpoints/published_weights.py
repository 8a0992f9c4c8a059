"""The published MIS-FM weights (`pctnet_ct10k_volf.pt` and its like) in this package's parameter names.

The key maps below are literal on purpose: this is the one place where the reference's names (net/pct_net.py and
net/fmunet.py of openmedlab/MIS-FM, commit 1506d65) meet ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY
from nnunetv2_misfm.checkpoints.checkpoint import (
    WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    write_checkpoint,
)
from nnunetv2_misfm.checkpoints.foreign import PUBLISHED_FMUNET, PUBLISHED_PCTNET
from nnunetv2_misfm.checkpoints.own_weights import check_complete, told_fmunet, told_pctnet
from nnunetv2_misfm.checkpoints.state_dicts import find_weights
from nnunetv2_misfm.plans.checks import INTENSITIES
from nnunetv2_misfm.plans.normalisation import CT

_PUBLISHED_WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 1000.0}

# (pattern in the reference, our name). `{m}` is a degree of anisotropy, `{i}` an index within a Sequential.
_STAGES = {"e2": "encoder.stage2", "e3": "encoder.stage3", "e4": "encoder.stage4"} | {
    "d3": "decoder.stage3",
    "d2": "decoder.stage2",
}
_LAYERS: list[tuple[str, str]] = [
    (r"embeddings\.(\d)\.proj\.", r"encoder.stems.\1.project."),
    (r"embeddings\.(\d)\.conv([01])\.conv_conv\.", r"encoder.stems.\1.stage\2."),
    (r"pyramid_ct\.up3\.up\.", r"decoder.up2.upsample."),
    (r"pyramid_ct\.up3\.conv\.", r"decoder.up2.merge."),
    (r"pyramid_ct\.up4\.up\.", r"decoder.up3.upsample."),
    (r"pyramid_ct\.up4\.conv\.", r"decoder.up3.merge."),
    (r"pyramid_ct\.out_conv([23])\.conv\.([01])\.", r"decoder.pre_seg\1.\2."),
    (r"pyramid_ct\.out_conv3\.conv\.2\.", r"decoder.seg_layers.0."),
    (r"pyramid_ct\.out_conv2\.conv\.2\.", r"decoder.seg_layers.1."),
    (r"pred_heads\.(\d)\.up1\.up\.", r"decoder.heads.\1.up0.upsample."),
    (r"pred_heads\.(\d)\.up1\.conv\.", r"decoder.heads.\1.up0.merge."),
    (r"pred_heads\.(\d)\.up2\.up\.", r"decoder.heads.\1.up1.upsample."),
    (r"pred_heads\.(\d)\.up2\.conv\.", r"decoder.heads.\1.up1.merge."),
    (r"pred_heads\.(\d)\.conv([01])\.conv_conv\.", r"decoder.heads.\1.stage\2."),
    (r"pred_heads\.(\d)\.out_conv([01])\.conv\.([01])\.", r"decoder.heads.\1.pre_seg\2.\3."),
]
_SWIN: list[tuple[str, str]] = [
    (r"conv\.conv_conv\.", r"conv."),
    (r"trans\.blocks\.(\d+)\.attn\.", r"swin.\1.attention."),
    (r"trans\.blocks\.(\d+)\.mlp\.fc1\.", r"swin.\1.mlp.0."),
    (r"trans\.blocks\.(\d+)\.mlp\.fc2\.", r"swin.\1.mlp.3."),
    (r"trans\.blocks\.(\d+)\.", r"swin.\1."),
]
# FMUNet (net/fmunet.py). Its decoder counts stages from fine to coarse, ours from coarse to fine: `{i}` becomes 3 − i.
_FMUNET: list[tuple[str, str]] = [
    (r"project\.", "encoder.stem."),
    (r"encoder\.en_conv(\d)\.conv_list\.", r"encoder.stages.\1.convs."),
    (r"encoder\.down(\d)\.down\.", r"encoder.downs.\1."),
    (r"decoder\.de_conv4\.conv_list\.", "decoder.bottleneck.convs."),
    (r"decoder\.de_conv(\d)\.conv_list\.", "decoder.stages.{i}.convs."),
    (r"decoder\.upcat(\d)\.up\.", "decoder.merges.{i}.reduce."),
    (r"decoder\.upcat(\d)\.conv\.", "decoder.merges.{i}.merge."),
    (r"out_layers\.(\d)\.2\.", "decoder.seg_layers.{i}."),
    (r"out_layers\.(\d)\.", "decoder.pre_seg.{i}."),
]
# Built by the reference but never used in its forward pass, or derived from sizes.
_UNUSED = re.compile(r"pyramid_ct\.convtrans_..\.norm_layer\.|.*\.relative_position_index$")


def convert_pctnet(state_dict: Mapping[str, Tensor], stems: Sequence[int], window_size: int = 6) -> dict[str, Tensor]:
    """The state dict of our PCTNet with the given stems, from the reference's.

    Args:
        state_dict: of the reference's PCTNet, which always holds all three stems.
        stems: degrees of anisotropy to keep, as in `PCTNet(stems=...)`.
        window_size: of our network; smaller tables of the reference go to the centre of the full one.

    Raises:
        KeyError: naming a key of the reference that the map does not know.
    """
    stems = sorted(stems)
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if _UNUSED.match(key):
            continue
        degree = re.match(r"(?:embeddings|pred_heads)\.(\d)\.", key)
        if degree and int(degree[1]) not in stems:
            continue
        if key.endswith("relative_position_bias_table"):
            value = expand_bias_table(value, window_size)
        converted[_our_key(key, stems)] = value
    return converted


def expand_bias_table(table: Tensor, window_size: int) -> Tensor:
    """A bias table with one row per offset, from the reference's, whose index lets different offsets share a row.

    The reference looks up row (3w − 1)·dx + (2w − 1)·dy + dz for offsets counted from 0 (w: edge of its window). The
    rows it shares are copied. Offsets beyond its window were never trained; they take the nearest trained offset's row.

    Args:
        table: ((2w − 1)**3, heads).
        window_size: edge of the full window, at least w.

    Returns:
        ((2 · window_size − 1)**3, heads)
    """
    span = round(table.shape[0] ** (1 / 3))
    window = (span + 1) // 2
    steps = torch.arange(span)
    row = (3 * window - 1) * steps[:, None, None] + (2 * window - 1) * steps[None, :, None] + steps[None, None, :]
    cube = table[row].permute(3, 0, 1, 2)  # (heads, span, span, span)
    border = window_size - window
    if border:
        cube = F.pad(cube[None], (border,) * 6, mode="replicate")[0]
    return cube.permute(1, 2, 3, 0).reshape(-1, table.shape[1])


def _our_key(key: str, stems: Sequence[int]) -> str:
    stage = re.match(r"pyramid_ct\.convtrans_(e2|e3|e4|d3|d2)\.", key)
    if stage:
        rest = key[stage.end() :]
        for pattern, ours in _SWIN:
            renamed, hits = re.subn("^" + pattern, ours, rest)
            if hits:
                return f"{_STAGES[stage[1]]}.{renamed}"
    down = re.match(r"(?:embeddings\.(\d)|pyramid_ct)\.(down\d)\.conv\.(\d)\.", key)
    if down:
        # Our down-sampling begins with the pooling, which the reference keeps beside the sequence.
        parent = "encoder" if down[1] is None else f"encoder.stems.{down[1]}"
        return f"{parent}.{down[2]}.{int(down[3]) + 1}.{key[down.end() :]}"
    output = re.match(r"pred_heads\.(\d)\.out_conv([01])\.conv\.2\.", key)
    if output:
        index = 2 + 2 * stems.index(int(output[1])) + (1 - int(output[2]))
        return f"decoder.seg_layers.{index}.{key[output.end() :]}"
    for pattern, ours in _LAYERS:
        renamed, hits = re.subn("^" + pattern, ours, key)
        if hits:
            return renamed
    raise KeyError(f"{key!r} is not a key of the published PCT-Net")


def convert_fmunet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our FMUNet from the reference's.

    Raises:
        KeyError: naming a key of the reference that the map does not know.
    """
    return {_our_fmunet_key(key): value for key, value in state_dict.items()}


def _our_fmunet_key(key: str) -> str:
    for pattern, ours in _FMUNET:
        match = re.match(pattern, key)
        if match:
            prefix = match.expand(ours) if "{i}" not in ours else ours.format(i=3 - int(match[1]))
            return prefix + key[match.end() :]
    raise KeyError(f"{key!r} is not a key of the published FMUNet")


def import_published(source: Path, target: Path, stems: Sequence[int]) -> CheckpointInfo:
    """Write a published MIS-FM file as a checkpoint of ours.

    Args:
        source: the published file.
        target: the checkpoint to write.
        stems: degrees of anisotropy to keep (`resolution_mode` of the reference); all for FMUNet, which has one.

    Returns:
        What the checkpoint says about itself.

    Raises:
        CheckpointError: if `source` is not a published file, or is not readable, or has no stems to choose from.
    """
    found = find_weights(read_checkpoint(source), source)
    if found.kind not in (PUBLISHED_PCTNET, PUBLISHED_FMUNET):
        held = "a network that is not known here" if found.kind is None else f"a {found.kind.name}"
        raise CheckpointError(
            f"{source} is not a published MIS-FM file: it holds {held}. misfm_plan takes checkpoints as they are."
        )
    if found.kind is PUBLISHED_FMUNET and tuple(stems) != DEGREES_OF_ANISOTROPY:
        raise CheckpointError(f"{source} holds an FMUNet, which has one stem. Leave -resolution_mode out.")
    weights, info = read_published(found.weights, source, stems)
    write_checkpoint({WEIGHTS: weights}, info, target)
    return info


def read_published(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], stems: Sequence[int] = DEGREES_OF_ANISOTROPY
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Our weights and their description from a published state dict; the network is recognised by its keys and shapes.

    Args:
        state_dict: the file's weights, under the reference's names.
        path: of the file, for errors.
        stems: degrees of anisotropy of PCT-Net to keep; the described network starts with the first one.

    Raises:
        CheckpointError: if it is not a complete PCT-Net or FMUNet of the reference.
    """
    try:
        if "embeddings.0.proj.weight" in state_dict:
            weights = convert_pctnet(state_dict, stems)
            info = told_pctnet(weights)
        else:
            weights = convert_fmunet(state_dict)
            info = told_fmunet(weights)
        check_complete(weights, info)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete published network: {error}") from None
    preprocessing = _published_preprocessing(info.input_channels)
    training = {"published": "openmedlab/MIS-FM"}
    return weights, replace(info, task="volume_fusion", preprocessing=preprocessing, training=training)


def _published_preprocessing(input_channels: int) -> dict[str, Any]:
    """The authors' CT recipe: clip to [-1000, 1000] HU, scale to [-1, 1], 64 x 128 x 128 patches; as in plans."""
    return {
        "patch_size": [64, 128, 128],
        "normalization_schemes": [CT] * input_channels,
        "transpose_forward": [0, 1, 2],
        INTENSITIES: {str(channel): dict(_PUBLISHED_WINDOW) for channel in range(input_channels)},
    }
