"""FMUNet gives the published network's outputs and gradients with the published network's weights."""

from __future__ import annotations

import pytest
import torch
from parity.reference import load, recorded_noise, recorded_weights, reference_folder, relative_error

from nnunetv2_misfm.architectures import FMUNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.published_weights import convert_fmunet
from nnunetv2_misfm.checkpoints.source import read_source

pytestmark = pytest.mark.real_data


def outputs_of(net: FMUNet, description: dict) -> list[torch.Tensor]:
    outputs = net.eval()(recorded_noise(tuple(description["input_shape"])))
    stride = description["output0_stride"]
    return [outputs[0][:, :, ::stride, ::stride, ::stride], *outputs[1:]]


@pytest.mark.parametrize("name", ["fmunet_small_mode0", "fmunet_small_mode1"])
def test_outputs(name: str) -> None:
    description, recorded = load(name)
    parameters = description["params"]
    net = FMUNet(
        parameters["in_chns"], parameters["class_num"], strides_of(parameters["res_mode"]), parameters["feature_chns"]
    )
    net.load_state_dict(convert_fmunet(recorded_weights(description)))
    assert max(relative_error(a, b) for a, b in zip(outputs_of(net, description), recorded, strict=True)) < 1e-4


def test_an_imported_file_gives_the_recorded_outputs() -> None:
    description, recorded = load("fmunet_small_mode0")
    source = read_source(reference_folder() / "fmunet_small_mode0.pt")
    assert source.info is not None
    net = FMUNet(source.info.input_channels, source.info.num_classes, **source.info.arch_kwargs)
    net.load_state_dict(source.weights)
    assert max(relative_error(a, b) for a, b in zip(outputs_of(net, description), recorded, strict=True)) < 1e-4
