"""Volume Fusion: which cuboids of a foreground sub-volume are mixed into a background one, and the mixing itself.

Image tensors are (B, C, X, Y, Z) in plans axis order, so X is the depth; label tensors are (B, 1, X, Y, Z).

The fused image is `a * foreground + (1 - a) * background` with a fusion coefficient `a` of 0, 1/K .. 1 at every voxel,
K = `num_fusion_classes` - 1. The network is asked for the class a * K of every voxel. Two geometries are published:
`boxes` (MIS-FM, arXiv 2306.16925) and `blocks` (the authors' later code, PyMIC `pymic/transform/crop4vf.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.plans.settings import is_number, is_whole

GEOMETRIES = ("boxes", "blocks")
PAIRS = ("two_volumes", "same_volume")
SIZE_UNITS = ("fraction", "voxels")


@dataclass(frozen=True)
class FusionSettings:
    """How fused samples are made; every range includes both ends, and sizes are per axis (X, Y, Z).

    Attributes:
        geometry: `boxes`: cuboids of random size and place, later ones on top. `blocks`: cuboids of one random size per
            sample on a regular grid with a random offset.
        num_fusion_classes: number of fusion coefficients, 0 included.
        num_boxes: fewest and most boxes of a sample.
        box_size_min, box_size_max: range of the box sizes. The defaults are the paper's 8..40, 8..80 and 8..80 voxels
            at its patch size of 64x128x128.
        box_size_unit: `fraction` of the patch size or `voxels`. Either way a box has at least one voxel and at most
            the size of the patch.
        background_boxes: whether a box may have coefficient 0, hiding the boxes below it.
        block_size_min, block_size_max: range of the block sizes.
        block_size_unit: `fraction` of the patch size or `voxels`. Blocks longer than half the patch are cut to half of
            it, so that even a small patch holds foreground and background.
        foreground_ratio: the share of blocks whose coefficient is not 0.
        pairs: foreground and background come from `two_volumes` or the `same_volume`; unset means two volumes for
            boxes and the same volume for blocks, as published.
    """

    geometry: str = "boxes"
    num_fusion_classes: int = 5
    num_boxes: tuple[int, int] = (10, 40)
    box_size_min: tuple[float, float, float] = (0.125, 0.0625, 0.0625)
    box_size_max: tuple[float, float, float] = (0.625, 0.625, 0.625)
    box_size_unit: str = "fraction"
    background_boxes: bool = False
    block_size_min: tuple[float, float, float] = (8, 8, 8)
    block_size_max: tuple[float, float, float] = (32, 32, 32)
    block_size_unit: str = "voxels"
    foreground_ratio: float = 0.7
    pairs: str | None = None

    @property
    def two_volumes(self) -> bool:
        """Whether the two sub-volumes of a sample come from different volumes."""
        return (self.pairs or ("two_volumes" if self.geometry == "boxes" else "same_volume")) == "two_volumes"

    def problems(self) -> list[str]:
        """One sentence per value that cannot be used."""
        found = []
        if self.geometry not in GEOMETRIES:
            found.append(f"geometry is {self.geometry!r}; use one of {', '.join(GEOMETRIES)}")
        if not is_whole(self.num_fusion_classes) or not 2 <= self.num_fusion_classes <= 1000:
            found.append(f"num_fusion_classes is {self.num_fusion_classes!r}; use a whole number from 2 to 1000")
        if not _is_range(self.num_boxes, is_whole) or self.num_boxes[0] < 1:
            found.append(f"num_boxes is {self.num_boxes!r}; use two whole numbers of at least 1, fewest first")
        for kind in ("box", "block"):
            found += _size_problems(kind, *(getattr(self, f"{kind}_size_{part}") for part in ("min", "max", "unit")))
        if not isinstance(self.background_boxes, bool):
            found.append(f"background_boxes is {self.background_boxes!r}; use true or false")
        if not is_number(self.foreground_ratio) or not 0 < self.foreground_ratio <= 1:
            found.append(f"foreground_ratio is {self.foreground_ratio!r}; use a number above 0 and up to 1")
        if self.pairs is not None and self.pairs not in PAIRS:
            found.append(f"pairs is {self.pairs!r}; use one of {', '.join(PAIRS)}, or null for the geometry's own")
        return found


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


def _size_problems(kind: str, size_min: Any, size_max: Any, unit: Any) -> list[str]:
    if unit not in SIZE_UNITS:
        return [f"{kind}_size_unit is {unit!r}; use one of {', '.join(SIZE_UNITS)}"]
    is_allowed = is_whole if unit == "voxels" else is_number
    wanted = "whole numbers of at least 1" if unit == "voxels" else "numbers above 0 and up to 1"
    found = []
    for name, sizes in (("min", size_min), ("max", size_max)):
        good = isinstance(sizes, tuple) and len(sizes) == 3 and all(is_allowed(s) and s > 0 for s in sizes)
        if not good or (unit == "fraction" and max(sizes) > 1):
            found.append(f"{kind}_size_{name} is {sizes!r}; in {unit} it must be three {wanted}")
    if not found and any(low > high for low, high in zip(size_min, size_max, strict=True)):
        found.append(f"{kind}_size_min {size_min} is above {kind}_size_max {size_max} on an axis")
    return found


def _is_range(value: Any, is_allowed: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_allowed, value)) and value[0] <= value[1]
