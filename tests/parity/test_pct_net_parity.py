"""PCT-Net gives the published network's outputs and gradients with the published network's weights."""

from __future__ import annotations

import pytest
import torch
from parity.reference import load, recorded_noise, recorded_weights, reference_folder, relative_error

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.foreign import PUBLISHED_PCTNET
from nnunetv2_misfm.checkpoints.published_weights import convert_pctnet
from nnunetv2_misfm.checkpoints.source import read_source

pytestmark = pytest.mark.real_data
SMALL = ["pctnet_small_mode0", "pctnet_small_mode0_narrow", "pctnet_small_mode1", "pctnet_small_mode2"]


def network(description: dict) -> PCTNet:
    parameters = description["params"]
    degree = parameters["resolution_mode"]
    net = PCTNet(
        parameters["in_chns"],
        parameters["class_num"],
        strides_of(degree),
        parameters["feature_chns"],
        dropout_per_stage=parameters["dropout"],
    )
    net.load_state_dict(convert_pctnet(recorded_weights(description), [degree]))
    return net.eval()


@pytest.mark.parametrize("name", [*SMALL, "pctnet_full_mode1"])
def test_outputs(name: str) -> None:
    description, recorded = load(name)
    stride = description["output0_stride"]
    with torch.no_grad():
        outputs = network(description)(recorded_noise(tuple(description["input_shape"])))
    outputs[0] = outputs[0][:, :, ::stride, ::stride, ::stride]
    assert [relative_error(a, b) < 1e-4 for a, b in zip(outputs, recorded, strict=True)] == [True] * 4


@pytest.mark.parametrize("name", [*SMALL])
def test_outputs_are_the_same_in_training_code(name: str) -> None:
    """Training on the CPU computes attention step by step, prediction with a fused kernel."""
    description, recorded = load(name)
    outputs = network(description)(recorded_noise(tuple(description["input_shape"])))
    assert max(relative_error(a, b) for a, b in zip(outputs[1:], recorded[1:], strict=True)) < 1e-4


@pytest.mark.parametrize("name", ["pctnet_small_mode1", "pctnet_small_mode0_narrow"])
def test_an_imported_file_gives_the_recorded_outputs(name: str) -> None:
    description, recorded = load(name)
    source = read_source(reference_folder() / f"{name}.pt")
    assert source.kind is PUBLISHED_PCTNET and source.info is not None
    arguments = dict(source.info.arch_kwargs, strides=strides_of(description["params"]["resolution_mode"]))
    net = PCTNet(source.info.input_channels, source.info.num_classes, **arguments).eval()
    net.load_state_dict(source.weights)
    with torch.no_grad():
        outputs = net(recorded_noise(tuple(description["input_shape"])))
    assert max(relative_error(a, b) for a, b in zip(outputs[1:], recorded[1:], strict=True)) < 1e-4
