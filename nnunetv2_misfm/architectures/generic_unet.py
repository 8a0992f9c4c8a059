"""nnU-Net v1's U-Net: nnU-Net v2's, with the kernels that v1 gives a decoder.

The one network here that needs more than torch: it is nnU-Net's own in all else.
"""

from __future__ import annotations

from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder


class GenericUNet(PlainConvUNet):
    """A PlainConvUNet whose decoder has, at each stage, kernels of the size of the next coarser stage.

    That is how Generic_UNet has it (nnunet/network_architecture/generic_UNet.py, `conv_kernel_sizes[-(u + 1)]`); it
    differs from v2's where flat kernels end. Arguments and parameter names are those of PlainConvUNet.
    """

    decoder: UNetDecoder

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        decoder, kernels = self.decoder, self.encoder.kernel_sizes
        convolutions = [len(stage.convs) for stage in decoder.stages]
        self.encoder.kernel_sizes = [*kernels[1:], kernels[-1]]
        self.decoder = UNetDecoder(
            self.encoder,
            decoder.num_classes,
            convolutions,
            decoder.deep_supervision,
            nonlin_first=keywords.get("nonlin_first", False),
        )
        self.encoder.kernel_sizes = kernels
