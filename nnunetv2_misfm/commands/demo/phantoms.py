"""MR-like phantoms: a body with organs that neither brightness nor place tells apart, but their texture.

Arrays are (z, y, x). Every volume has an organ of each kind. Its brightness, place, size and outline are drawn anew, so
that neighbours without a label are as bright as those with one, as with organs in MR of several scanners.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

SHAPE = (40, 40, 40)
SPACING_MM = 2.0
LABELS = {"background": 0, "granular": 1, "striated": 2}
_KINDS = ("granular", "striated", "smooth", "patchy")  # the last two have no label
_BODY_RADII = (22.0, 18.0, 19.0)  # voxels
_TRIES, _MOST_OVERLAP = 60, 0.12


def make_phantom(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One volume.

    Returns:
        float32 image in arbitrary units and uint8 labels of `LABELS`, both of `SHAPE`.
    """
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    warped = grid + np.stack([2.0 * _noise(generator, 5.0) for _ in range(3)])
    body = _ellipsoid(warped, np.array(SHAPE) / 2, np.array(_BODY_RADII))
    image = body * (generator.uniform(0.3, 0.6) + 0.04 * _noise(generator, 1.5))
    labels = np.zeros(SHAPE, np.uint8)
    taken = np.zeros(SHAPE, bool)
    for kind in generator.permutation(_KINDS):
        for _ in range(_TRIES):
            organ = _ellipsoid(warped, generator.uniform(9, 31, 3), generator.uniform(6, 9.5, 3)) & body
            if (organ & taken).sum() < _MOST_OVERLAP * organ.sum():
                break
        organ &= ~taken
        taken |= organ
        image[organ] = generator.uniform(0.35, 1.0) + _texture(str(kind), warped, generator)[organ]
        labels[organ] = LABELS.get(str(kind), 0)
    bias_field = 1 + 0.15 * _noise(generator, 8.0)
    image = gaussian_filter(image, 0.4) * bias_field + generator.normal(0, 0.03, SHAPE)
    return (1000 * np.clip(image, 0, None)).astype(np.float32), labels


def _ellipsoid(grid: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    distances = (grid - centre[:, None, None, None]) / radii[:, None, None, None]
    return np.asarray((distances**2).sum(0) < 1)


def _texture(kind: str, grid: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    strength = generator.uniform(0.2, 0.3)
    if kind == "granular":
        return strength * _noise(generator, 0.8)
    if kind == "patchy":
        return strength * _noise(generator, 2.5)
    if kind == "smooth":
        return 0.03 * _noise(generator, 0.8)
    direction = generator.normal(size=3)
    along = np.tensordot(direction / np.linalg.norm(direction), grid, 1)
    waves = np.sin(2 * np.pi * along / generator.uniform(3.2, 4.5) + generator.uniform(0, 2 * np.pi))
    return np.asarray(1.2 * strength * waves)


def _noise(generator: np.random.Generator, sigma: float) -> np.ndarray:
    """Gaussian noise of standard deviation 1, smooth over `sigma` voxels."""
    noise = gaussian_filter(generator.standard_normal(SHAPE), sigma, mode="wrap")
    return np.asarray(noise / noise.std())


def write_image(array: np.ndarray, path: Path) -> None:
    """Write a (z, y, x) array with the phantoms' spacing."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([SPACING_MM] * 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_unlabelled(folder: Path, count: int, seed: int) -> None:
    """Bare volumes, nothing else: what a pretraining pool is made from."""
    for index in range(count):
        image, _ = make_phantom(np.random.default_rng((seed, 0, index)))
        write_image(image, folder / f"scan_{index:03d}.nii.gz")


def write_case(images: Path, labels: Path, name: str, seed: tuple[int, int, int]) -> None:
    """An image and its labels under nnU-Net's names."""
    image, segmentation = make_phantom(np.random.default_rng(seed))
    write_image(image, images / f"{name}_0000.nii.gz")
    write_image(segmentation, labels / f"{name}.nii.gz")
