"""CT-like phantoms: an abdomen of ellipsoids with textured organs, different in every volume.

Arrays are (z, y, x), values in Hounsfield units.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (20, 48, 48)
SPACING_ZYX = (10.0, 5.0, 5.0)
LABELS = {"background": 0, "liver": 1, "spleen": 2}


def make_phantom(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One volume.

    Returns:
        int16 image in HU and uint8 labels of `LABELS`, both of `SHAPE`.
    """
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    scale = generator.uniform(0.9, 1.1, 3)
    z, y, x = z * scale[0], y * scale[1], x * scale[2]

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        cz, cy, cx = np.asarray(centre) + generator.uniform(-0.06, 0.06, 3)
        rz, ry, rx = np.asarray(radii) * generator.uniform(0.85, 1.15, 3)
        wave = 0.12 * np.sin(generator.uniform(2, 5) * (x + y) + generator.uniform(0, 6))
        return ((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 + wave

    image = np.full(SHAPE, -1000.0)
    labels = np.zeros(SHAPE, np.uint8)
    body = ellipsoid((0, 0, 0), (1.6, 0.72, 0.88))
    image[body] = -100
    image[ellipsoid((0, 0, 0), (1.6, 0.64, 0.8)) & body] = 40
    for side in (-1, 1):
        image[ellipsoid((-0.75, -0.05, 0.4 * side), (0.5, 0.42, 0.3)) & body] = -820
    # nnU-Net mirrors in training and prediction: brightness and shape tell the organs apart, the side does not.
    organs = [
        ("liver", (0.05, -0.1, -0.42), (0.5, 0.42, 0.34), generator.uniform(170, 200)),
        ("spleen", (0.0, 0.12, 0.5), (0.48, 0.36, 0.27), generator.uniform(330, 370)),
    ]
    # Without a label, and as bright as one organ or the other where the partial volume of an edge is.
    for side in (-1, 1):
        image[ellipsoid((0.4, 0.3, 0.3 * side), (0.32, 0.15, 0.13)) & body] = generator.uniform(250, 280)
    image[ellipsoid((0.35, -0.3, 0.25), (0.3, 0.18, 0.26)) & body] = generator.uniform(-20, 10)
    image[ellipsoid((0.0, 0.1, 0.0), (1.4, 0.06, 0.06)) & body] = generator.uniform(430, 480)
    for name, centre, radii, intensity in organs:
        inside = ellipsoid(centre, radii) & body
        image[inside], labels[inside] = intensity, LABELS[name]
    image[ellipsoid((0, 0.45, 0), (1.6, 0.12, 0.13)) & body] = 700
    labels[image == 700] = 0
    smooth = sitk.GetArrayFromImage(
        sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(image.astype(np.float32)), 0.7)
    )
    noisy = smooth + generator.normal(0, 18, SHAPE)
    return np.clip(noisy, -1024, 3000).astype(np.int16), labels


def write_image(array: np.ndarray, path: Path) -> None:
    """Write a (z, y, x) array with the phantoms' spacing."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING_ZYX[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_unlabelled(folder: Path, count: int, seed: int) -> None:
    """Bare volumes, nothing else: what a pretraining pool is made from."""
    for index in range(count):
        image, _ = make_phantom(np.random.default_rng((seed, index)))
        write_image(image, folder / f"scan_{index:03d}.nii.gz")


def write_case(images: Path, labels: Path, name: str, seed: tuple[int, int]) -> None:
    """An image and its labels under nnU-Net's names."""
    image, segmentation = make_phantom(np.random.default_rng(seed))
    write_image(image, images / f"{name}_0000.nii.gz")
    write_image(segmentation, labels / f"{name}.nii.gz")
