"""The weights of nnU-Net's U-Nets: each once, what they tell of their network, and those of v1 under v2's names.

Parameter names are those of the classes in dynamic_network_architectures (`architectures/unet.py`) and, for v1, of
nnunet/network_architecture/generic_UNet.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo
from nnunetv2_misfm.checkpoints.foreign import GENERIC_UNET_CLASS, RESIDUAL_UNET
from nnunetv2_misfm.plans.network_entry import PLAIN_UNET

_ENCODER_OF_DECODER, _IN_ORDER = "decoder.encoder.", ".all_modules."
_IN_DECODER = "decoder.stages.{}.convs.{}.conv.weight"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_statistic(name: str) -> bool:
    """Whether a name is that of a statistic of BatchNorm, which is no parameter."""
    return name.rpartition(".")[2] in _STATISTICS


def is_alias(name: str) -> bool:
    """Whether a state dict of nnU-Net's networks names a parameter a second time: decoders hold the encoder too."""
    return name.startswith(_ENCODER_OF_DECODER) or _IN_ORDER in name


def _first_name(name: str, weights: Collection[str]) -> str:
    """The first of the names under which nnU-Net's networks list a parameter; `weights` has all names."""
    first = name.removeprefix("decoder.") if name.startswith(_ENCODER_OF_DECODER) else name
    block, in_order, rest = first.partition(_IN_ORDER)
    if not in_order:
        return first
    number, _, own = rest.partition(".")
    if number == "0":
        return f"{block}.conv.{own}"
    # A norm has weight and bias, a PReLU its slopes alone; which of them comes first depends on `nonlin_first`.
    is_norm = f"{name.removesuffix(own)}bias" in weights or is_statistic(own)
    return f"{block}.{'norm' if is_norm else 'nonlin'}.{own}"


def each_once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Each parameter under the first of its names, with the value that PyTorch would load last.

    The names of a parameter mostly stand for one tensor. After sparse masked pretraining of nnssl they do not, and only
    the one that the network computes with was trained.

    Returns:
        The weights; what was chosen where the values of one parameter differ, empty if they do not.
    """
    names: dict[str, list[str]] = {}
    for name in weights:
        names.setdefault(_first_name(name, weights), []).append(name)
    once, differing, largest = {}, [], 0.0
    for first, given in names.items():
        given.sort(key=lambda name: (name.startswith(_ENCODER_OF_DECODER), _IN_ORDER in name))
        last = weights[given[-1]]
        once[first] = last
        difference = max(_difference(weights[other], last) for other in given)
        if difference > 0:
            differing.append(given)
            largest = max(largest, difference)
    if not differing:
        return once, ""
    used = differing[0][-1].removeprefix("decoder.")
    return once, (
        f"{len(differing)} of its {len(once)} parameters stand in the file more than once, with values that differ by "
        f"up to {100 * min(largest, 9.99):.0f} %. Those that PyTorch would load last are used, such as {used} in place "
        f"of {differing[0][0]}."
    )


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative to the norm of `other`; infinite for other shapes."""
    if one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape):
        return 0.0
    if one.shape != other.shape:
        return float("inf")
    one, other = one.double(), other.double()
    size = float(other.norm())
    return float((one - other).norm()) / size if size else float(bool(one.any()))


