"""Where the voxels of a volume lie in the body, and how they are brought onto straight, upright axes.

Axes of a grid are (x, y, z) as stored, lengths in mm, directions in LPS as in DICOM; arrays are (Z, Y, X).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.ndimage
import SimpleITK as sitk

from nnunetv2_misfm.pool.volume_files import VolumeProblem

SPACING_LIMITS = (1e-3, 100.0)
"""Voxel sizes in mm outside these limits are taken for damaged headers."""
STRAIGHT_WITHIN_VOXELS = 0.5
"""Axes are straight enough if nothing lies further than this from where right angles would put it."""


@dataclass(frozen=True)
class Grid:
    """Made by `make_grid`, which checks it."""

    size: tuple[int, ...]
    """Voxels along (x, y, z)."""
    spacing: tuple[float, ...]
    """mm between neighbours along (x, y, z)."""
    direction: tuple[float, ...]
    """Row-major matrix whose columns are the directions of x, y and z; not always at right angles."""
    origin: tuple[float, ...]
    """Centre of the first voxel."""

    @property
    def columns(self) -> np.ndarray:
        """Matrix whose columns are the steps from voxel to voxel in mm."""
        return np.reshape(self.direction, (3, 3)) * self.spacing

    @property
    def orientation(self) -> str:
        """Where the axes x, y, z point to, e.g. RAS."""
        return _orientation(self.direction)

    @property
    def upright_axes(self) -> tuple[int, ...]:
        """Which array axes, slowest stored axis first, run along the body, from front to back, and across it."""
        return _upright_axes(self.orientation)


@lru_cache
def _upright_axes(orientation: str) -> tuple[int, ...]:
    stored = orientation[::-1]
    return tuple(next(axis for axis, letter in enumerate(stored) if letter in pair) for pair in ("SI", "AP", "RL"))


@lru_cache(maxsize=1024)  # most volumes of an archive share a few directions
def _orientation(direction: tuple[float, ...]) -> str:
    letters: str = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction)
    return letters


def make_grid(
    size: Sequence[int], spacing: Sequence[float] | np.ndarray, direction: np.ndarray, origin: Sequence[float]
) -> Grid:
    """A grid of three axes.

    Args:
        size: voxels along each stored axis.
        spacing: mm between neighbours along x, y and z.
        direction: matrix (3, 3) whose columns are the directions of x, y and z, of length 1.
        origin: centre of the first voxel in mm.

    Raises:
        VolumeProblem: 2D, more than 3D, a voxel size that is not plausible, or axes that do not span space.
    """
    shape = "x".join(str(int(n)) for n in size)
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if min(size, default=0) < 1:
        raise VolumeProblem(f"unreadable: size {shape} in its header")
    if len(size) > 3:
        raise VolumeProblem(f"{len(size)}D ({shape}); split it into 3D files first")
    if len(size) < 3 or min(size) == 1:
        raise VolumeProblem(f"2D ({shape})")
    spacing, direction, origin = spacing[:3], direction[:3, :3], origin[:3]
    check_spacing(spacing)
    if not np.isfinite(direction).all() or np.linalg.matrix_rank(direction) < 3:
        raise VolumeProblem(f"unreadable: its axes do not span space (direction {direction.tolist()})")
    return Grid(
        size=tuple(int(n) for n in size),
        spacing=tuple(float(mm) for mm in spacing),
        direction=tuple(float(v) for v in direction.ravel()),
        origin=tuple(float(mm) for mm in origin),
    )


def check_spacing(spacing: Sequence[float] | np.ndarray) -> None:
    """Raise VolumeProblem for voxel sizes (mm) that are not there or not plausible."""
    shown = " x ".join(f"{mm:g}" for mm in spacing)
    if not all(0 < mm < math.inf for mm in spacing):
        raise VolumeProblem(f"voxel size {shown} mm in its header")
    low, high = SPACING_LIMITS
    if not all(low <= mm <= high for mm in spacing):
        raise VolumeProblem(f"voxel size {shown} mm is not plausible ({low:g} to {high:g} mm)")


def tilt(columns: np.ndarray) -> float:
    """How far the axes of a matrix (3, 3) are from right angles, in degrees: of the worst pair."""
    unit = columns / np.linalg.norm(columns, axis=0)
    cosines = np.abs(unit.T @ unit)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(min(cosines.max(), 1.0))))


def straightened(voxels: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid, str]:
    """Bring voxels (Z, Y, X) with sheared axes onto a grid of right angles, as after a gantry tilt.

    The new grid keeps the direction of rows and the plane of the slices, holds the whole volume, and is filled with
    the lowest value where nothing was measured. Values are interpolated linearly.

    Returns:
        voxels, their grid, and what was done; the same voxels and an empty text if the axes were straight.
    """
    columns = grid.columns
    row = columns[:, 0] / grid.spacing[0]
    column = columns[:, 1] - (columns[:, 1] @ row) * row
    normal = np.cross(row, column)
    normal *= np.sign(normal @ columns[:, 2]) / np.linalg.norm(normal)
    axes = np.stack([row, column / np.linalg.norm(column), normal], axis=1)
    steps = np.array([grid.spacing[0], np.linalg.norm(column), normal @ columns[:, 2]])
    to_straight = (axes.T @ columns) / steps[:, None]  # index in the sheared grid to index in the straight one
    last = np.array(grid.size) - 1.0
    if np.max(np.abs(to_straight - np.eye(3)) @ last) < STRAIGHT_WITHIN_VOXELS:
        return voxels, grid, ""
    corners = np.stack(np.meshgrid(*[(0.0, n) for n in last], indexing="ij"), axis=-1).reshape(-1, 3) @ to_straight.T
    corners = corners.round(6)  # what is whole but for rounding stays whole
    first = np.floor(corners.min(axis=0))
    size = (np.ceil(corners.max(axis=0)) - first + 1).astype(int)
    back = np.linalg.inv(to_straight)
    straight = scipy.ndimage.affine_transform(
        voxels,
        back[::-1, ::-1],
        offset=(back @ first)[::-1],
        output_shape=tuple(size[::-1]),
        order=1,
        mode="grid-constant",
        cval=float(voxels.min()),
    )
    origin = np.array(grid.origin) + axes @ (first * steps)
    mended = f"straightened tilted axes: they were off by {tilt(columns):.3g}°"
    return straight, make_grid(size, steps, axes, origin), mended


def upright(voxels: np.ndarray, grid: Grid) -> tuple[np.ndarray, tuple[float, ...]]:
    """Turn voxels (Z, Y, X) so that their axes run from inferior to superior, posterior to anterior, left to right.

    Returns:
        voxels (a view) and their spacing in mm in the new order.
    """
    stored, axes = grid.orientation[::-1], grid.upright_axes
    flips = tuple(slice(None, None, 1 if stored[axis] in "SAR" else -1) for axis in axes)
    return voxels.transpose(axes)[flips], tuple(grid.spacing[::-1][axis] for axis in axes)
