"""Small synthetic volumes on disk, in all formats a pool takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

LPS_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
DEFAULT_SHAPE = (20, 24, 28)


def ct(seed: int = 0, shape: Sequence[int] = DEFAULT_SHAPE) -> np.ndarray:
    """A noisy body of soft tissue with a lung, surrounded by air; Hounsfield units, axes (z, y, x)."""
    generator = np.random.default_rng(seed)
    radius = _radius(shape, (0.5, 0.5, 0.5))
    volume = np.where(radius < 0.8, 40.0, -1000.0)
    volume[_radius(shape, (0.5, 0.5, 0.35)) < 0.3] = -850.0
    return np.rint(volume + generator.normal(0, 15, shape)).astype(np.int16)


def mr(seed: int = 0, shape: Sequence[int] = DEFAULT_SHAPE) -> np.ndarray:
    """A noisy bright ellipsoid on a dark background; no value below 0, none exactly 0; axes (z, y, x)."""
    generator = np.random.default_rng(seed)
    volume = np.where(_radius(shape, (0.5, 0.5, 0.5)) < 0.8, 400.0, 20.0)
    return np.rint(np.abs(volume + generator.normal(0, 10, shape)) + 1).astype(np.int16)


def labels(shape: Sequence[int] = DEFAULT_SHAPE) -> np.ndarray:
    """A label map with three labels; axes (z, y, x)."""
    volume = np.zeros(shape, np.uint8)
    for value, size in ((1, 0.8), (2, 0.5), (3, 0.25)):
        volume[_radius(shape, (0.5, 0.5, 0.5)) < size] = value
    return volume


def write(
    path: Path,
    voxels: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    direction: Sequence[float] = LPS_DIRECTION,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
) -> Path:
    """Write an array (z, y, x) with its spacing in the same order, in the format of the file's ending."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(mm) for mm in spacing][::-1])
    image.SetDirection(direction)
    image.SetOrigin(origin)
    return write_image(path, image)


def write_image(path: Path, image: sitk.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=not path.name.endswith((".nii", ".mhd")))
    return path


def write_dicom(
    folder: Path,
    voxels: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    modality: str = "MR",
    series: str = "1.2.3.4",
    positions: Sequence[float] | None = None,
    prefix: str = "",
) -> list[Path]:
    """Write an axial series, one file per slice, named in the reverse of their order in space."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    files = []
    for index, plane in enumerate(voxels):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((float(spacing[2]), float(spacing[1]), float(spacing[0])))
        z = index * spacing[0] if positions is None else positions[index]
        for tag, value in {
            "0008|0060": modality,
            "0008|0018": f"{series}.{index + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(index + 1),
            "0020|0032": f"0\\0\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": f"{spacing[1]}\\{spacing[2]}",
        }.items():
            image.SetMetaData(tag, value)
        path = folder / f"{prefix}{len(voxels) - index:04d}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(image)
        files.append(path)
    return files


def cut_short(path: Path, target: Path, share: float = 0.6) -> Path:
    """A copy of which only the first part arrived."""
    content = path.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def _radius(shape: Sequence[int], centre: Sequence[float]) -> np.ndarray:
    axes = [(np.arange(n) + 0.5) / n - c for n, c in zip(shape, centre, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return 2 * np.sqrt(z**2 + y**2 + x**2)
