"""Bare volumes to a pool: an nnU-Net dataset without labels, ready for pretraining."""
