"""Networks as TorchScript, in which they are run without Python: traced, saved, loaded, and the same."""

from __future__ import annotations

import io

import pytest
import torch

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("size", [(16, 16, 32), (32, 32, 32)], ids=["small windows", "shifted windows"])
@pytest.mark.parametrize("network_class", [PCTNet, FMUNet])
def test_a_traced_network_can_be_saved_and_is_the_same(
    network_class: type[PCTNet | FMUNet], size: tuple[int, int, int], grad: bool
) -> None:
    torch.manual_seed(0)
    arguments = {"strides": strides_of(0), "features_per_stage": (4, 4, 8, 16, 32), "deep_supervision": False}
    network = network_class(1, 3, **arguments).eval()  # type: ignore[arg-type]
    file = io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(network, torch.randn(1, 1, *size)), file)
        file.seek(0)
        x = torch.randn(1, 1, *size)
        torch.testing.assert_close(torch.jit.load(file)(x), network(x), atol=1e-5, rtol=1e-5)
