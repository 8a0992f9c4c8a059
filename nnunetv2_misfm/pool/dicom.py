"""DICOM files put together into series, slices in order, from their headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_misfm.pool.headers import Header, VolumeProblem
from nnunetv2_misfm.pool.volume_files import LeftOut

DICOM_VOLUME_MODALITIES = ("CT", "MR", "PT", "NM", "OT")
"""Modalities whose series are scans of a volume; others are planar, films over time, labels, doses or documents."""
SLICE_GAP_TOLERANCE = 0.1
"""How far the distance of two neighbouring slices may be from the median distance, relative to it."""
SAME_POSITION = 1e-3
"""Slices closer than this, in mm, lie at the same place."""


@dataclass(frozen=True)
class Series:
    """The slices of one DICOM series (or one multi-frame file), in order along the slice axis."""

    headers: tuple[Header, ...]
    size: tuple[int, ...]
    """Voxels along (x, y, z); x and y are the rows and columns of a slice."""
    spacing: tuple[float, ...]
    """mm along (x, y, z)."""
    direction: tuple[float, ...]
    """Row-major matrix whose columns are the directions of x, y and z, in LPS."""
    source: str

    @property
    def uid(self) -> str:
        return self.headers[0].tags.get("series", "")

    @property
    def modality(self) -> str | None:
        return self.headers[0].tags.get("modality")


def sort_series(headers: Sequence[Header]) -> tuple[list[Series], list[LeftOut]]:
    """Group the DICOM files of each folder by SeriesInstanceUID and order their slices.

    Returns:
        The series that make up a volume, and those that do not, with the reason.
    """
    groups: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in headers:
        many_frames = len(header.size) > 2 and header.size[2] > 1
        name = header.file.path if many_frames else header.tags.get("series", "")
        groups[header.file.folder, name].append(header)
    series, left_out = [], []
    for (folder, _), group in groups.items():
        uid = group[0].tags.get("series", "without SeriesInstanceUID")
        source = group[0].file.path if len(group) == 1 else f"{folder} [series {uid}, {len(group)} files]"
        try:
            series.append(_make_series(group, source))
        except VolumeProblem as problem:
            left_out.append(LeftOut(source, str(problem)))
    return series, left_out


def _make_series(group: Sequence[Header], source: str) -> Series:
    first = group[0]
    modality = first.tags.get("modality")
    if modality is not None and modality not in DICOM_VOLUME_MODALITIES:
        raise VolumeProblem(f"DICOM modality {modality}; only {', '.join(DICOM_VOLUME_MODALITIES)} series are volumes")
    if len(first.size) > 2 and first.size[2] > 1:
        return Series((first,), first.size, first.spacing, first.direction, source)
    slices = list({header.tags.get("instance", header.file.path): header for header in group}.values())
    if len(slices) == 1:
        raise VolumeProblem("2D: a DICOM series of one slice")
    if any("position" not in header.tags or "orientation" not in header.tags for header in slices):
        raise VolumeProblem("DICOM slices without position or orientation (0020,0032 and 0020,0037)")
    rows_and_columns = np.array([_numbers(header.tags["orientation"], 6) for header in slices])
    alike = all(h.size == first.size and h.num_components == first.num_components for h in slices)
    if not alike or not np.allclose(rows_and_columns, rows_and_columns[0], atol=1e-3):
        raise VolumeProblem("DICOM slices of different sizes or orientations under one SeriesInstanceUID")
    row, column = rows_and_columns[0, :3], rows_and_columns[0, 3:]
    normal = np.cross(row, column)
    along = np.array([_numbers(header.tags["position"], 3) for header in slices]) @ normal
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    if np.any(gaps < SAME_POSITION):
        raise VolumeProblem("4D: several DICOM images at the same slice position; split them into one series each")
    if np.any(np.abs(gaps - np.median(gaps)) > SLICE_GAP_TOLERANCE * np.median(gaps)):
        raise VolumeProblem(
            f"DICOM slices missing or unevenly spaced: distances from {gaps.min():.4g} to {gaps.max():.4g} mm"
        )
    return Series(
        headers=tuple(slices[index] for index in order),
        size=(*first.size[:2], len(slices)),
        spacing=(*first.spacing[:2], float(gaps.mean())),
        direction=tuple(float(v) for v in np.stack([row, column, normal], axis=1).ravel()),
        source=source,
    )


def _numbers(text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split("\\")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise VolumeProblem(f"DICOM position or orientation cannot be read: {text!r}")
    return numbers
