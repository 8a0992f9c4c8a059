"""A module that was replaced or is watched is called, in training as in prediction, and its parameters learn."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.norm_act_conv import NormActConvSequential
from nnunetv2_misfm.architectures.resolution import strides_of

LEAVES = (nn.Conv3d, nn.ConvTranspose3d, nn.Linear, nn.BatchNorm3d, nn.InstanceNorm3d, nn.LayerNorm, nn.PReLU)
LEAVES += (nn.LeakyReLU, nn.GELU, nn.MaxPool3d, Dropout)


class Adapter(nn.Module):
    """Calls what it stands in front of; its own parameter is 0 at first."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.learned = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.module(x) * (1 + self.learned)


def network(kind: type[PCTNet | FMUNet]) -> PCTNet | FMUNet:
    torch.manual_seed(0)
    nothing_at_random = {"dropout_per_stage": (0.0,) * 5, **({"drop_path": 0.0} if kind is PCTNet else {})}
    return kind(1, 3, strides_of(1), (4, 4, 8, 16, 32), **nothing_at_random)


def adapted(network: nn.Module) -> list[Adapter]:
    adapters = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LEAVES) and not isinstance(parent, Adapter):
                setattr(parent, name, Adapter(child))
                adapters.append(getattr(parent, name))
    return adapters


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [PCTNet, FMUNet])
def test_adapters_around_all_layers_are_called_once_and_learn(kind: type[PCTNet | FMUNet], training: bool) -> None:
    plain = network(kind).train(training)
    ours = deepcopy(plain)
    adapters = adapted(ours)
    x = torch.randn(2, 1, 16, 32, 32)
    with torch.set_grad_enabled(training):
        outputs, expected = ours(x), plain(x)
    assert {adapter.calls for adapter in adapters} == {1}
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if training:
        sum(output.square().mean() for output in outputs).backward()
        assert [adapter.module for adapter in adapters if adapter.learned.grad is None] == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [PCTNet, FMUNet])
def test_hooks_of_all_modules_are_called_once(kind: type[PCTNet | FMUNet], training: bool) -> None:
    net = network(kind).train(training)
    calls: dict[str, int] = {}
    for name, module in net.named_modules():
        if type(module).forward is not nn.Module.forward:
            calls[name] = 0
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    with torch.set_grad_enabled(training):
        net(torch.randn(2, 1, 16, 32, 32))
    assert [name for name, count in calls.items() if count != 1] == []


class LowRank(nn.Conv3d):
    """A subclass of Conv3d with a learned part of its own."""

    def __init__(self, *arguments: int, **options: int):
        super().__init__(*arguments, **options)
        self.learned = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.learned)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(layers: nn.Sequential) -> None:
    for index in range(len(layers)):
        if hasattr(layers[index], "weight"):
            parametrize.register_parametrization(layers[index], "weight", Twice())


def other_forward(layers: nn.Sequential) -> None:
    original = layers[3].forward
    layers[3].forward = lambda x: 3 * original(x)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "nothing": lambda layers: None,
    "subclass": lambda layers: layers.__setitem__(3, LowRank(4, 4, 3, padding=1)),
    "parametrizations": parametrized,
    "weight norm": lambda layers: parametrizations.weight_norm(layers[3]),
    "weight norm with a hook": lambda layers: nn.utils.weight_norm(layers[3]),
    "pruning": lambda layers: prune.l1_unstructured(layers[3], "weight", 0.5),
    "another forward": other_forward,
    "another norm": lambda layers: layers.__setitem__(0, nn.InstanceNorm3d(4, affine=True)),
    "another activation": lambda layers: layers.__setitem__(1, nn.GELU()),
    "slopes per channel": lambda layers: layers.__setitem__(1, nn.PReLU(4)),
    "another dropout": lambda layers: layers.__setitem__(2, nn.Identity()),
    "reflected borders": lambda layers: layers.__setitem__(3, nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect")),
    "padding by name": lambda layers: layers.__setitem__(3, nn.Conv3d(4, 4, 3, padding="same")),
    "no activation": lambda layers: layers.__delitem__(1),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_do_what_they_do_one_after_the_other(change: str, compiled: bool) -> None:
    torch.manual_seed(0)
    ours = NormActConvSequential(nn.BatchNorm3d(4), nn.PReLU(), Dropout(0.0), nn.Conv3d(4, 4, 3, padding=1))
    CHANGES[change](ours)
    x = torch.randn(2, 4, 4, 6, 6)
    for training in (True, False):
        ours.train(training)
        with torch.set_grad_enabled(training):
            expected = x
            for module in ours:
                expected = module(expected)
            run = torch.compile(ours, dynamic=False, backend="aot_eager") if compiled else ours
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()  # each change is compiled anew, and the compiler counts how often that happens
    ours.train()(x).square().mean().backward()
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is None] == []


def test_what_an_earlier_module_returned_is_not_written_over() -> None:
    """An adapter may keep its output or return its input."""
    ours = NormActConvSequential(nn.Identity(), nn.BatchNorm3d(4), nn.PReLU(), nn.Conv3d(4, 4, 1)).eval()
    x = torch.randn(2, 4, 4, 6, 6)
    kept = x.clone()
    with torch.no_grad():
        ours(x)
    assert torch.equal(x, kept)