def told_unet(weights: Mapping[str, Tensor]) -> CheckpointInfo | None:
    """What the weights of a U-Net of nnU-Net tell of it.

    Args:
        weights: each under the first of its names.

    Returns:
        Its arguments lack what no weight tells, such as dropout, and those of the decoder, strides among them, where
        there is none; without segmentation layers there are 0 classes. None for weights that do not make up such a
        network.
    """
    residual = "encoder.stem.convs.0.conv.weight" in weights
    blocks = "encoder.stages.{}.blocks.{}.conv1.conv.weight" if residual else "encoder.stages.{}.0.convs.{}.conv.weight"
    in_encoder = _counts(weights, blocks)
    if not in_encoder or any(".conv3." in name for name in weights):  # bottleneck blocks have other arguments
        return None
    first = [weights[blocks.format(stage, 0)] for stage in range(len(in_encoder))]
    kernels = [list(kernel.shape[2:]) for kernel in first]
    dim = first[0].ndim - 2
    norm = "batchnorm.BatchNorm" if any(is_statistic(name) for name in weights) else "instancenorm.InstanceNorm"
    arguments: dict[str, Any] = {
        "n_stages": len(in_encoder),
        "features_per_stage": [kernel.shape[0] for kernel in first],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": kernels,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": in_encoder,
        "conv_bias": blocks.format(0, 0).replace(".weight", ".bias") in weights,
        "norm_op": f"torch.nn.modules.{norm}{dim}d",
    }
    arguments |= _of_decoder(weights, len(in_encoder), dim)
    seg_layer = weights.get("decoder.seg_layers.0.weight")
    stem = weights["encoder.stem.convs.0.conv.weight"] if residual else first[0]
    classes = 0 if seg_layer is None else seg_layer.shape[0]
    class_name = RESIDUAL_UNET if residual else PLAIN_UNET
    in_decoder = [weights[_IN_DECODER.format(i, 0)] for i in range(len(_counts(weights, _IN_DECODER)))]
    in_decoder_kernels = [list(kernel.shape[2:]) for kernel in in_decoder]
    # From coarse to fine: those of the next coarser stages in v1, of the same stages in v2.
    if not residual and in_decoder_kernels == kernels[:0:-1] != kernels[-2::-1]:
        class_name = GENERIC_UNET_CLASS
    return CheckpointInfo("unknown", class_name, arguments, stem.shape[1], classes, {}, {})


def _of_decoder(weights: Mapping[str, Tensor], num_stages: int, dim: int) -> dict[str, Any]:
    """The arguments that the weights of a whole decoder tell, for images of `dim` axes; empty where there is none."""
    arguments: dict[str, Any] = {}
    upsampling = [weights.get(f"decoder.transpconvs.{stage}.weight") for stage in range(num_stages - 1)]
    if all(kernel is not None for kernel in upsampling):
        arguments["strides"] = [[1] * dim, *(list(k.shape[2:]) for k in reversed(upsampling) if k is not None)]
    convolutions = _counts(weights, _IN_DECODER)
    if len(convolutions) == num_stages - 1:
        arguments["n_conv_per_stage_decoder"] = convolutions
    return arguments


def _counts(weights: Mapping[str, Tensor], pattern: str) -> list[int]:
    """How many of the pattern's second number there are for each of its first, from 0 on."""
    counts: list[int] = []
    while pattern.format(len(counts), 0) in weights:
        number = 0
        while pattern.format(len(counts), number) in weights:
            number += 1
        counts.append(number)
    return counts


def from_generic_unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of nnU-Net v2's PlainConvUNet from that of v1's Generic_UNet; the outputs are the same.

    v1 splits the convolutions of the deepest stage and of the decoder's into two groups, and has no biases where v2
    has; they are zero. Where v1's decoder has other kernels, it is `architectures.generic_unet.GenericUNet`'s.
    """
    groups = _lengths(weights)
    converted = {}
    for name, value in weights.items():
        kind, _, rest = name.partition(".")
        stage, _, rest = rest.partition(".")
        if kind in ("conv_blocks_context", "conv_blocks_localization"):
            group, _, inner = rest.partition(".blocks.") if not rest.startswith("blocks.") else ("", "", rest[7:])
            number, _, inner = inner.partition(".")
            index = int(number) + (groups[f"{kind}.{stage}.0"] if group == "1" else 0)
            stages = f"encoder.stages.{stage}.0" if kind == "conv_blocks_context" else f"decoder.stages.{stage}"
            converted[f"{stages}.convs.{index}.{inner.replace('instnorm.', 'norm.')}"] = value
        elif kind == "tu":
            converted[f"decoder.transpconvs.{stage}.{rest}"] = value
            converted.setdefault(f"decoder.transpconvs.{stage}.bias", torch.zeros(value.shape[1]))
        elif kind == "seg_outputs":
            converted[f"decoder.seg_layers.{stage}.{rest}"] = value
            converted.setdefault(f"decoder.seg_layers.{stage}.bias", torch.zeros(value.shape[0]))
        else:
            converted[name] = value
    return converted


def _lengths(names: Iterable[str]) -> dict[str, int]:
    """For each list of blocks in v1's network, how many it has."""
    lengths: dict[str, int] = {}
    for name in names:
        blocks, found, rest = name.partition(".blocks.")
        if found:
            lengths[blocks] = max(lengths.get(blocks, 0), 1 + int(rest.partition(".")[0]))
    return lengths
