"""MR-like phantoms of a trunk: organs that their brightness does not tell apart, but what lies around them does.

Arrays are (z, y, x): z from the feet up, y from the front to the back, x from the right to the left. As in patients,
size, outline, place and contrast differ from volume to volume, and neighbours without a label are as bright as the
organs with one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

SHAPE = (40, 40, 40)
SPACING_MM = 8.0
LABELS = {"background": 0, "liver": 1, "kidneys": 2}
# Arbitrary units, drawn for each volume; that of every soft organ is drawn around one value.
_BRIGHTNESS = {"muscle": (0.45, 0.6), "fat": (0.25, 0.4), "air": (0.0, 0.1), "soft": (0.6, 0.75), "bone": (0.95, 1.1)}
_SOFT_ORGANS_DIFFER = 0.05
# Centres from the middle of the body, and radii; voxels. Later ones lie over earlier ones.
_WALL, _INSIDE = ((0, 0, 0), (40, 15, 18)), ((0, -1, 0), (40, 12, 15))
_ORGANS = (
    ("lung", "air", (14, -1, -8), (10, 8, 5.5)),
    ("lung", "air", (14, -1, 8), (10, 8, 5.5)),
    ("liver", "soft", (-1, -3, -7), (7, 7.5, 6.5)),
    ("stomach", "soft", (-2, -5, 4), (4, 4, 5)),
    ("spleen", "soft", (0, 4, 10), (4.5, 4, 3)),
    ("kidneys", "soft", (-9, 5, -6.5), (5, 3.2, 3)),
    ("kidneys", "soft", (-9, 5, 6.5), (5, 3.2, 3)),
)
_GREAT_VESSEL, _SPINE = ((0, 4, 1.5), (60, 1.5, 1.5)), ((0, 9, 0), (60, 3.2, 3.2))
_BOWEL_LOOPS, _BOWEL_RADII = 4, (2.5, 2.5, 4)
_BOWEL_FROM, _BOWEL_TO = (-18, -8, -9), (-8, 0, 9)


def make_phantom(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One volume.

    Returns:
        float32 image in arbitrary units and uint8 labels of `LABELS`, both of `SHAPE`.
    """
    places = _places_in_the_body(generator)
    brightness = {tissue: generator.uniform(*limits) for tissue, limits in _BRIGHTNESS.items()}
    body = _ellipsoid(places, *_WALL)
    image = np.where(body, brightness["muscle"], 0.0)
    image[_ellipsoid(places, *_INSIDE)] = brightness["fat"]
    labels = np.zeros(SHAPE, np.uint8)

    def put(organ: str, tissue: str, centre: ArrayLike, radii: ArrayLike) -> None:
        inside = body & _ellipsoid(places, centre, np.array(radii) * generator.uniform(0.85, 1.15, 3))
        image[inside] = brightness[tissue]
        if tissue == "soft":
            image[inside] += generator.uniform(-_SOFT_ORGANS_DIFFER, _SOFT_ORGANS_DIFFER)
        labels[inside] = LABELS.get(organ, 0)

    for organ, tissue, centre, radii in _ORGANS:
        put(organ, tissue, np.array(centre) + generator.uniform(-1.2, 1.2, 3), radii)
    for _ in range(_BOWEL_LOOPS):
        put("bowel", "soft", generator.uniform(_BOWEL_FROM, _BOWEL_TO), _BOWEL_RADII)
    put("spine", "bone", *_SPINE)
    put("aorta", "soft", *_GREAT_VESSEL)
    texture = 0.03 * body * _noise(generator, 1.2)
    bias_field = 1 + 0.1 * _noise(generator, 9.0)
    image = gaussian_filter(image + texture, 0.6) * bias_field + generator.normal(0, 0.04, SHAPE)
    return (1000 * np.clip(image, 0, None)).astype(np.float32), labels


def _places_in_the_body(generator: np.random.Generator) -> np.ndarray:
    """Each voxel's place from the middle of a body that is shifted, tilted, scaled and bent: (3, *SHAPE)."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    bent = grid + np.stack([1.5 * _noise(generator, 5.0) for _ in range(3)])
    middle = np.array(SHAPE) / 2 + generator.uniform(-2.5, 2.5, 3)
    tilt = Rotation.from_rotvec(generator.uniform(-8, 8, 3), degrees=True).as_matrix()
    scale = generator.uniform(0.88, 1.12, 3)
    return np.tensordot(tilt.T, bent - _column(middle), 1) / _column(scale)


def _ellipsoid(places: np.ndarray, centre: ArrayLike, radii: ArrayLike) -> np.ndarray:
    return np.asarray((((places - _column(centre)) / _column(radii)) ** 2).sum(0) < 1)


def _column(values: ArrayLike) -> np.ndarray:
    """Three values that go with (3, *SHAPE)."""
    return np.asarray(values, float)[:, None, None, None]


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
