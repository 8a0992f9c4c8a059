"""How volumes of a modality are normalised in pools: nnU-Net's scheme, and the intensities that it needs."""

from __future__ import annotations

from collections.abc import Sequence

CT = "CTNormalization"
SCHEMES = {"ct": CT, "mr": "ZScoreNormalization"}
"""By the modalities of `-modality`."""


def intensity_properties(modality: str, ct_window: Sequence[float]) -> dict[str, float]:
    """nnU-Net's intensity properties of a channel; for CT those that make its normalisation map the window to [-1, 1].

    For MR, where z-scores do not use them, a standard distribution until the volumes have been measured.
    """
    low, high = (float(value) for value in ct_window) if modality == "ct" else (-1.0, 1.0)
    middle = (low + high) / 2
    return {
        "mean": middle,
        "median": middle,
        "std": (high - low) / 2,
        "min": low,
        "max": high,
        "percentile_00_5": low,
        "percentile_99_5": high,
    }
