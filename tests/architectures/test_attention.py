"""Attention: the CPU's training path against the plain formula and against PyTorch's fused attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunetv2_misfm.architectures import kernels
from nnunetv2_misfm.architectures.window_attention import attend

BATCH, WINDOWS, HEADS, TOKENS, CHANNELS = 2, 3, 2, 5, 4


@pytest.fixture(autouse=True, params=[1, 120, 10**6], ids=["one window at a time", "some", "all at once"])
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ELEMENTS_AT_A_TIME", request.param)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    qkv = [torch.randn(BATCH * WINDOWS, HEADS, TOKENS, CHANNELS, dtype=dtype, requires_grad=True) for _ in range(3)]
    return [*qkv, torch.randn(HEADS, TOKENS, TOKENS, dtype=dtype, requires_grad=True)]


def shift_mask(dtype: torch.dtype = torch.float64) -> Tensor:
    mask = torch.zeros(WINDOWS, TOKENS, TOKENS, dtype=dtype)
    mask[1, :2, 2:] = mask[1, 2:, :2] = mask[2, 0, 1:] = float("-inf")
    return mask


def formula(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    logits = query @ key.transpose(-2, -1) / CHANNELS**0.5 + bias
    if mask is not None:
        logits = logits + mask[:, None].repeat(BATCH, 1, 1, 1)
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients(masked: bool) -> None:
    mask = shift_mask() if masked else None
    ours, plain = inputs(), inputs()
    results = [attend(*ours, mask, 0.0), formula(*plain, mask)]
    with torch.no_grad():
        results.append(attend(*ours, mask, 0.0))
    for result in results[:2]:
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradients_with_dropout_are_those_of_the_recorded_mask() -> None:
    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(*tensors, shift_mask(), 0.25)

    assert torch.autograd.gradcheck(run, tuple(inputs()))


def test_dropout_keeps_the_expectation() -> None:
    tensors = inputs(torch.float32)
    mean = sum(attend(*tensors, None, 0.25).detach() for _ in range(1000)) / 1000
    torch.testing.assert_close(mean, formula(*tensors, None).detach(), rtol=0.1, atol=0.1)
