"""Norm, activation and convolution as one step give what the three modules give one after the other."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from nnunetv2_misfm.architectures import kernels
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.norm_act_conv import NormActConvSequential


def modules(conv: nn.Module, slope: float, dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    norm, act = nn.BatchNorm3d(4), nn.PReLU(init=slope)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return [nn.MaxPool3d((1, 2, 2)), norm, act, *([Dropout(dropout)] if dropout else []), conv]


CONVS = [nn.Conv3d(4, 3, 3, padding=1), nn.Conv3d(4, 3, (1, 3, 3)), nn.ConvTranspose3d(4, 3, (1, 2, 2), (1, 2, 2))]
CONVS += [nn.Conv3d(4, 3, 1, bias=False)]


@pytest.fixture(params=[True, False], ids=["kernels for the CPU", "kernels for any device"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(kernels, "switched_off", {kernels.ONE_KEPT_MAP_CPU})


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_outputs_gradients_and_statistics(conv: nn.Module, slope: float, memory: torch.memory_format) -> None:
    ours = NormActConvSequential(*deepcopy(modules(conv, slope)))
    plain = nn.Sequential(*deepcopy(modules(conv, slope)))
    inputs = [torch.randn(2, 4, 3, 8, 6, generator=torch.Generator().manual_seed(1)) * 3 + 10 for _ in range(2)]
    inputs = [x.to(memory_format=memory).requires_grad_() for x in inputs]
    for net, x in zip((ours, plain), inputs, strict=True):
        for _ in range(2):
            output = net(x)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        net.last = net(x)
    torch.testing.assert_close(ours.last, plain.last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 4, 3, 8, 10)[..., 1:-3],
        torch.randn(2, 8, 3, 8, 6).to(memory_format=torch.channels_last_3d)[:, :4],
        torch.randn(2, 6, 3, 8, 4).transpose(1, 4),
    ],
    ids=["a slice", "some of the channels", "axes in another order"],
)
def test_inputs_with_gaps_or_another_order_in_memory(x: torch.Tensor, training: bool) -> None:
    layers = modules(nn.Conv3d(4, 3, 1), 0.25)[1:]
    ours, plain = (kind(*deepcopy(layers)).train(training) for kind in (NormActConvSequential, nn.Sequential))
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours[0].running_var, plain[0].running_var)


def test_a_single_value_per_channel_is_an_error_not_a_variance_of_nan() -> None:
    layers = NormActConvSequential(*modules(nn.Conv3d(4, 3, 1), 0.25)[1:])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layers(torch.randn(1, 4, 1, 1, 1))
    assert torch.isfinite(layers[0].running_var).all()


def test_evaluation_with_and_without_gradients_and_frozen_statistics() -> None:
    ours, plain = (
        kind(*deepcopy(modules(CONVS[0], 0.25, 0.5))).eval() for kind in (NormActConvSequential, nn.Sequential)
    )
    x = torch.randn(1, 4, 3, 8, 6)
    kept = x.clone()
    torch.testing.assert_close(ours(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    assert torch.equal(x, kept)


def test_gradients_with_dropout_are_those_of_the_recorded_mask() -> None:
    """In float64 against finite differences; the mask is the same each time because the seed is."""
    net = NormActConvSequential(*modules(nn.Conv3d(4, 2, (1, 3, 3)), 0.3, 0.5)).double()
    x = torch.randn(1, 4, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return net(x)

    assert torch.autograd.gradcheck(run, (x,))


@pytest.mark.parametrize("inside", [True, False], ids=["all under autocast", "only the forward pass"])
def test_autocast_gives_what_the_modules_give(inside: bool) -> None:
    layers = modules(nn.Conv3d(4, 3, 3, padding=1), 0.25)[1:]
    grads = []
    for kind in (NormActConvSequential, nn.Sequential):
        net = kind(*deepcopy(layers))
        x = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
            assert output.dtype == torch.bfloat16
            if inside:
                output.float().square().sum().backward()
        if not inside:
            output.float().square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    for ours, plain in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("frozen_norm", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_feature_map_is_kept_instead_of_three(compiled: bool, frozen_norm: bool) -> None:
    net: nn.Module = NormActConvSequential(*modules(nn.Conv3d(4, 4, 3, padding=1), 0.25)[1:])
    net[0].train(not frozen_norm)
    if compiled:
        net = torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(1, 4, 8, 16, 16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    assert sum(size >= x.numel() for size in kept.values()) == 1


def test_compiled_gradients_and_statistics() -> None:
    layers = modules(nn.Conv3d(4, 3, 3, padding=1), 0.25)
    plain, ours = nn.Sequential(*deepcopy(layers)), NormActConvSequential(*deepcopy(layers))
    compiled = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(2, 4, 3, 8, 6) * 3 + 10
    for net in (plain, compiled):
        net(x).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_hooks_are_called_and_what_they_see_lasts() -> None:
    layers = modules(nn.Conv3d(4, 4, 3, padding=1), 0.25)[1:]
    ours, plain = (NormActConvSequential(*deepcopy(layers), *deepcopy(layers)).eval() for _ in range(2))
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(ours):
        layer.register_forward_hook(lambda _, inputs, output, index=index: seen.__setitem__(index, output))
    x = torch.randn(1, 4, 3, 8, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    assert len(seen) == len(ours)
    for index, output in seen.items():
        torch.testing.assert_close(output, nn.Sequential(*list(plain)[: index + 1])(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_without_running_statistics(training: bool) -> None:
    layers = modules(nn.Conv3d(4, 3, 3, padding=1), 0.25)[1:]
    layers[0] = nn.BatchNorm3d(4, track_running_stats=False)
    ours, plain = (kind(*layers).train(training) for kind in (NormActConvSequential, nn.Sequential))
    x = torch.randn(2, 4, 3, 8, 6)
    torch.testing.assert_close(ours(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))


def test_types_of_different_sizes_share_the_scratch_memory() -> None:
    layers = modules(nn.Conv3d(5, 3, 3, padding=1), 0.25)[2:]
    net = NormActConvSequential(nn.BatchNorm3d(5), *layers)
    net(torch.randn(1, 5, 5, 5, 5))
    x = torch.randn(1, 5, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(net.double()(x), nn.Sequential(*net)(x))
