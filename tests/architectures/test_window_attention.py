"""Window attention: partition, relative positions, masks, and blocks in a larger context."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_misfm.architectures.window_attention import (
    SwinBlock,
    fit_window,
    merge_windows,
    partition_windows,
    relative_position_index,
    shifted_window_mask,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(6, 6, 6), (12, 6, 18), (7, 13, 5), (1, 2, 3)])
def test_merging_undoes_partitioning_and_so_do_the_gradients(size: tuple[int, int, int], shift: int) -> None:
    x = torch.randn(2, *size, 3, requires_grad=True)
    windows, padded = partition_windows(x, 3, shift)
    assert windows.shape[2] == 27 and all(n % 3 == 0 for n in padded)
    merged = merge_windows(windows, 3, shift, padded, size)
    assert torch.equal(merged, x)
    weights = torch.randn_like(x)
    (merged * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_windows_are_cubes_that_start_at_the_shift_and_go_on_at_the_near_end() -> None:
    x = torch.arange(4 * 4 * 6).view(1, 4, 4, 6, 1).float()
    windows, _ = partition_windows(x, 2, 1)
    rolled = torch.roll(x, (-1, -1, -1), (1, 2, 3))
    cubes = [
        rolled[0, i : i + 2, j : j + 2, k : k + 2].reshape(8, 1)
        for i in range(0, 4, 2)
        for j in range(0, 4, 2)
        for k in range(0, 6, 2)
    ]
    assert torch.equal(windows[0], torch.stack(cubes))


def test_small_maps_shrink_the_window_and_drop_the_shift() -> None:
    assert fit_window((12, 12, 12), 6) == (6, 3)
    assert fit_window((6, 12, 12), 6) == (6, 0)
    assert fit_window((3, 4, 3), 6) == (3, 0)


def test_relative_positions_are_told_apart() -> None:
    index = relative_position_index(3, 3, CPU)
    position = torch.stack(torch.meshgrid(*[torch.arange(3)] * 3, indexing="ij")).flatten(1).T
    offsets = {}
    for q in range(27):
        for k in range(27):
            offsets.setdefault(tuple((position[q] - position[k]).tolist()), set()).add(int(index[q, k]))
    assert len(offsets) == 125 and all(len(rows) == 1 for rows in offsets.values())
    assert len(set.union(*offsets.values())) == 125


def test_a_smaller_window_uses_the_centre_of_the_table() -> None:
    small, full = relative_position_index(2, 4, CPU), relative_position_index(4, 4, CPU)
    inside = [(x * 4 + y) * 4 + z for x in range(2) for y in range(2) for z in range(2)]
    assert torch.equal(small, full[inside][:, inside])


def test_mask_separates_exactly_what_the_shift_brought_together() -> None:
    mask = shifted_window_mask((4, 4, 4), 2, 1, CPU)
    regions = torch.zeros(4, 4, 4)
    for axis in range(3):
        regions.select(axis, 3).add_(10**axis)
    ids = partition_windows(regions[None, ..., None], 2, 0)[0][0, :, :, 0]
    assert torch.equal(torch.isinf(mask), ids[:, None, :] != ids[:, :, None])


@pytest.mark.parametrize(("shifted", "start"), [(False, 3), (True, 1)])
def test_a_block_gives_a_window_the_same_result_in_a_larger_context(shifted: bool, start: int) -> None:
    """Windows of the shifted block begin half a window earlier; a region aligned with them sees nothing else."""
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 3, shifted, 0.0, 0.0, 2.0).eval()
    aligned = SwinBlock(8, 2, 3, False, 0.0, 0.0, 2.0).eval()
    aligned.load_state_dict(block.state_dict())
    x = torch.randn(1, 9, 12, 9, 8)
    region = slice(start, start + 3)
    with torch.no_grad():
        context = block(x)[:, region, region, region]
        alone = aligned(x[:, region, region, region])
    torch.testing.assert_close(context, alone)


def test_inference_mode_does_not_spoil_later_training() -> None:
    """Masks and indices are remembered per shape; one made for prediction must still serve training."""
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 4, True, 0.0, 0.0, 2.0)
    x = torch.randn(1, 11, 9, 10, 8)
    with torch.inference_mode():
        block.eval()(x)
    block.train()(x).sum().backward()
    assert block.attention.relative_position_bias_table.grad is not None


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 4, False, 0.0, 0.5, 2.0).train()
    branch = torch.ones(4000, 1, 1, 1, 2)
    dropped = block._add(torch.ones_like(branch), branch) - 1
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(dropped.mean().item() - 1) < 0.05


@pytest.mark.parametrize("shifted", [False, True])
def test_fused_attention_gets_what_its_kernels_take(shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last axis of a tensor is not dense PyTorch falls back to one that fills memory, and says nothing."""
    calls = []

    def record(*tensors: torch.Tensor, attn_mask: torch.Tensor, dropout_p: float) -> torch.Tensor:
        calls.append((*tensors, attn_mask))
        return tensors[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    block = SwinBlock(16, 2, 4, shifted, 0.0, 0.0, 2.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 8, 8, 12, 16))
    windows = 2 * 2 * 3
    assert [query.shape for query, *_ in calls] == [(windows, 2, 64, 8)] * 2 if shifted else [(2 * windows, 2, 64, 8)]
    for *qkv, bias in calls:
        assert all(tensor.stride(-1) == 1 and tensor.dtype == torch.bfloat16 for tensor in (*qkv, bias))
        assert bias.shape == (windows if shifted else 1, 2, 64, 64) and bias.requires_grad
