"""DICOM files put together into series, and series read as volumes: frames in order, on one regular grid."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_misfm.pool.dicom_frames import (
    GEOMETRY_TAGS,
    PIXEL_TAGS,
    DicomHeader,
    Frame,
    dicom_header,
    read_dataset,
)
from nnunetv2_misfm.pool.dicom_pixels import scaled_frames
from nnunetv2_misfm.pool.grid import STRAIGHT_WITHIN_VOXELS, Grid, make_grid
from nnunetv2_misfm.pool.headers import Header
from nnunetv2_misfm.pool.volume_files import VolumeProblem

SLICE_GAP_TOLERANCE = 0.1
"""How far the distances of neighbouring slices may be from their median, or else slices from even positions, relative
to the distance."""
SAME_POSITION = 1e-3
"""Slices closer than this, in mm, lie at the same place."""


@dataclass(frozen=True)
class Stack:
    """Frames that make one regular grid, in order along the normal of their planes."""

    order: tuple[tuple[int, int], ...]
    """Number of the file and of the frame in it."""
    grid: Grid
    mended: str
    """What had to be done to the frames, for the report; empty if nothing."""


@dataclass(frozen=True)
class Series:
    """The files of one volume in order along the slice axis; a multi-frame file is a series of its own."""

    headers: tuple[Header, ...]
    grid: Grid
    source: str

    @property
    def uid(self) -> str:
        return _dicom(self.headers[0]).series

    @property
    def modality(self) -> str | None:
        return _dicom(self.headers[0]).modality


def sort_series(headers: Sequence[Header]) -> tuple[list[Series], list[tuple[str, str, Header]]]:
    """Group DICOM files by SeriesInstanceUID and order their slices.

    Files belong together that lie in one folder. Where archives keep one series in several folders, they are put
    together if their identifiers leave no doubt and they make one regular grid, each slice once. Folders that hold the
    whole series each, as copies do, are volumes of their own, and what holds a part of it besides is left out.

    Returns:
        The series that make up a volume, and those that do not: source, reason and the first file.
    """
    series, left_out = [], []
    for in_folders in _groups(headers):
        groups, parts = _without_parts(in_folders)
        left_out += parts
        whole = [header for group in groups for header in group]
        together, problem = _try(whole, len(groups)) if _is_split(groups) else (None, "")
        if together is not None:
            series.append(together)
            continue
        for group in groups:
            alone, problem_alone = _try(group, 1)
            if alone is not None:
                series.append(alone)
                continue
            if problem and len(group) == 1:
                problem_alone = f"one of {_described(whole, len(groups))} that make no volume together: {problem}"
            left_out.append((_source(group, 1), problem_alone, group[0]))
    return series, left_out


def read_series(paths: Sequence[str]) -> tuple[np.ndarray, Grid, str]:
    """Read the files of one series, each once.

    Returns:
        voxels (Z, Y, X) float32 along the normal of the planes, their grid, and what had to be mended.

    Raises:
        VolumeProblem: if they cannot be read or do not make one regular grid.
    """
    datasets = [read_dataset(path, [*GEOMETRY_TAGS, *PIXEL_TAGS]) for path in paths]
    headers = [dicom_header(dataset) for dataset in datasets]
    stack = stack_frames(headers)
    place = {frame: number for number, frame in enumerate(stack.order)}
    voxels = np.empty(stack.grid.size[::-1], np.float32)
    for number, (dataset, header) in enumerate(zip(datasets, headers, strict=True)):
        try:
            for frame, plane in zip(header.frames, scaled_frames(dataset, header.frames), strict=True):
                voxels[place[number, frame.number]] = plane
        except VolumeProblem as problem:
            name = os.path.basename(paths[number])
            raise VolumeProblem(f"{problem}" if len(paths) == 1 else f"{problem} ({name})") from problem
    return voxels, stack.grid, stack.mended


def stack_frames(headers: Sequence[DicomHeader]) -> Stack:
    """Order the frames of a series by position and find the grid they lie on.

    Raises:
        VolumeProblem: if they are no scan of a volume, or do not lie on one regular grid.
    """
    for header in headers:
        if header.problem:
            raise VolumeProblem(header.problem)
    kernels = sorted({header.kernel for header in headers})
    if len(kernels) > 1:
        raise VolumeProblem(f"several reconstructions under one SeriesInstanceUID ({', '.join(kernels)})")
    frames = [(number, frame) for number, header in enumerate(headers) for frame in header.frames]
    first = frames[0][1]
    if len(frames) == 1:
        raise VolumeProblem("2D: a DICOM series of one slice")
    _check_alike([frame for _, frame in frames])
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if not np.allclose([row @ row, column @ column, row @ column], (1, 1, 0), atol=0.02):
        raise VolumeProblem(
            f"DICOM orientation (0020,0037) is no pair of directions at right angles: {first.orientation}"
        )
    normal = np.cross(row, column)
    positions = np.array([frame.position for _, frame in frames])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    gap = _even_gap(along[order])
    step = normal * gap + _drift(positions[order], along[order], normal, min(first.spacing)) * gap
    length = float(np.linalg.norm(step))
    is_straight = np.allclose(step, normal * gap)
    grid = make_grid(
        size=(*first.size, len(frames)),
        spacing=(*first.spacing, gap if is_straight else length),
        direction=np.stack([row, column, normal if is_straight else step / length], axis=1),
        origin=positions[order[0]],
    )
    return Stack(tuple((frames[i][0], frames[i][1].number) for i in order), grid, _mended(headers, frames, order))


def _even_gap(along: np.ndarray) -> float:
    """The distance of slices whose positions (mm, ascending) these are.

    Raises:
        VolumeProblem: if they are not evenly spaced.
    """
    gaps = np.diff(along)
    if np.any(gaps < SAME_POSITION):
        raise VolumeProblem("4D: several DICOM images at the same slice position; split them into one series each")
    gap = float(gaps.mean())
    # Positions that were rounded are near those of even gaps, though some gaps are not.
    off_line = np.abs(along - along[0] - gap * np.arange(len(along)))
    uneven = np.abs(gaps - np.median(gaps)) > SLICE_GAP_TOLERANCE * np.median(gaps)
    if uneven.any() and off_line.max() > SLICE_GAP_TOLERANCE * gap:
        raise VolumeProblem(
            f"DICOM slices missing or unevenly spaced: distances from {gaps.min():.4g} to {gaps.max():.4g} mm"
        )
    return gap


def _drift(positions: np.ndarray, along: np.ndarray, normal: np.ndarray, pixel: float) -> np.ndarray:
    """How far slices move within their plane for each mm along the normal, as with a tilted gantry; 0 if hardly.

    Raises:
        VolumeProblem: if they do not move steadily.
    """
    in_plane = positions - along[:, None] * normal
    in_plane = in_plane - in_plane[0]
    distance = along - along[0]
    drift = distance @ in_plane / (distance @ distance)
    if np.linalg.norm(in_plane - distance[:, None] * drift, axis=1).max() > STRAIGHT_WITHIN_VOXELS * pixel:
        jump = float(np.linalg.norm(np.diff(in_plane, axis=0), axis=1).max())
        raise VolumeProblem(
            f"DICOM slices that do not lie on each other: neighbours are up to {jump:.3g} mm apart in plane"
        )
    moved = float(np.linalg.norm(drift) * distance[-1])
    return drift if moved > STRAIGHT_WITHIN_VOXELS * pixel else np.zeros(3)


def _check_alike(frames: Sequence[Frame]) -> None:
    first = frames[0]
    if any(frame.size != first.size for frame in frames) or not np.allclose(
        [frame.orientation for frame in frames], first.orientation, atol=1e-3
    ):
        raise VolumeProblem("DICOM slices of different sizes or orientations under one SeriesInstanceUID")
    spacings = np.array([frame.spacing for frame in frames])
    if not np.allclose(spacings, first.spacing, rtol=1e-3):
        low, high = spacings.min(), spacings.max()
        raise VolumeProblem(
            f"DICOM slices of different pixel spacings under one SeriesInstanceUID, {low:g} to {high:g} mm"
        )
    if any(frame.slope == 0 for frame in frames):
        raise VolumeProblem("DICOM RescaleSlope 0, which makes every value the same")


def _mended(headers: Sequence[DicomHeader], frames: Sequence[tuple[int, Frame]], order: np.ndarray) -> str:
    notes = []
    if headers[0].num_frames > 1 and not np.array_equal(order, np.arange(len(order))):
        notes.append("frames sorted by position")
    scales = len({(frame.slope, frame.intercept) for _, frame in frames})
    if scales > 1:
        notes.append(f"slices scaled one by one ({scales} different slopes and intercepts)")
    return "; ".join(notes)


def _groups(headers: Sequence[Header]) -> list[list[list[Header]]]:
    """Files by series, and those of one series by folder. A file of many frames is a series of its own."""
    series: dict[tuple[str, ...], dict[str, list[Header]]] = defaultdict(lambda: defaultdict(list))
    for header in headers:
        dicom = _dicom(header)
        key = (header.file.path,) if dicom.num_frames > 1 else (dicom.patient, dicom.series)
        series[key][header.file.folder].append(header)
    return [list(folders.values()) for folders in series.values()]


def _without_parts(groups: list[list[Header]]) -> tuple[list[list[Header]], list[tuple[str, str, Header]]]:
    """Without folders that hold a part of a series of which another folder makes the whole volume, and these."""
    if len(groups) == 1:
        return groups, []
    slices = _without_copies([header for group in groups for header in group])
    missing = [len(slices) - len(_without_copies(group)) for group in groups]
    parts = [group for group, count in zip(groups, missing, strict=True) if count]
    complete = [group for group, count in zip(groups, missing, strict=True) if not count]
    whole = next((group for group in complete if parts and _try(group, 1)[0] is not None), None)
    if whole is None or not _is_one_series(slices):
        return groups, []
    reason = f"a part of a DICOM series that is whole in {_source(whole, 1)}"
    return complete, [(_source(part, 1), reason, part[0]) for part in parts]


def _is_split(groups: Sequence[Sequence[Header]]) -> bool:
    """Whether identifiers leave no doubt that files of several folders are one series, which is whole in none."""
    if len(groups) == 1:
        return False
    slices = _without_copies([header for group in groups for header in group])
    return all(len(_without_copies(group)) < len(slices) for group in groups) and _is_one_series(slices)


def _is_one_series(group: Sequence[Header]) -> bool:
    """Whether these are slices of one series: all identifiers are given, none twice."""
    instances = [_dicom(header).instance for header in group]
    return bool(_dicom(group[0]).series) and all(instances) and len(set(instances)) == len(instances)


def _try(group: Sequence[Header], num_folders: int) -> tuple[Series | None, str]:
    slices = _without_copies(group)
    try:
        stack = stack_frames([_dicom(header) for header in slices])
    except VolumeProblem as problem:
        return None, str(problem)
    ordered = tuple(slices[number] for number in dict.fromkeys(number for number, _ in stack.order))
    return Series(ordered, stack.grid, _source(group, num_folders)), ""


def _without_copies(group: Sequence[Header]) -> list[Header]:
    """Without files of which there is another copy: the same SOPInstanceUID.

    Anonymisers that give all files one UID, or none, make no copies of them: then files of one UID differ in position.
    """
    positions: dict[str, set[tuple[float, ...]]] = defaultdict(set)
    for header in group:
        positions[_dicom(header).instance].update(frame.position for frame in _dicom(header).frames)
    if any(len(of_instance) > max(1, _dicom(group[0]).num_frames) for of_instance in positions.values()):
        return list(group)
    first: dict[str, Header] = {}
    for header in group:
        first.setdefault(_dicom(header).instance or header.file.path, header)
    return list(first.values())


def _source(group: Sequence[Header], num_folders: int) -> str:
    if len(group) == 1:
        return group[0].file.path
    return f"{os.path.commonpath([header.file.folder for header in group])} [{_described(group, num_folders)}]"


def _described(group: Sequence[Header], num_folders: int) -> str:
    folders = f" in {num_folders} folders" if num_folders > 1 else ""
    return f"series {_dicom(group[0]).series or 'without SeriesInstanceUID'}, {len(group)} files{folders}"


def _dicom(header: Header) -> DicomHeader:
    assert header.dicom is not None
    return header.dicom
