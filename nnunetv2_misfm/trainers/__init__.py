"""The two nnU-Net trainers and what they share."""
