"""The axis order, spacing and usual size of a pool's volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape


@dataclass(frozen=True)
class PoolGeometry:
    """Axis order and spacing of a pool. All but `transpose_forward` is in plans axis order."""

    transpose_forward: tuple[int, ...]
    spacing: tuple[float, ...]
    """mm the volumes are resampled to; without resampling their median spacing."""
    median_spacing: tuple[float, ...]
    median_original_shape: tuple[int, ...]
    median_shape: tuple[int, ...]
    """Voxels after resampling, before cropping."""


def medians(
    sizes: Sequence[tuple[Sequence[int], Sequence[float]]], transpose: Sequence[int], target: np.ndarray | None
) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    """Median spacing, shape and shape after resampling in plans axis order, from canonical (shape, spacing)."""
    shapes = np.array([shape for shape, _ in sizes])[:, transpose]
    spacings = np.array([spacing for _, spacing in sizes])[:, transpose]
    resampled = shapes
    if target is not None:
        resampled = np.array([compute_new_shape(n, mm, target) for n, mm in zip(shapes, spacings, strict=True)])
    middle = tuple(float(mm) for mm in np.median(spacings, axis=0))
    original, after = (tuple(int(round(n)) for n in np.median(each, axis=0)) for each in (shapes, resampled))
    return middle, original, after
