"""Volume Fusion: which cuboids of a foreground sub-volume are mixed into a background one, and the mixing itself.

Image tensors are (B, C, X, Y, Z) in plans axis order, so X is the depth; label tensors are (B, 1, X, Y, Z).

The fused image is `a * foreground + (1 - a) * background` with a fusion coefficient `a` of 0, 1/K .. 1 at every voxel,
K = `num_fusion_classes` - 1. The network is asked for the class a * K of every voxel. Two geometries are published:
`boxes` (MIS-FM, arXiv 2306.16925) and `blocks` (the authors' later code, PyMIC `pymic/transform/crop4vf.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.pretrain.settings import FusionSettings


@dataclass(frozen=True, eq=False)
class Fusion:
    """Cuboids painted in order, later ones on top; voxels outside all of them have class 0.

    Attributes:
        starts, sizes: (M, 3) whole numbers, in voxels.
        classes: (M,) whole numbers 0..K; class k stands for the fusion coefficient k / K.
    """

    starts: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray


def sample_fusion(shape: Sequence[int], settings: FusionSettings, generator: np.random.Generator) -> Fusion:
    """Draw the cuboids of one sample for a patch of `shape` voxels (X, Y, Z)."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"the shape of a patch must be three positive numbers of voxels, not {tuple(shape)}")
    patch = np.asarray(shape)
    return (_sample_boxes if settings.geometry == "boxes" else _sample_blocks)(patch, settings, generator)


def fusion_labels(fusion: Fusion, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """The class of every voxel: an int16 tensor (X, Y, Z) on `device`."""
    labels = torch.zeros(tuple(shape), dtype=torch.int16, device=device)
    stops = fusion.starts + fusion.sizes
    for (x0, y0, z0), (x1, y1, z1), k in zip(
        fusion.starts.tolist(), stops.tolist(), fusion.classes.tolist(), strict=True
    ):
        labels[x0:x1, y0:y1, z0:z1] = k
    return labels


def fuse(
    foreground: Tensor, background: Tensor, fusions: Sequence[Fusion], num_fusion_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix two batches of sub-volumes, one fusion per sample.

    Args:
        foreground, background: (B, C, X, Y, Z), floating point, of equal shape, on one device.
        fusions: B of them, drawn for patches of (X, Y, Z).
        num_fusion_classes: K + 1.

    Returns:
        the fused images (B, C, X, Y, Z) and their labels (B, 1, X, Y, Z) of type int16. Coefficients are read off the
        labels, so that the two agree at every voxel.

    Raises:
        ValueError: if the batches and fusions do not fit together, or a fusion has a class above K.
    """
    if foreground.shape != background.shape or foreground.ndim != 5 or len(fusions) != len(foreground):
        raise ValueError(
            "fusing needs foreground and background of one shape (B, C, X, Y, Z) and B fusions, not "
            f"{tuple(foreground.shape)}, {tuple(background.shape)} and {len(fusions)}"
        )
    highest = max((int(fusion.classes.max(initial=0)) for fusion in fusions), default=0)
    if highest >= num_fusion_classes:
        raise ValueError(f"a fusion has class {highest}, but num_fusion_classes is {num_fusion_classes}")
    shape = foreground.shape[2:]
    labels = torch.stack([fusion_labels(fusion, shape, foreground.device) for fusion in fusions]).unsqueeze(1)
    coefficients = labels.to(foreground.dtype).div_(num_fusion_classes - 1)
    return torch.lerp(background, foreground, coefficients), labels


def _sample_boxes(patch: np.ndarray, settings: FusionSettings, generator: np.random.Generator) -> Fusion:
    smallest, largest = _voxel_range(settings.box_size_min, settings.box_size_max, settings.box_size_unit, patch, patch)
    count = int(generator.integers(*settings.num_boxes, endpoint=True))
    sizes = generator.integers(smallest, largest, size=(count, 3), endpoint=True)
    starts = generator.integers(0, patch - sizes, endpoint=True)
    lowest = 0 if settings.background_boxes else 1
    return Fusion(starts, sizes, generator.integers(lowest, settings.num_fusion_classes, size=count))


def _sample_blocks(patch: np.ndarray, settings: FusionSettings, generator: np.random.Generator) -> Fusion:
    half = np.maximum(patch // 2, 1)
    smallest, largest = _voxel_range(
        settings.block_size_min, settings.block_size_max, settings.block_size_unit, patch, half
    )
    size = generator.integers(smallest, largest, endpoint=True)
    counts, left_over = np.divmod(patch, size)
    offset = generator.integers(0, left_over, endpoint=True)
    num_blocks = int(counts.prod())
    num_foreground = int(settings.foreground_ratio * num_blocks)
    chosen = generator.permutation(num_blocks)[:num_foreground]
    starts = offset + np.stack(np.unravel_index(chosen, tuple(counts)), axis=1) * size
    sizes = np.broadcast_to(size, starts.shape)
    return Fusion(starts, sizes, generator.integers(1, settings.num_fusion_classes, size=num_foreground))


def _voxel_range(
    size_min: Sequence[float], size_max: Sequence[float], unit: str, patch: np.ndarray, limit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest size in voxels per axis, each from 1 to `limit`."""
    bounds = np.stack([np.asarray(size_min, float), np.asarray(size_max, float)])
    if unit == "fraction":
        bounds = bounds * patch
    smallest, largest = np.clip(np.rint(bounds).astype(int), 1, limit)
    return smallest, largest
