"""Windowed multi-head self-attention in 3D with relative position bias, and the Swin block built on it.

Token tensors are (B, X, Y, Z, C): spatial axes in plans axis order, features last. Windows are cubes.

Source of the method: Swin Transformer (arXiv 2103.14030) in the 3D form of MIS-FM (arXiv 2306.16925, reference file
`net/transformer.py`). One thing differs on purpose: the bias table always holds every offset of the full window, and a
smaller window indexes into its centre, so that no parameter depends on the patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_misfm.architectures import kernels
from nnunetv2_misfm.architectures.dropout import Dropout

Size3 = tuple[int, int, int]


def fit_window(size: Size3, window_size: int) -> tuple[int, int]:
    """The window edge and the shift of shifted blocks for a feature map of `size` voxels.

    A map whose smallest axis does not exceed the window is cut into cubes of that axis' length, unshifted; otherwise
    the full window is used and shifted blocks move by half of it.
    """
    smallest = min(size)
    if smallest <= window_size:
        return smallest, 0
    return window_size, window_size // 2


def partition_windows(x: Tensor, window: int, shift: int) -> tuple[Tensor, Size3]:
    """Cut (B, X, Y, Z, C) into windows that start `shift` voxels into the map and go on at its near end.

    Where windows do not fit, the far ends are padded with zero tokens first; these take part in the shift and in
    attention, as in the reference.

    Returns:
        (B, number of windows, window**3, C) and the padded size, which `merge_windows` needs.
    """
    batch, *size, channels = x.shape
    pads = [-length % window for length in size]
    if any(pads):
        x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
    padded = (size[0] + pads[0], size[1] + pads[1], size[2] + pads[2])
    if shift:
        x = torch.roll(x, (-shift,) * 3, (1, 2, 3))
    nx, ny, nz = (length // window for length in padded)
    x = x.reshape(batch, nx, window, ny, window, nz, window, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, nx * ny * nz, window**3, channels), padded


def merge_windows(windows: Tensor, window: int, shift: int, padded: Size3, size: Size3) -> Tensor:
    """Undo `partition_windows`: (B, number of windows, window**3, C) to (B, X, Y, Z, C) of `size`."""
    batch, _, _, channels = windows.shape
    nx, ny, nz = (length // window for length in padded)
    x = windows.view(batch, nx, ny, nz, window, window, window, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(batch, *padded, channels)
    if shift:
        x = torch.roll(x, (shift,) * 3, (1, 2, 3))
    return x[:, : size[0], : size[1], : size[2]]


def relative_position_index(window: int, table_window: int, device: torch.device) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window: (window**3, window**3) int64.

    The table lists the offsets query − key of a window of edge `table_window`, the last axis fastest; a smaller window
    only needs its central part.
    """
    steps = torch.arange(window, device=device)
    position = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).flatten(1)  # (3, window**3)
    offset = position[:, :, None] - position[:, None, :] + (table_window - 1)
    span = 2 * table_window - 1
    return (offset[0] * span + offset[1]) * span + offset[2]


def shifted_window_mask(padded: Size3, window: int, shift: int, device: torch.device) -> Tensor:
    """Additive mask of a cyclically shifted map: (number of windows, window**3, window**3), 0 or −inf.

    After the shift the last window of each axis holds voxels from both ends of the volume, which must not attend to
    each other.
    """
    regions = torch.zeros(padded, device=device)
    for axis, length in enumerate(padded):
        wrapped = (torch.arange(length, device=device) >= length - shift).float()
        shape = [1, 1, 1]
        shape[axis] = length
        # Only the last window of an axis is split, so two regions per axis suffice to tell neighbours apart.
        regions = regions + wrapped.view(shape) * 2**axis
    ids = partition_windows(regions[None, ..., None], window, 0)[0][0, ..., 0]  # (number of windows, window**3)
    different = ids[:, None, :] != ids[:, :, None]
    return torch.zeros(different.shape, device=device).masked_fill(different, float("-inf"))


