"""What both networks share about resolution: strides, degrees of anisotropy, padding to them and cropping back.

Sizes and strides are in plans axis order (X, Y, Z), the axis with the largest spacing first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NUM_STAGES = 5
DEGREES_OF_ANISOTROPY = (0, 1, 2)


def strides_of(anisotropy: int) -> list[list[int]]:
    """The strides of the five stages for a degree of anisotropy, as nnU-Net writes them into plans.

    The degree is the number of (1, 2, 2) entries among the first two poolings (`resolution_mode` of the reference).
    """
    if anisotropy not in DEGREES_OF_ANISOTROPY:
        raise ValueError(f"the degree of anisotropy must be one of {DEGREES_OF_ANISOTROPY}, not {anisotropy!r}")
    poolings = [[1, 2, 2]] * anisotropy + [[2, 2, 2]] * (NUM_STAGES - 1 - anisotropy)
    return [[1, 1, 1], *(list(p) for p in poolings)]


def anisotropy_of(strides: Sequence[Sequence[int]]) -> int:
    """The degree of anisotropy of exactly such strides.

    Raises:
        ValueError: if the strides are not those of one of the three degrees.
    """
    given = [list(stride) for stride in strides]
    for degree in DEGREES_OF_ANISOTROPY:
        if given == strides_of(degree):
            return degree
    allowed = "; ".join(str(strides_of(degree)) for degree in DEGREES_OF_ANISOTROPY)
    raise ValueError(f"strides {given} are not supported by this network; use one of: {allowed}")


def total_strides(strides: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """The stride of each stage relative to the input, finest first."""
    totals, current = [], (1, 1, 1)
    for stride in strides:
        current = tuple(c * int(s) for c, s in zip(current, stride, strict=True))  # type: ignore[assignment]
        totals.append(current)
    return totals


def output_weights(count: int) -> list[float]:
    """What each of so many outputs weighs in a loss with deep supervision, finest first: 1, 1/2, 1/4, ..., sum 1.

    nnU-Net leaves the coarsest output untrained; here all are, as in the published recipe.
    """
    halves = [0.5**i for i in range(count)]
    return [half / sum(halves) for half in halves]


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Zeros added at the far end of each spatial axis of (B, C, X, Y, Z) until it is a multiple of `multiple`."""
    pads = [-length % m for length, m in zip(x.shape[2:], multiple, strict=True)]
    return F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0])) if any(pads) else x


def crop_to_scaled(x: Tensor, input_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The part of an output at `stride` that belongs to an unpadded input.

    The size is round(n / stride), which is how nnU-Net scales the segmentations it compares deep-supervision outputs
    with (`DownsampleSegForDSTransform` of batchgeneratorsv2).
    """
    # Sizes are tensors while a network is traced, and tensors have no round().
    size = [max(1, round(int(n) * (1 / s))) for n, s in zip(input_size, stride, strict=True)]
    return x if list(x.shape[2:]) == size else x[:, :, : size[0], : size[1], : size[2]]


class AnySizeNetwork(nn.Module):
    """A five-stage network that takes inputs of any size by padding them inside and cropping its outputs.

    Its `encoder` is a module that gives all maps when it is called, for the probe of features, and lists their channels
    in `output_channels`, for vox2vec. The encoder's modules are called by their stage (`stage2`, `down2`, `stages.2` or
    `downs.2`), for learning rates that decay from stage to stage.

    Attributes:
        anisotropy: degree of anisotropy, which fixes the strides.
        checkpointing: recompute activations in the backward pass (less memory, more time).
        key_to_encoder, key_to_stem, key_to_lpe: names of modules, as nnU-Net's networks declare them: the encoder, its
            first part, which takes the image in, and a learned embedding of positions.
        key_to_seg_layers: name of the segmentation layers, which belong to the labels of one dataset.
        keys_by_anisotropy: names of dictionaries with one module for each degree of anisotropy.
        normalises_over_batch: whether it has BatchNorm.
    """

    decoder: nn.Module
    key_to_encoder = "encoder"
    key_to_stem: str
    key_to_lpe: str | None = None
    key_to_seg_layers = "decoder.seg_layers"
    keys_by_anisotropy: tuple[str, ...] = ()
    normalises_over_batch: bool

    def __init__(self, strides: Sequence[Sequence[int]], checkpointing: bool):
        super().__init__()
        self.anisotropy = anisotropy_of(strides)
        self.checkpointing = checkpointing

    @property
    def keys_to_in_proj(self) -> Sequence[str]:
        """Names of the convolutions of the image, whose weights have its number of channels."""
        raise TypeError(f"{type(self).__name__} has to define keys_to_in_proj")

    @property
    def output_strides(self) -> list[tuple[int, int, int]]:
        """Stride of each output with deep supervision relative to the input, finest first."""
        return total_strides(strides_of(self.anisotropy))[:-1]

    @property
    def size_divisor(self) -> tuple[int, int, int]:
        """What inputs are padded to a multiple of, along each axis."""
        return total_strides(strides_of(self.anisotropy))[-1]

    def padded_size(self, size: Sequence[int]) -> list[int]:
        """The size that images of a size (X, Y, Z) are padded to, at the far end of each axis."""
        return [n + -n % d for n, d in zip(size, self.size_divisor, strict=True)]

    def feature_maps(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """The encoder's maps for (B, C, X, Y, Z) whose size all strides divide, finest first."""
        raise TypeError(f"{type(self).__name__} has to define feature_maps")

    def logits(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """The outputs for (B, C, X, Y, Z) whose size all strides divide, finest first; one without deep supervision."""
        raise TypeError(f"{type(self).__name__} has to define logits")

    def checkpointed_modules(self) -> list[nn.Module]:
        """The modules whose activations are recomputed, one at a time, when `checkpointing` is on."""
        raise TypeError(f"{type(self).__name__} has to define checkpointed_modules")

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) image of any size to the encoder's maps of the padded image, finest first."""
        return self.feature_maps(pad_to_multiple(x, self.size_divisor), self.checkpointing and self.training)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, C, X, Y, Z) image of any size to logits (B, num_classes, X, Y, Z).

        With `decoder.deep_supervision`, a list of four, finest first, each round(n / stride) along each axis.
        """
        size = x.shape[2:]
        outputs = self.logits(pad_to_multiple(x, self.size_divisor), self.checkpointing and self.training)
        # Without deep supervision there is one output, the finest.
        outputs = [crop_to_scaled(o, size, s) for o, s in zip(outputs, self.output_strides, strict=False)]
        return outputs if self.decoder.deep_supervision else outputs[0]
