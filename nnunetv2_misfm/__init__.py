"""MIS-FM for nnU-Net v2: Volume Fusion pretraining, PCT-Net and weight transfer (arXiv 2306.16925)."""

__version__ = "0.1.0"
