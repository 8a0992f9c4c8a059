"""Bare volumes to a pretrained checkpoint: the pool, its crops, augmentation, Volume Fusion and the command."""
