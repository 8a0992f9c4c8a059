"""Making one pretrained parameter fit another shape, each time keeping the function it computed.

Convolution weights are (out, in, X, Y, Z), transposed ones (in, out, X, Y, Z), both in plans axis order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor | None:
    """A convolution's weight with another odd kernel size; None if that would take away from what it computes.

    A larger kernel holds the given one at its centre and zeros around it: the same convolution. An axis that is
    reduced to 1 is summed up: the same response where the image does not change along that axis.
    """
    for axis, (have, want) in enumerate(zip(weight.shape[2:], kernel, strict=True), start=2):
        if have % 2 == 0 or want % 2 == 0:
            return None if have != want else weight
        if want > have:
            pads = [0] * (2 * weight.ndim)
            pads[2 * (weight.ndim - 1 - axis)] = pads[2 * (weight.ndim - 1 - axis) + 1] = (want - have) // 2
            weight = F.pad(weight, pads)
        elif want == 1:
            weight = weight.sum(axis, keepdim=True)
        elif want < have:
            return None
    return weight


def fit_upsampling_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor | None:
    """A transposed convolution's weight, kernel equal to stride, for another stride; None between strides above 1.

    Where an axis is upsampled anew, each voxel's response is repeated; where it is no longer, the responses of the
    voxels that were made of one are averaged.
    """
    for axis, (have, want) in enumerate(zip(weight.shape[2:], kernel, strict=True), start=2):
        if have == want:
            continue
        if have == 1:
            weight = weight.repeat_interleave(want, axis)
        elif want == 1:
            weight = weight.mean(axis, keepdim=True)
        else:
            return None
    return weight


def fit_input_channels(weight: Tensor, num_images: int, num_inputs: int) -> Tensor:
    """The first convolution's weight for other input channels.

    Each filter is summed over the source's channels and spread evenly over the target's images, so that an image
    repeated over all of them gives the response that it gave before. Channels after the images (one-hot labels of a
    cascade) get zeros: they change nothing at first.

    Args:
        weight: (out, C, X, Y, Z).
        num_images: image channels of the target.
        num_inputs: all its input channels.
    """
    images = weight
    if weight.shape[1] != num_images:
        images = (weight.sum(1, keepdim=True) / num_images).expand(-1, num_images, -1, -1, -1)
    labels = weight.new_zeros(weight.shape[0], num_inputs - num_images, *weight.shape[2:])
    return torch.cat([images, labels], dim=1)


def fit_bias_table(table: Tensor, rows: int) -> Tensor | None:
    """A relative-position bias table for another window, interpolated between the offsets of the given one.

    Args:
        table: ((2w − 1)**3, heads).
        rows: (2v − 1)**3 for a window of v; None is returned for any other number.
    """
    have, want = (round(n ** (1 / 3)) for n in (table.shape[0], rows))
    if have**3 != table.shape[0] or want**3 != rows or want % 2 == 0:
        return None
    cube = table.T.reshape(1, table.shape[1], have, have, have)
    fitted = F.interpolate(cube, size=(want, want, want), mode="trilinear", align_corners=True)
    return fitted.reshape(table.shape[1], rows).T.contiguous()