@lru_cache(maxsize=64)
def _cached(function: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    # A tensor made inside inference mode could never take part in training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return function(*arguments)


def _once_per_shape(function: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    # The compiler traces through and folds the result itself; a cache would only be a side effect to it. TorchScript
    # would record the tensors as results the first time and as constants later, and compares the two.
    return (
        function(*arguments) if torch.compiler.is_compiling() or kernels.is_traced() else _cached(function, *arguments)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(query · key / sqrt(d) + bias + mask) · value, within each window.

    Args:
        query, key, value: (B · W, heads, N, d), the windows of a sample one after the other.
        bias: (heads, N, N), added to the logits of all windows.
        mask: (W, N, N), added to the logits of each window of a sample, or None.
        dropout: probability for attention weights.

    Returns:
        (B · W, heads, N, d)
    """
    if kernels.chosen(kernels.WINDOWS_IN_TURN, query):
        attended: Tensor = kernels.WindowsInTurn.apply(query, key, value, bias, mask, dropout)
        return attended
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], dropout_p=dropout)
    # One sample at a time: for all at once bias plus mask, as large as attention weights, would be repeated for each.
    windows = mask.shape[0]
    bias = bias + mask[:, None]
    samples = zip(query.split(windows), key.split(windows), value.split(windows), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*qkv, attn_mask=bias, dropout_p=dropout) for qkv in samples])


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with one learned bias per head and relative offset.

    Args:
        channels: feature channels, a multiple of `num_heads`.
        num_heads: attention heads.
        window_size: largest window edge; fixes the bias table's ((2 · window_size − 1)**3, num_heads) shape.
        dropout: probability for attention weights and for the output.
    """

    def __init__(self, channels: int, num_heads: int, window_size: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.dropout = dropout
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.proj_dropout = Dropout(dropout, inplace=True)

    def forward(self, windows: Tensor, window: int, mask: Tensor | None) -> Tensor:
        """(B, W, N, C) windows of edge `window` (N = window**3), mask (W, N, N) or None, to (B, W, N, C)."""
        batch, count, tokens, channels = windows.shape
        qkv = self.qkv(windows).view(batch * count, tokens, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B·W, heads, N, C / heads)
        index = _once_per_shape(relative_position_index, window, self.window_size, windows.device)
        # Not table[index], whose backward pass adds up in an order that differs from run to run, even on the CPU.
        bias = F.embedding(index, self.relative_position_bias_table)  # (N, N, heads)
        bias = bias.permute(2, 0, 1).to(query.dtype).contiguous()  # fused kernels need its last axis dense
        mask = None if mask is None else mask.to(query.dtype)
        attended = attend(query, key, value, bias, mask, self.dropout if self.training else 0.0)
        attended = attended.transpose(1, 2).reshape(batch, count, tokens, channels)
        return self.proj_dropout(self.proj(attended))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the precision of its input; its kernels sum up in float32. Autocast would keep float32 copies."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        with kernels.without_autocast(x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SwinBlock(nn.Module):
    """Norm, window attention, norm, MLP, each with a residual connection; any spatial size.

    Args:
        channels, num_heads, window_size: as in `WindowAttention`.
        shifted: whether windows start half a window off (where the feature map is larger than a window).
        dropout: probability for attention and MLP dropout.
        drop_path: probability of skipping a residual branch, per sample.
        mlp_ratio: hidden MLP channels per channel.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        shifted: bool,
        dropout: float,
        drop_path: float,
        mlp_ratio: float,
    ):
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.drop_path = drop_path
        self.norm1 = LayerNorm(channels)
        self.attention = WindowAttention(channels, num_heads, window_size, dropout)
        self.norm2 = LayerNorm(channels)
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.GELU(),
            Dropout(dropout, inplace=True),
            nn.Linear(hidden, channels),
            Dropout(dropout, inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, X, Y, Z, C) to the same shape."""
        x = self._add(x, self._attend(self.norm1(x)))
        return self._add(x, self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2], x.shape[3])
        window, shift = fit_window(size, self.window_size)
        shift = shift if self.shifted else 0
        windows, padded = partition_windows(x, window, shift)
        mask = _once_per_shape(shifted_window_mask, padded, window, shift, x.device) if shift else None
        return merge_windows(self.attention(windows, window, mask), window, shift, padded, size)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + branch, the branch dropped for whole samples at random (drop path)."""
        if not (self.training and self.drop_path):
            return x + branch
        kept = F.dropout(branch.new_ones(branch.shape[0], 1, 1, 1, 1), self.drop_path)  # 0 or 1 / (1 - drop_path)
        return torch.addcmul(x, branch, kept)
