"""What files amount to as volumes: single images, DICOM series and nnU-Net channels, from headers alone.

Every volume is described in canonical axis order: array axes (z, y, x) = (inferior to superior, posterior to
anterior, left to right), which is what nnU-Net's readers `SimpleITKIOWithReorient` and `NibabelIOWithReorient` give.
So axis 0 is the axial slice axis, however a volume was stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_misfm.pool.channels import grid_of, join_channels
from nnunetv2_misfm.pool.dicom_series import Series, sort_series
from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.header_index import HeaderIndex
from nnunetv2_misfm.pool.headers import NEVER, Header, HeaderReader
from nnunetv2_misfm.pool.listing import FileGroup
from nnunetv2_misfm.pool.volume_files import LeftOut, VolumeFile, case_name, split_ending


@dataclass(frozen=True)
class Volume:
    """One image, perhaps of several channels, that can go into a pool as far as its headers tell."""

    case: str
    """Its name in the pool."""
    channels: tuple[tuple[str, ...], ...]
    """Per channel the files to read: one, or the slices of a DICOM series in order along the slice axis."""
    source: str
    """Where it comes from, for people; absolute and unique."""
    format: str
    grid: Grid
    """As the headers describe it, before anything is straightened."""
    dicom_modality: str | None
    num_bytes: int
    """Of all its files."""
    modified_ns: int
    """When the last of its files was changed, in ns since 1970."""
    bundle: int = 0
    """Of its first file; `share.py` says what that is."""
    series: str = ""
    """Hash of patient and SeriesInstanceUID, by which files in other folders are found; empty if there can be none."""
    bundles: tuple[int, ...] = ()
    """Of all files of such a series."""

    @property
    def own_name(self) -> str:
        """What it is called where a volume of another place has its name."""
        return case_name(self.case.rpartition("-")[0], self.source)

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


def joined_series(headers: Iterable[Header], wanted: Collection[str]) -> list[Volume | LeftOut]:
    """What the wanted series (as in `Volume`) amount to, which lie in several folders, from all their headers."""
    chosen = [header for header in headers if series_hash(header) in wanted]
    return _series_of(sorted(chosen, key=lambda header: header.file.key))


def with_own_names(volumes: Iterable[Volume], others: Mapping[str, str]) -> list[Volume]:
    """Volumes sorted by case name, each with a name of its own; `others` has the series of cases beside them.

    Two patients may lie in one folder, to whom an anonymiser gave one series.
    """
    named: dict[str, Volume] = {}
    for one in volumes:
        if one.case in named or others.get(one.case, one.series) != one.series:
            one = dataclasses.replace(one, case=case_name(one.case.rpartition("-")[0], one.channels[0][0]))
        named[one.case] = one
    return [named[case] for case in sorted(named)]


def series_hash(header: Header) -> str:
    """What `Volume.series` holds for a file; empty for a file that is a volume of its own or does not say."""
    dicom = header.dicom
    if dicom is None or dicom.num_frames > 1 or not dicom.series:
        return ""
    text = f"{dicom.patient}\0{dicom.series}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _volumes_of(headers: Sequence[Header], usual_channels: Sequence[int] | None) -> list[Volume | LeftOut]:
    """What the files of one group amount to."""
    readable = [header for header in headers if not header.problem]
    found: list[Volume | LeftOut] = [
        LeftOut(header.file.path, header.problem, header.file.bundle) for header in headers if header.problem
    ]
    if headers[0].file.format == "DICOM":
        return found + _series_of(readable)
    images, without_partner = join_channels(readable, usual_channels)
    return [*found, *without_partner, *(_from_images(group, stem) for stem, group in images)]


def outcomes(
    bundle: int, groups: Sequence[FileGroup], index: HeaderIndex, read: HeaderReader
) -> Iterator[tuple[FileGroup, list[Volume | LeftOut]]]:
    """What the groups of a bundle amount to, from what is known of them or else from their headers."""
    known = index.outcomes(bundle)
    states = [group.state() for group in groups]
    new = [file for group, state in zip(groups, states, strict=True) if state not in known for file in group.files]
    headers = iter(index.headers(bundle, new, read) if new else ())
    fresh = {}
    for group, state in zip(groups, states, strict=True):
        if state in known:
            yield group, [_from_json(one, group.files[0].folder) for one in known[state]]
            continue
        of_group = [next(headers) for _ in group.files]
        found = _volumes_of(of_group, group.usual_channels)
        if state and all(header.modified_ns != NEVER for header in of_group):
            fresh[state] = [_as_json(one) for one in found]
        yield group, found
    index.keep_outcomes(bundle, fresh)


def _as_json(one: Volume | LeftOut) -> Any:
    if isinstance(one, LeftOut):
        return list(vars(one).values())
    return volume_as_json(one) | {"channels": [list(map(os.path.basename, channel)) for channel in one.channels]}


def _from_json(content: Any, folder: str) -> Volume | LeftOut:
    if isinstance(content, list):
        return LeftOut(*content)
    folder = os.path.join(folder, "")
    channels = [[folder + name for name in channel] for channel in content["channels"]]
    return volume_from_json(content | {"channels": channels})


def volume_as_json(volume: Volume) -> dict[str, Any]:
    """A volume as JSON holds it, without its files."""
    grid = [list(value) for value in vars(volume.grid).values()]
    return {**vars(volume), "channels": [[]] * volume.num_channels, "grid": grid, "bundles": list(volume.bundles)}


def volume_from_json(content: Mapping[str, Any]) -> Volume:
    """The volume of which this is the JSON."""
    grid = Grid(*map(tuple, content["grid"]))
    channels, bundles = tuple(map(tuple, content["channels"])), tuple(content["bundles"])
    return Volume(**{**content, "channels": channels, "grid": grid, "bundles": bundles})


def headers_of(
    groups: Mapping[str, Sequence[FileGroup]], series: Collection[str], index: HeaderIndex, read: HeaderReader
) -> Iterator[Header]:
    by_bundle: dict[int, dict[VolumeFile, None]] = defaultdict(dict)
    for file in (file for one in series for group in groups[one] for file in group.files):
        by_bundle[file.bundle][file] = None
    for bundle, files in by_bundle.items():
        yield from (header for header in index.headers(bundle, list(files), read) if series_hash(header) in series)


def _series_of(headers: Sequence[Header]) -> list[Volume | LeftOut]:
    series, broken = sort_series(headers)
    described = Counter(one.source for one in series)
    # Two patients to whom an anonymiser gave one series, with as many files.
    series = [
        dataclasses.replace(one, source=f"{one.source} from {one.headers[0].file.path}")
        if described[one.source] > 1
        else one
        for one in series
    ]
    left_out = [LeftOut(source, reason, first.file.bundle, series_hash(first)) for source, reason, first in broken]
    return [*map(_from_series, series), *left_out]


def _from_series(series: Series) -> Volume:
    first = min(series.headers, key=lambda header: header.file.key.rpartition("/")[0])  # mostly all lie in one folder
    stem = Path(first.file.folder).name if len(series.headers) > 1 else split_ending(first.file.path)[0]
    key_of_folder = first.file.key.rpartition("/")[0]
    key = f"{key_of_folder}/{series.uid}" if len(series.headers) > 1 else first.file.key
    volume = _make_volume(case_name(stem, key), [series.headers], series.source, series.grid, series.modality)
    bundles = tuple(sorted({header.file.bundle for header in series.headers}))
    return dataclasses.replace(volume, bundle=first.file.bundle, series=series_hash(first), bundles=bundles)


def _from_images(group: Sequence[Header], stem: str) -> Volume:
    first = group[0]
    source = "; ".join(header.file.path for header in group)
    return _make_volume(case_name(stem, first.file.key), [(h,) for h in group], source, grid_of(first), None)


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
        bundle=headers[0].file.bundle,
    )
