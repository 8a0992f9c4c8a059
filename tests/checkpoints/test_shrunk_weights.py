from collections.abc import Callable

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.shrunk_weights import shrunk_weights
from nnunetv2_misfm.pretrain.planning import plain_unet_entry


def unet() -> nn.Module:
    entry = plain_unet_entry((1, 1, 1), (24, 32, 24))
    names = ("network_class_name", "arch_kwargs", "_kw_requires_import")
    return get_network_from_plans(*(entry[name] for name in names), 1, 5)


@pytest.mark.parametrize(
    "network",
    [
        lambda: PCTNet(1, 5, strides_of(0), (4, 8, 16, 32, 64)),
        lambda: FMUNet(1, 5, strides_of(0), (4, 8, 16, 32, 64)),
        unet,
    ],
)
def test_no_network_is_drawn_shrunk(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert shrunk_weights(network().state_dict()) is None


def test_parts_are_named_with_their_share() -> None:
    network = PCTNet(1, 5, strides_of(0), (4, 8, 16, 32, 64))
    with torch.no_grad():
        attention = network.encoder.stage4.swin[0].attention
        attention.qkv.weight.mul_(0.02)
        attention.proj.weight.zero_()
    found = shrunk_weights(network.state_dict())
    assert found is not None and found.startswith("encoder.stage4 (2 of ")
    assert shrunk_weights(dict(network.named_parameters())) == found


def test_adam_with_decay_shrinks_what_has_no_gradient_and_adamw_does_not() -> None:
    found = {}
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        torch.manual_seed(0)
        network = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
        optimizer = kind(network.parameters(), lr=1e-2, weight_decay=1e-5)
        for _ in range(200):
            optimizer.zero_grad()
            data = torch.randn(8, 4)
            (network["used"](data) - data).square().mean().backward()
            network["unused"].weight.grad = torch.zeros(4, 4)
            optimizer.step()
        found[kind] = shrunk_weights(network.state_dict())
    assert found == {torch.optim.Adam: "unused.weight (1 of 1)", torch.optim.AdamW: None}
