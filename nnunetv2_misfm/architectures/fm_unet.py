"""FMUNet: the convolutional network of MIS-FM, a U-Net of pre-activated residual convolutions.

Source: reference file `net/fmunet.py` of MIS-FM (arXiv 2306.16925). Stages 0 and 1 are flat (1×3×3) where the degree of
anisotropy says so. Tensors are (B, C, X, Y, Z) in plans axis order, the axis with the largest spacing first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.checkpointing import run_module
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.resolution import (
    NUM_STAGES,
    AnySizeNetwork,
    strides_of,
)


def _norm_act(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU()]


def _conv(in_channels: int, out_channels: int, stride: Sequence[int], flat: bool) -> nn.Conv3d:
    kernel, padding = ((1, 3, 3), (0, 1, 1)) if flat else ((3, 3, 3), (1, 1, 1))
    return nn.Conv3d(in_channels, out_channels, kernel, (stride[0], stride[1], stride[2]), padding)


class ResidualConvs(nn.Module):
    """Convolutions with norm and activation in front, each added to its input."""

    def __init__(self, channels: int, depth: int, flat: bool, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(*_norm_act(channels), Dropout(dropout), _conv(channels, channels, (1, 1, 1), flat))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) to the same shape."""
        for conv in self.convs:
            x = x + conv(x)
        return x


class Merge(nn.Module):
    """Trilinear upsampling of the coarser map, concatenation with the skip connection, convolution."""

    def __init__(self, coarse_channels: int, channels: int, stride: Sequence[int], flat: bool):
        super().__init__()
        self.reduce = nn.Sequential(*_norm_act(coarse_channels), nn.Conv3d(coarse_channels, channels, 1))
        self.upsample = nn.Upsample(scale_factor=tuple(map(float, stride)), mode="trilinear", align_corners=True)
        self.merge = nn.Sequential(*_norm_act(2 * channels), _conv(2 * channels, channels, (1, 1, 1), flat))

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """(B, C, X, Y, Z) skip and the map of the next coarser stage, to (B, C, X, Y, Z)."""
        return self.merge(torch.cat([skip, self.upsample(self.reduce(coarse))], dim=1))


class Encoder(nn.Module):
    """Stages 0 to 4, each followed by a strided convolution but the last.

    Attributes:
        output_channels: of the map of each stage, as in nnU-Net's encoders.
    """

    def __init__(
        self,
        input_channels: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        flat: Sequence[bool],
        depth: int,
        dropout: Sequence[float],
    ):
        super().__init__()
        self.output_channels = list(features)
        self.stem = _conv(input_channels, features[0], (1, 1, 1), flat[0])
        self.stages = nn.ModuleList(
            ResidualConvs(c, depth, f, d) for c, f, d in zip(features, flat, dropout, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Sequential(*_norm_act(features[i]), _conv(features[i], features[i + 1], strides[i + 1], flat[i]))
            for i in range(NUM_STAGES - 1)
        )

    def forward(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """The feature maps of the five stages, finest first."""
        x = self.stem(x)
        skips = []
        for i, stage in enumerate(self.stages):
            x = run_module(stage, x, checkpointed=checkpointed)
            skips.append(x)
            if i < len(self.downs):
                x = run_module(self.downs[i], x, checkpointed=checkpointed)
        return skips


class Decoder(nn.Module):
    """Stages 4 to 0 on the way up; `seg_layers` runs from coarse to fine as in nnU-Net's decoders."""

    def __init__(
        self,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        flat: Sequence[bool],
        depth: int,
        dropout: Sequence[float],
        num_classes: int,
        deep_supervision: bool,
    ):
        super().__init__()
        self.deep_supervision = deep_supervision
        coarse_to_fine = range(NUM_STAGES - 2, -1, -1)
        self.bottleneck = ResidualConvs(features[-1], depth, flat[-1], dropout[-1])
        self.merges = nn.ModuleList(
            Merge(features[i + 1], features[i], strides[i + 1], flat[i]) for i in coarse_to_fine
        )
        self.stages = nn.ModuleList(ResidualConvs(features[i], depth, flat[i], dropout[i]) for i in coarse_to_fine)
        # Norm and activation in front of the segmentation layers stand here, not in `seg_layers`, so they transfer.
        self.pre_seg = nn.ModuleList(nn.Sequential(*_norm_act(features[i])) for i in coarse_to_fine)
        self.seg_layers = nn.ModuleList(_conv(features[i], num_classes, (1, 1, 1), flat[i]) for i in coarse_to_fine)

    def forward(self, skips: list[Tensor], checkpointed: bool) -> list[Tensor]:
        """Logits, finest first: four with deep supervision, one without."""
        x = run_module(self.bottleneck, skips[-1], checkpointed=checkpointed)
        outputs = []
        for i, skip in enumerate(reversed(skips[:-1])):
            x = run_module(self.merges[i], skip, x, checkpointed=checkpointed)
            x = run_module(self.stages[i], x, checkpointed=checkpointed)
            if self.deep_supervision or i == len(self.stages) - 1:
                outputs.append(self.seg_layers[i](self.pre_seg[i](x)))
        return outputs[::-1]


class FMUNet(AnySizeNetwork):
    """Residual U-Net for nnU-Net plans; takes inputs of any size.

    As for any InstanceNorm, the deepest feature map needs more than one voxel: inputs of 16 x 16 x 16 are too small.

    Args:
        input_channels, num_classes, strides, features_per_stage, deep_supervision, checkpointing: as in `PCTNet`.
        depth: residual convolutions per stage.
        dropout_per_stage: probability per stage.

    Raises:
        ValueError: naming every argument that does not fit.
    """

    key_to_stem = "encoder.stem"
    normalises_over_batch = False
    keys_to_in_proj = (key_to_stem,)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]] = tuple(map(tuple, strides_of(1))),
        features_per_stage: Sequence[int] = (32, 64, 128, 256, 512),
        depth: int = 2,
        dropout_per_stage: Sequence[float] = (0.0, 0.0, 0.2, 0.2, 0.2),
        deep_supervision: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__(strides, checkpointing)
        problems = [
            f"{name} needs {NUM_STAGES} entries, got {list(values)}"
            for name, values in (("features_per_stage", features_per_stage), ("dropout_per_stage", dropout_per_stage))
            if len(values) != NUM_STAGES
        ]
        if problems:
            raise ValueError("FMUNet cannot be built: " + "; ".join(problems))
        flat = [self.anisotropy > stage for stage in range(NUM_STAGES)]
        self.encoder = Encoder(input_channels, features_per_stage, strides, flat, depth, dropout_per_stage)
        self.decoder = Decoder(
            features_per_stage, strides, flat, depth, dropout_per_stage, num_classes, deep_supervision
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module.bias is not None:
                # As in the reference: He initialisation for the slope of its leaky ReLU.
                nn.init.kaiming_normal_(module.weight, a=1e-2)
                nn.init.zeros_(module.bias)

    def feature_maps(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """See `AnySizeNetwork`."""
        return self.encoder(x, checkpointed)

    def logits(self, x: Tensor, checkpointed: bool) -> list[Tensor]:
        """See `AnySizeNetwork`."""
        return self.decoder(self.feature_maps(x, checkpointed), checkpointed)

    def checkpointed_modules(self) -> list[nn.Module]:
        """The modules whose activations are recomputed, one at a time, when `checkpointing` is on."""
        downs = list(self.encoder.downs)
        return [m for m in self.modules() if isinstance(m, (ResidualConvs, Merge)) or any(m is d for d in downs)]
