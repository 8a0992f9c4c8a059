"""PCT-Net: a U-shaped network of parallel convolution and transformer blocks.

Source: MIS-FM (arXiv 2306.16925), reference file `net/pct_net.py`. Stages 0 and 1 are convolutional and form the stem
(encoder side) and the head (decoder side); they exist in three variants, one per degree of anisotropy. Stages 2 to 4
are parallel blocks and the same for all three. Tensors are (B, C, X, Y, Z) in plans axis order, the axis with the
largest spacing first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.checkpointing import run_module
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.norm_act_conv import NormActConvSequential, is_plain, run_in_a_row
from nnunetv2_misfm.architectures.resolution import (
    DEGREES_OF_ANISOTROPY,
    NUM_STAGES,
    AnySizeNetwork,
    strides_of,
)
from nnunetv2_misfm.architectures.window_attention import SwinBlock


def _conv(in_channels: int, out_channels: int, flat: bool) -> nn.Conv3d:
    """A size-preserving 3×3×3 convolution, or 1×3×3 where the first axis is still coarse."""
    if flat:
        return nn.Conv3d(in_channels, out_channels, (1, 3, 3), padding=(0, 1, 1))
    return nn.Conv3d(in_channels, out_channels, 3, padding=1)


def _norm_act(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(channels), nn.PReLU()]


def _segment(pre_seg: nn.Module, seg_layer: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, num_classes, X, Y, Z) of (B, C, X, Y, Z)."""
    modules = list(pre_seg.children()) if is_plain(pre_seg) else [pre_seg]
    return run_in_a_row([*modules, seg_layer], x)


class ConvBlock(NormActConvSequential):
    """Twice norm, activation, convolution, with dropout between."""

    def __init__(self, channels: int, flat: bool, dropout: float):
        super().__init__(
            *_norm_act(channels),
            _conv(channels, channels, flat),
            *_norm_act(channels),
            Dropout(dropout),
            _conv(channels, channels, flat),
        )


class MaxPool(nn.MaxPool3d):
    """Max-pooling that has a reproducible backward pass where PyTorch's has none, on GPUs, if that was asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) whose size the kernel divides, to the size divided by it."""
        if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
            return reproducible_max_pool(x, self.kernel_size)  # type: ignore[arg-type]
        return super().forward(x)


