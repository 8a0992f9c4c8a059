"""Each way of adapting a parameter keeps what it computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_misfm.transfer.adaptation import fit_bias_table, fit_input_channels, fit_kernel, fit_upsampling_kernel


def same_along_depth(shape: tuple[int, ...], depth: int) -> torch.Tensor:
    return torch.randn(*shape[:2], 1, *shape[3:], dtype=torch.float64).expand(-1, -1, depth, -1, -1)


def test_a_larger_kernel_is_the_same_convolution() -> None:
    weight, x = torch.randn(4, 3, 1, 3, 3), torch.randn(1, 3, 6, 8, 8)
    larger = fit_kernel(weight, (3, 3, 3))
    assert larger is not None
    assert torch.allclose(F.conv3d(x, larger, padding=1), F.conv3d(x, weight, padding=(0, 1, 1)), atol=1e-5)


def test_a_flattened_kernel_gives_the_same_where_slices_are_equal() -> None:
    weight = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64)
    x = same_along_depth((1, 3, 6, 8, 8), 6)
    flat = fit_kernel(weight, (1, 3, 3))
    assert flat is not None
    inside = F.conv3d(x, weight, padding=1)[:, :, 1:-1]
    assert torch.allclose(F.conv3d(x, flat, padding=(0, 1, 1))[:, :, 1:-1], inside)


def test_an_axis_upsampled_anew_repeats_and_back_again_averages() -> None:
    weight, x = torch.randn(4, 3, 1, 2, 2), torch.randn(1, 4, 5, 6, 6)
    larger = fit_upsampling_kernel(weight, (2, 2, 2))
    assert larger is not None
    flat = F.conv_transpose3d(x, weight, stride=(1, 2, 2))
    assert torch.allclose(F.conv_transpose3d(x, larger, stride=2), flat.repeat_interleave(2, 2), atol=1e-5)
    assert torch.equal(fit_upsampling_kernel(larger, (1, 2, 2)), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("have", "want"), [((5, 5, 5), (3, 3, 3)), ((2, 2, 2), (3, 3, 3))])
def test_kernels_that_would_lose_something_are_refused(have: tuple[int, ...], want: tuple[int, ...]) -> None:
    assert fit_kernel(torch.randn(2, 2, *have), want) is None


def test_upsampling_between_other_strides_is_refused() -> None:
    assert fit_upsampling_kernel(torch.randn(2, 2, 2, 2, 2), (3, 2, 2)) is None


@pytest.mark.parametrize(("source_channels", "images"), [(1, 3), (3, 1), (2, 4)])
def test_other_input_channels_keep_the_response_to_a_repeated_image(source_channels: int, images: int) -> None:
    weight, x = torch.randn(4, source_channels, 3, 3, 3), torch.randn(1, 1, 6, 6, 6)
    fitted = fit_input_channels(weight, images, images)
    before = F.conv3d(x.expand(-1, source_channels, -1, -1, -1), weight)
    assert torch.allclose(F.conv3d(x.expand(-1, images, -1, -1, -1), fitted), before, atol=1e-4)


def test_label_channels_of_a_cascade_start_at_zero() -> None:
    weight = torch.randn(4, 1, 3, 3, 3)
    fitted = fit_input_channels(weight, 1, 3)
    assert torch.equal(fitted[:, :1], weight) and fitted[:, 1:].abs().sum() == 0


def test_a_bias_table_keeps_the_values_at_the_centre_and_the_farthest_offsets() -> None:
    table = torch.randn(7**3, 2)
    larger = fit_bias_table(table, 11**3)
    assert larger is not None
    a, b = table.reshape(7, 7, 7, 2), larger.reshape(11, 11, 11, 2)
    assert torch.allclose(a[3, 3, 3], b[5, 5, 5], atol=1e-6) and torch.allclose(a[0, 6, 0], b[0, 10, 0], atol=1e-6)
    assert torch.allclose(fit_bias_table(table, 7**3), table, atol=1e-6)  # type: ignore[arg-type]


def test_a_bias_table_keeps_the_axes_apart() -> None:
    slope = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 7, 7, 2).reshape(-1, 2)
    larger = fit_bias_table(slope, 11**3)
    assert larger is not None
    assert torch.allclose(larger.reshape(11, 11, 11, 2)[:, 4, 2, 1], torch.linspace(0, 6, 11), atol=1e-5)
    assert fit_bias_table(slope, 10**3) is None
