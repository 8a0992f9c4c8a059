"""Networks that a plans file can name. Needs torch and, for generic_unet.py, dynamic_network_architectures."""

from nnunetv2_misfm.architectures.fm_unet import FMUNet
from nnunetv2_misfm.architectures.pct_net import PCTNet

__all__ = ["FMUNet", "PCTNet"]
