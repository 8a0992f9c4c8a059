"""FMUNet: shapes, padding, deep supervision, checkpointing."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_misfm.architectures import FMUNet
from nnunetv2_misfm.architectures.resolution import strides_of


def network(anisotropy: int, **changes: object) -> FMUNet:
    torch.manual_seed(0)
    return FMUNet(2, 3, strides_of(anisotropy), (4, 4, 8, 8, 8), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("anisotropy", [0, 1, 2])
@pytest.mark.parametrize("size", [(32, 32, 48), (17, 33, 20), (5, 40, 56)])
def test_output_has_the_size_of_the_input(anisotropy: int, size: tuple[int, int, int]) -> None:
    net = network(anisotropy).eval()
    with torch.no_grad():
        outputs = net(torch.randn(1, 2, *size))
        net.decoder.deep_supervision = False
        single = net(torch.randn(1, 2, *size))
    assert len(outputs) == 4 and tuple(outputs[0].shape) == tuple(single.shape) == (1, 3, *size)


def test_segmentation_layers_run_from_coarse_to_fine_as_in_nnunet() -> None:
    assert [layer.in_channels for layer in network(1).decoder.seg_layers] == [8, 8, 4, 4]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_parameter_gets_the_same_gradient_with_checkpointing(compiled: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        net = network(1, dropout_per_stage=(0.0,) * 5, checkpointing=checkpointing).train()
        run = torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else net
        torch.manual_seed(1)
        sum(o.square().mean() for o in run(torch.randn(1, 2, 16, 32, 32))).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(g is not None for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
