"""Checkpoints as other projects lay them out, with small random networks."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunetv2_misfm.architectures import FMUNet

STRIDES = [[1, 1, 1], [2, 2, 2], [1, 2, 2]]


def unet(
    seed: int = 0,
    channels: int = 1,
    classes: int = 3,
    residual: bool = False,
    norm: type[nn.Module] = nn.InstanceNorm3d,
    strides: list[list[int]] = STRIDES,
) -> PlainConvUNet | ResidualEncoderUNet:
    """One of nnU-Net's U-Nets with drawn norms too."""
    torch.manual_seed(seed)
    stages = len(strides)
    build = ResidualEncoderUNet if residual else PlainConvUNet
    network = build(
        channels, stages, [4, 8, 12, 16][:stages], nn.Conv3d, 3, strides, 1, classes, 1, conv_bias=True,
        norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    )  # fmt: skip
    for name, parameter in network.named_parameters():
        if ".norm." in name:
            nn.init.normal_(parameter)
    return network.eval()


def plans(channels: tuple[str, ...] = ("CT",), old: bool = False, **configuration: Any) -> dict[str, Any]:
    """`init_args` as nnU-Net's trainers keep them, for `unet`."""
    window = {"mean": 87.3, "std": 359.0, "percentile_00_5": -941.0, "percentile_99_5": 1098.0}
    entry: dict[str, Any] = {
        "data_identifier": "x",
        "patch_size": [32, 32, 32],
        "spacing": [1.5, 1.5, 1.5],
        "batch_size": 2,
        "normalization_schemes": ["CTNormalization"] * len(channels),
        "use_mask_for_norm": [False] * len(channels),
        **configuration,
    }
    kernels, ones = [[3, 3, 3]] * 3, [1, 1, 1]
    if old:
        entry |= {
            "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 12,
            "n_conv_per_stage_encoder": ones, "n_conv_per_stage_decoder": ones[1:], "num_pool_per_axis": [1, 2, 2],
            "pool_op_kernel_sizes": STRIDES, "conv_kernel_sizes": kernels,
        }  # fmt: skip
    else:
        entry["architecture"] = {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"strides": STRIDES, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d"},
            "_kw_requires_import": ["norm_op"],
        }
    return {
        "plans": {
            "dataset_name": "Dataset291_Organs",
            "transpose_forward": [0, 1, 2],
            "image_reader_writer": "SimpleITKIO",
            "foreground_intensity_properties_per_channel": {str(i): window for i in range(len(channels))},
            "configurations": {"3d_fullres": entry},
        },
        "configuration": "3d_fullres",
        "dataset_json": {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": {"a": 1}},
    }


def as_generic_unet(network: PlainConvUNet) -> dict[str, Tensor]:
    """The names that nnU-Net v1 gives the weights of a PlainConvUNet with one or two convolutions a stage.

    v1 keeps the last convolution of the deepest stage, and of each stage of the decoder, in a list of its own. It has
    no biases in `tu` and `seg_outputs`; the network's are set to zero.
    """
    renamed: dict[str, Tensor] = {}
    twice = len(network.decoder.stages[0].convs) == 2
    deepest = len(network.encoder.stages) - 1
    for name, value in network.state_dict().items():
        if ".all_modules." in name or name.startswith("decoder.encoder."):
            continue
        part, kind, stage, *rest = name.split(".")
        inner = ".".join(rest).removeprefix("0.").replace("norm.", "instnorm.")
        inner = re.sub(r"convs\.(\d)", r"blocks.\1", inner)
        in_groups = re.sub(r"blocks\.(\d)", r"\1.blocks.0", inner) if twice else f"0.{inner}"
        if kind in ("transpconvs", "seg_layers"):
            if rest == ["bias"]:
                value.zero_()
            else:
                renamed[f"{'tu' if kind == 'transpconvs' else 'seg_outputs'}.{stage}.weight"] = value
        elif part == "encoder":
            renamed[f"conv_blocks_context.{stage}.{in_groups if int(stage) == deepest else inner}"] = value
        else:
            renamed[f"conv_blocks_localization.{stage}.{in_groups}"] = value
    return renamed


def as_published_fmunet(network: FMUNet) -> dict[str, Tensor]:
    """The names that the published code gives the weights of an FMUNet; its decoder counts from fine to coarse."""
    names = (
        (r"encoder\.stem\.", "project."),
        (r"encoder\.stages\.(\d)\.convs\.", r"encoder.en_conv\1.conv_list."),
        (r"encoder\.downs\.(\d)\.", r"encoder.down\1.down."),
        (r"decoder\.bottleneck\.convs\.", "decoder.de_conv4.conv_list."),
        (r"decoder\.stages\.(\d)\.convs\.", "decoder.de_conv{}.conv_list."),
        (r"decoder\.merges\.(\d)\.reduce\.", "decoder.upcat{}.up."),
        (r"decoder\.merges\.(\d)\.merge\.", "decoder.upcat{}.conv."),
        (r"decoder\.seg_layers\.(\d)\.", "out_layers.{}.2."),
        (r"decoder\.pre_seg\.(\d)\.", "out_layers.{}."),
    )
    renamed = {}
    for name, value in network.state_dict().items():
        pattern, theirs = next(pair for pair in names if re.match(pair[0], name))
        stage = re.match(pattern, name)
        assert stage is not None
        mirrored = theirs.format(3 - int(stage[1])) if "{}" in theirs else theirs
        renamed[re.sub(pattern, mirrored, name)] = value
    return renamed


def version_1_plans(array: Any = np.array) -> dict[str, Any]:
    """The plans of nnU-Net v1 for a CT dataset with two stages, as its pickles hold them."""
    window = {"median": 88.0, "mean": 87.3, "sd": 359.0, "mn": -1024.0, "mx": 3000.0}
    window |= {"percentile_99_5": np.float64(1098.0), "percentile_00_5": np.float32(-941.0)}
    stages = {
        stage: {"batch_size": 2, "patch_size": array([128, 128, 128]), "current_spacing": array([mm, mm, mm])}
        for stage, mm in enumerate((3.0, 1.5))
    }
    return {
        "num_modalities": 1,
        "modalities": {0: "CT"},
        "normalization_schemes": OrderedDict({0: "CT"}),
        "use_mask_for_norm": OrderedDict({0: False}),
        "dataset_properties": {"intensityproperties": OrderedDict({0: OrderedDict(window)}), "all_classes": [1]},
        "preprocessed_data_folder": "/data/nnUNet_preprocessed/Task251_Organs",
        "transpose_forward": [0, 1, 2],
        "plans_per_stage": OrderedDict(stages),
    }
