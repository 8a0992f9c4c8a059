"""Dropout: share of dropped elements, expectation, independence."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.kernels import keep_mask


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_share_and_expectation(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(200_001)
    dropped = Dropout(p).train()(x)
    assert abs((dropped == 0).float().mean().item() - p) < 0.005
    assert abs(dropped.mean().item() - 1) < 0.01


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    keep, _ = keep_mask(torch.empty(400_000), 0.5)
    centred = keep.float() - 0.5
    for lag in (1, 2, 4, 8, 64):
        assert abs((centred[:-lag] * centred[lag:]).mean().item()) < 0.002


def test_off_in_evaluation_and_at_zero() -> None:
    x = torch.randn(7, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_follows_the_seed() -> None:
    x = torch.ones(1000)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(Dropout(0.3).train()(x))
    assert torch.equal(*draws)


def test_probabilities_outside_the_range_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0 up to 1"):
        Dropout(1.0)


def test_in_place_gives_the_same_values_and_gradients() -> None:
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        x = torch.ones(1000, requires_grad=True)
        y = Dropout(0.3, inplace)(x * 2)
        y.sum().backward()
        results += [y.detach(), x.grad]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