def reproducible_max_pool(x: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Maxima of blocks of `kernel` voxels, from operations whose backward pass adds nothing up."""
    for axis, length in zip((2, 3, 4), kernel, strict=True):
        # Along one axis at a time; each gradient goes to exactly one of the voxels.
        x = x.unflatten(axis, (-1, length)).max(dim=axis + 1).values
    return x


class Downsample(NormActConvSequential):
    """Max-pooling, norm, activation, convolution to the next stage's channels."""

    def __init__(self, in_channels: int, out_channels: int, pool_flat: bool, conv_flat: bool):
        super().__init__(
            MaxPool((1, 2, 2) if pool_flat else (2, 2, 2)),
            *_norm_act(in_channels),
            _conv(in_channels, out_channels, conv_flat),
        )


class UpsampleConcat(nn.Module):
    """Transposed convolution of the coarser map, concatenation with the skip connection, convolution."""

    def __init__(self, coarse_channels: int, channels: int, flat: bool):
        super().__init__()
        kernel = (1, 2, 2) if flat else (2, 2, 2)
        self.upsample = NormActConvSequential(
            *_norm_act(coarse_channels), nn.ConvTranspose3d(coarse_channels, channels, kernel, stride=kernel)
        )
        self.merge = NormActConvSequential(*_norm_act(2 * channels), _conv(2 * channels, channels, flat))

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """(B, C, X, Y, Z) skip and the map of the next coarser stage, to (B, C, X, Y, Z)."""
        return self.merge(torch.cat([skip, self.upsample(coarse)], dim=1))


class ParallelBlock(nn.Module):
    """convolution(x) + Swin(x): the parallel block that gives PCT-Net its name."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        num_swin_blocks: int,
        dropout: float,
        drop_path: float,
        mlp_ratio: float,
    ):
        super().__init__()
        self.conv = ConvBlock(channels, flat=False, dropout=dropout)
        self.token_dropout = Dropout(dropout)
        self.swin = nn.ModuleList(
            SwinBlock(channels, num_heads, window_size, i % 2 == 1, dropout, drop_path, mlp_ratio)
            for i in range(num_swin_blocks)
        )

    def forward(self, x: Tensor, checkpointed: bool) -> Tensor:
        """(B, C, X, Y, Z) to the same shape."""
        tokens = self.token_dropout(x.permute(0, 2, 3, 4, 1))
        for block in self.swin:
            tokens = run_module(block, tokens, checkpointed=checkpointed)
        return run_module(self.conv, x, checkpointed=checkpointed) + tokens.permute(0, 4, 1, 2, 3)


class Stem(nn.Module):
    """Stages 0 and 1 of the encoder, for one degree of anisotropy."""

    def __init__(self, input_channels: int, features: Sequence[int], dropout: Sequence[float], anisotropy: int):
        super().__init__()
        flat0, flat1 = anisotropy > 0, anisotropy > 1
        self.project = _conv(input_channels, features[0], flat0)
        self.stage0 = ConvBlock(features[0], flat0, dropout[0])
        self.down1 = Downsample(features[0], features[1], flat0, flat1)
        self.stage1 = ConvBlock(features[1], flat1, dropout[1])
        self.down2 = Downsample(features[1], features[2], flat1, False)


class Head(nn.Module):
    """Stages 1 and 0 of the decoder, for one degree of anisotropy, up to the segmentation layers."""

    def __init__(self, features: Sequence[int], dropout: Sequence[float], anisotropy: int):
        super().__init__()
        flat0, flat1 = anisotropy > 0, anisotropy > 1
        self.up1 = UpsampleConcat(features[2], features[1], flat1)
        self.stage1 = ConvBlock(features[1], flat1, dropout[1])
        self.up0 = UpsampleConcat(features[1], features[0], flat0)
        self.stage0 = ConvBlock(features[0], flat0, dropout[0])
        # Norm and activation in front of the segmentation layers stand here, not in `seg_layers`, so they transfer.
        self.pre_seg1 = nn.Sequential(*_norm_act(features[1]))
        self.pre_seg0 = nn.Sequential(*_norm_act(features[0]))


class Encoder(nn.Module):
    """The stem of the chosen degree of anisotropy and the parallel blocks of stages 2 to 4.

    Attributes:
        output_channels: of the map of each stage, as in nnU-Net's encoders.
    """

    def __init__(self, stems: dict[str, Stem], features: Sequence[int], blocks: Sequence[ParallelBlock]):
        super().__init__()
        self.output_channels = list(features)
        self.stems = nn.ModuleDict(stems)
        self.stage2, self.stage3, self.stage4 = blocks
        self.down3 = Downsample(features[2], features[3], False, False)
        self.down4 = Downsample(features[3], features[4], False, False)

    def forward(self, x: Tensor, anisotropy: int, checkpointed: bool) -> list[Tensor]:
        """The feature maps of the five stages, finest first."""

        def run(module: nn.Module, value: Tensor) -> Tensor:
            return run_module(module, value, checkpointed=checkpointed)

        stem = cast(Stem, self.stems[str(anisotropy)])
        x0 = run(stem.stage0, stem.project(x))
        x1 = run(stem.stage1, run(stem.down1, x0))
        x2 = self.stage2(run(stem.down2, x1), checkpointed)
        x3 = self.stage3(run(self.down3, x2), checkpointed)
        x4 = self.stage4(run(self.down4, x3), checkpointed)
        return [x0, x1, x2, x3, x4]


class Decoder(nn.Module):
    """Parallel blocks of stages 3 and 2, the head of the chosen degree, and one segmentation layer per output.

    `seg_layers` runs from coarse to fine as in nnU-Net's decoders: stages 3 and 2, then stages 1 and 0 of each head in
    the order of `heads`.
    """

    def __init__(
        self,
        heads: dict[str, Head],
        features: Sequence[int],
        blocks: Sequence[ParallelBlock],
        num_classes: int,
        deep_supervision: bool,
    ):
        super().__init__()
        self.deep_supervision = deep_supervision
        self.up3 = UpsampleConcat(features[4], features[3], False)
        self.up2 = UpsampleConcat(features[3], features[2], False)
        self.stage3, self.stage2 = blocks
        self.heads = nn.ModuleDict(heads)
        self.pre_seg3 = nn.Sequential(*_norm_act(features[3]))
        self.pre_seg2 = nn.Sequential(*_norm_act(features[2]))
        channels = [features[3], features[2], *(c for _ in heads for c in (features[1], features[0]))]
        self.seg_layers = nn.ModuleList(nn.Conv3d(c, num_classes, 1) for c in channels)

    def forward(self, skips: list[Tensor], anisotropy: int, checkpointed: bool) -> list[Tensor]:
        """Logits, finest first: four with deep supervision, one without."""

        def run(module: nn.Module, *values: Tensor) -> Tensor:
            return run_module(module, *values, checkpointed=checkpointed)

        x0, x1, x2, x3, x4 = skips
        head = cast(Head, self.heads[str(anisotropy)])
        d3 = self.stage3(run(self.up3, x3, x4), checkpointed)
        d2 = self.stage2(run(self.up2, x2, d3), checkpointed)
        d1 = run(head.stage1, run(head.up1, x1, d2))
        d0 = run(head.stage0, run(head.up0, x0, d1))
        # `keys`, because the compiler of torch 2.7 cannot trace a list of the ModuleDict itself.
        first = 2 + 2 * list(self.heads.keys()).index(str(anisotropy))
        seg1, seg0 = self.seg_layers[first], self.seg_layers[first + 1]
        outputs = [_segment(head.pre_seg0, seg0, d0)]
        if self.deep_supervision:
            outputs.append(_segment(head.pre_seg1, seg1, d1))
            outputs.append(_segment(self.pre_seg2, self.seg_layers[1], d2))
            outputs.append(_segment(self.pre_seg3, self.seg_layers[0], d3))
        return outputs


class PCTNet(AnySizeNetwork):
    """Parallel convolution and transformer network for nnU-Net plans; weights do not depend on the patch size.

    Args:
        input_channels: image channels (and one-hot label channels in a cascade).
        num_classes: segmentation heads.
        strides: of the five stages in nnU-Net's notation; `strides_of(m)` for a degree of anisotropy m of 0, 1 or 2.
        features_per_stage: channels of the five stages (the published weights use 24, 48, 128, 256, 512).
        num_heads: attention heads of stages 2 to 4; each divides its stage's features.
        window_size: edge of the attention windows in voxels of the stage.
        n_swin_blocks: Swin blocks per parallel block; every second one uses shifted windows.
        dropout_per_stage: probability per stage; from stage 2 on also in attention and MLP.
        drop_path: probability of skipping a residual branch of a Swin block.
        mlp_ratio: hidden MLP channels per channel.
        deep_supervision: return four outputs, finest first, instead of one.
        stems: degrees of anisotropy whose stem and head are built; default only the one of `strides`. A checkpoint
            meant for every target has all three; `use_anisotropy` switches between them.
        checkpointing: recompute activations in the backward pass (less memory, more time).

    Raises:
        ValueError: naming every argument that does not fit.
    """

    key_to_stem = "encoder.stems"
    normalises_over_batch = True
    keys_by_anisotropy = ("encoder.stems", "decoder.heads")

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]] = tuple(map(tuple, strides_of(1))),
        features_per_stage: Sequence[int] = (24, 48, 128, 256, 512),
        num_heads: Sequence[int] = (4, 8, 16),
        window_size: int = 6,
        n_swin_blocks: int = 2,
        dropout_per_stage: Sequence[float] = (0.0, 0.0, 0.2, 0.2, 0.2),
        drop_path: float = 0.2,
        mlp_ratio: float = 4.0,
        deep_supervision: bool = True,
        stems: Sequence[int] | None = None,
        checkpointing: bool = False,
    ):
        super().__init__(strides, checkpointing)
        built = tuple(sorted({self.anisotropy} if stems is None else set(stems)))
        _check(features_per_stage, num_heads, dropout_per_stage, built, self.anisotropy)

        def parallel(stage: int) -> ParallelBlock:
            return ParallelBlock(
                features_per_stage[stage],
                num_heads[stage - 2],
                window_size,
                n_swin_blocks,
                dropout_per_stage[stage],
                drop_path,
                mlp_ratio,
            )

        self.encoder = Encoder(
            {str(m): Stem(input_channels, features_per_stage, dropout_per_stage, m) for m in built},
            features_per_stage,
            [parallel(2), parallel(3), parallel(4)],
        )
        self.decoder = Decoder(
            {str(m): Head(features_per_stage, dropout_per_stage, m) for m in built},
            features_per_stage,
            [parallel(3), parallel(2)],
            num_classes,
            deep_supervision,
        )
        self.to(memory_format=torch.channels_last_3d)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PCTNet:
        # Convolutions follow the memory format of their weights. Channels-last is faster on a CPU (the narrow stages
        # twice as fast) and on a GPU (BatchNorm five times as fast); elsewhere PyTorch's default format is safer.
        super()._apply(fn, recurse)
        if next(self.parameters()).device.type not in ("cpu", "cuda", "meta"):
            super()._apply(lambda t: t.contiguous() if t.ndim == 5 else t, recurse)
        return self

    @property
    def keys_to_in_proj(self) -> Sequence[str]:
        """See `AnySizeNetwork`; one for each stem that was built."""
        return [f"{self.key_to_stem}.{degree}.project" for degree in self.encoder.stems]

    def use_anisotropy(self, anisotropy: int) -> None:
        """Choose which of the built stems and heads the next forward passes go through."""
        if str(anisotropy) not in self.encoder.stems:
            built = ", ".join(self.encoder.stems)
            raise ValueError(f"this network has no stem for degree of anisotropy {anisotropy}; it has: {built}")
        self.anisotropy = anisotropy

    def feature_maps(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """See `AnySizeNetwork`."""
        return self.encoder(x, self.anisotropy, checkpointed)

    def logits(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """See `AnySizeNetwork`."""
        return self.decoder(self.feature_maps(x, checkpointed), self.anisotropy, checkpointed)

    def checkpointed_modules(self) -> list[nn.Module]:
        """The modules whose activations are recomputed, one at a time, when `checkpointing` is on."""
        kinds = (ConvBlock, Downsample, UpsampleConcat, SwinBlock)
        return [module for module in self.modules() if isinstance(module, kinds)]


def _check(
    features: Sequence[int], num_heads: Sequence[int], dropout: Sequence[float], stems: Sequence[int], anisotropy: int
) -> None:
    problems = []
    if len(features) != NUM_STAGES:
        problems.append(f"features_per_stage needs {NUM_STAGES} entries, got {list(features)}")
    if len(dropout) != NUM_STAGES:
        problems.append(f"dropout_per_stage needs {NUM_STAGES} entries, got {list(dropout)}")
    if len(num_heads) != 3:
        problems.append(f"num_heads needs 3 entries (stages 2 to 4), got {list(num_heads)}")
    elif len(features) == NUM_STAGES:
        problems += [
            f"features_per_stage[{stage}] = {channels} is not a multiple of its {heads} attention heads, as "
            f"{heads} and {2 * heads} are"
            for stage, channels, heads in zip((2, 3, 4), features[2:], num_heads, strict=True)
            if channels % heads
        ]
    if not set(stems) <= set(DEGREES_OF_ANISOTROPY) or anisotropy not in stems:
        problems.append(f"stems {list(stems)} must be among {DEGREES_OF_ANISOTROPY} and include {anisotropy}")
    if problems:
        raise ValueError("PCTNet cannot be built: " + "; ".join(problems))
