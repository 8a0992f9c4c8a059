"""Finding the volumes in folders of medical images: files, DICOM series and nnU-Net channels, from headers alone.

Every volume is described in canonical axis order: array axes (z, y, x) = (inferior to superior, posterior to
anterior, left to right), which is what nnU-Net's readers `SimpleITKIOWithReorient` and `NibabelIOWithReorient` give.
So axis 0 is the axial slice axis, however a volume was stored.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunetv2_misfm.pool.dicom_series import Series, sort_series
from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.headers import Header, read_headers
from nnunetv2_misfm.pool.volume_files import LeftOut, case_name, find_files, split_ending

MOST_CHANNELS_OF_A_LONE_VOLUME = 4
"""`scan_0000` to `scan_0099` in a folder of their own are rather a hundred numbered scans than a hundred channels."""


@dataclass(frozen=True)
class Volume:
    """One image, perhaps of several channels, that can go into a pool as far as its headers tell."""

    case: str
    """Its name in the pool."""
    channels: tuple[tuple[str, ...], ...]
    """Per channel the files to read: one, or the slices of a DICOM series in order along the slice axis."""
    source: str
    """Where it comes from, for people; unique."""
    format: str
    grid: Grid
    """As the headers describe it, before anything is straightened."""
    dicom_modality: str | None
    num_bytes: int
    """Of all its files."""
    modified_ns: int
    """When the last of its files was changed, in ns since 1970."""

    @property
    def num_channels(self) -> int:
        return len(self.channels)

    @property
    def orientation(self) -> str:
        """Where the stored axes x, y, z point to, e.g. RAS."""
        return self.grid.orientation

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Array shape without reorientation, slowest stored axis first."""
        return self.grid.size[::-1]

    @property
    def stored_spacing(self) -> tuple[float, ...]:
        """mm, in the order of `stored_shape`."""
        return self.grid.spacing[::-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along the canonical axes (z, y, x)."""
        return tuple(self.stored_shape[axis] for axis in self.grid.upright_axes)

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm along the canonical axes (z, y, x)."""
        return tuple(self.stored_spacing[axis] for axis in self.grid.upright_axes)


@dataclass
class FoundVolumes:
    volumes: list[Volume] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files that are no volumes, by ending."""


def find_volumes(folders: Sequence[Path], join_channels: bool = True, num_processes: int = 1) -> FoundVolumes:
    """Find all volumes below the folders, reading headers only.

    Args:
        folders: searched with everything below them; single files are taken too.
        join_channels: join files that end in `_0000`, `_0001`, ... as nnU-Net does.
        num_processes: processes to read headers with, used from a few thousand files on.

    Returns:
        The volumes, sorted by case name, and everything that was left out with its reason.

    Raises:
        UserError: naming every folder that does not exist.
    """
    files = find_files(folders)
    headers, unreadable = read_headers(files.files, num_processes)
    series, broken_series = sort_series([header for header in headers if header.file.format == "DICOM"])
    images, without_partner = _join_channels(
        [header for header in headers if header.file.format != "DICOM"], join_channels
    )
    volumes: dict[str, Volume] = {}
    left_out = [*files.left_out, *unreadable, *broken_series, *without_partner]
    for one in [*(_from_series(one) for one in series), *(_from_images(group, stem) for stem, group in images)]:
        if one.case in volumes:  # two patients in one folder, to whom an anonymiser gave one series
            one = dataclasses.replace(one, case=case_name(one.case.rpartition("-")[0], one.channels[0][0]))
        volumes[one.case] = one
    return FoundVolumes([volumes[case] for case in sorted(volumes)], left_out, files.passed_over)


def _from_series(series: Series) -> Volume:
    first = min(series.headers, key=lambda header: header.file.key.rpartition("/")[0])  # mostly all lie in one folder
    stem = Path(first.file.folder).name if len(series.headers) > 1 else split_ending(first.file.path)[0]
    key_of_folder = first.file.key.rpartition("/")[0]
    key = f"{key_of_folder}/{series.uid}" if len(series.headers) > 1 else first.file.key
    return _make_volume(case_name(stem, key), [series.headers], series.source, series.grid, series.modality)


def _from_images(group: Sequence[Header], stem: str) -> Volume:
    first = group[0]
    source = "; ".join(header.file.path for header in group)
    return _make_volume(case_name(stem, first.file.key), [(header,) for header in group], source, _grid(first), None)


def _make_volume(
    case: str, channels: Sequence[Sequence[Header]], source: str, grid: Grid, modality: str | None
) -> Volume:
    headers = [header for channel in channels for header in channel]
    return Volume(
        case=case,
        channels=tuple(tuple(header.file.path for header in channel) for channel in channels),
        source=source,
        format=headers[0].file.format,
        grid=grid,
        dicom_modality=modality,
        num_bytes=sum(header.num_bytes for header in headers),
        modified_ns=max(header.modified_ns for header in headers),
    )


def _join_channels(images: Sequence[Header], join: bool) -> tuple[list[tuple[str, list[Header]]], list[LeftOut]]:
    """Group image files into volumes: (stem, one header per channel) each, and the incomplete groups.

    A folder's files are channels when all of them end in four digits and most names have the same digits 0000 to
    000N and one geometry per name. A name in such a folder that differs is left out.
    """
    folders: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in images:
        folders[header.file.folder, split_ending(header.file.path)[1]].append(header)
    volumes: list[tuple[str, list[Header]]] = []
    left_out = []
    for headers in folders.values():
        names = _channels_by_name(headers) if join else None
        expected = _usual_channels(names) if names else None
        if names is None or expected is None:
            volumes += [(split_ending(header.file.path)[0], [header]) for header in headers]
            continue
        for name, channels in names.items():
            group = [channels[number] for number in sorted(channels)]
            if tuple(sorted(channels)) == expected and _same_geometry(group):
                volumes.append((name, group))
                continue
            problem = f"its channels {_listed(sorted(channels))} are not {_listed(expected)} like the others' here"
            if tuple(sorted(channels)) == expected:
                problem = "its channels differ in size, spacing or position"
            left_out.append(LeftOut("; ".join(header.file.path for header in group), problem))
    return volumes, left_out


def _channels_by_name(headers: Sequence[Header]) -> dict[str, dict[int, Header]] | None:
    names: dict[str, dict[int, Header]] = defaultdict(dict)
    for header in headers:
        match = re.fullmatch(r"(.+)_(\d{4})", split_ending(header.file.path)[0])
        if match is None:
            return None
        names[match[1]][int(match[2])] = header
    return names


def _usual_channels(names: dict[str, dict[int, Header]]) -> tuple[int, ...] | None:
    """The channel numbers most names have, if they are 0 to N and fit together; None if these are no channels."""
    counts = Counter(tuple(sorted(channels)) for channels in names.values())
    expected, _ = counts.most_common(1)[0]
    if expected != tuple(range(len(expected))):
        return None
    if len(names) == 1 and len(expected) > MOST_CHANNELS_OF_A_LONE_VOLUME:
        return None
    fitting = sum(
        tuple(sorted(channels)) == expected and _same_geometry(list(channels.values())) for channels in names.values()
    )
    return expected if fitting > len(names) / 2 else None


def _same_geometry(group: Sequence[Header]) -> bool:
    first = _grid(group[0])
    return all(
        grid.size == first.size
        and np.allclose(grid.spacing, first.spacing)
        and np.allclose(grid.direction, first.direction, atol=1e-3)
        and np.allclose(grid.origin, first.origin, atol=max(first.spacing))
        for grid in map(_grid, group[1:])
    )


def _grid(header: Header) -> Grid:
    assert header.grid is not None
    return header.grid


def _listed(channels: Sequence[int]) -> str:
    return ", ".join(f"_{number:04d}" for number in channels)
