"""Networks that a plans file can name. Depends on torch only."""

from nnunetv2_misfm.architectures.fm_unet import FMUNet
from nnunetv2_misfm.architectures.pct_net import PCTNet

__all__ = ["FMUNet", "PCTNet"]
