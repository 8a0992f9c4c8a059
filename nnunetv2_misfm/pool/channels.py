"""Image files that are channels of one volume, as nnU-Net names them: all end in _0000, _0001, ..."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.headers import Header
from nnunetv2_misfm.pool.volume_files import LeftOut, split_ending

MOST_CHANNELS_OF_A_LONE_VOLUME = 4
"""`scan_0000` to `scan_0099` in a folder of their own are rather a hundred numbered scans than a hundred channels."""


def channels_by_name(names: Iterable[str]) -> dict[str, dict[int, str]] | None:
    """The names of files by the name of their volume and the number of their channel; None if these are no channels.

    A few names without a number stand for channel 0 alone among volumes of several channels, which it is no part of.
    """
    volumes: dict[str, dict[int, str]] = defaultdict(dict)
    without: list[str] = []
    for name in names:
        match = re.fullmatch(r"(.+)_(\d{4})", split_ending(name)[0])
        if match is None:
            without.append(name)
        else:
            volumes[match[1]][int(match[2])] = name
    if without:
        expected = usual_channels(volumes.values()) if len(without) < len(volumes) else None
        if expected is None or len(expected) == 1:
            return None
        volumes.update({name: {0: name} for name in without})
    return volumes


def usual_channels(volumes: Collection[Collection[int]]) -> tuple[int, ...] | None:
    """The channel numbers most volumes have, if they are 0 to N; None if these are no channels."""
    counts = Counter(tuple(sorted(channels)) for channels in volumes)
    expected, _ = counts.most_common(1)[0]
    if expected != tuple(range(len(expected))):
        return None
    if len(volumes) == 1 and len(expected) > MOST_CHANNELS_OF_A_LONE_VOLUME:
        return None
    return expected


def join_channels(
    headers: Sequence[Header], one_number: bool | None
) -> tuple[list[tuple[str, list[Header]]], list[LeftOut]]:
    """Group image files of one folder and one ending into volumes.

    They are channels when all of them but a few end in four digits and most names have the same digits 0000 to 000N
    and one geometry per name. A name that differs is left out.

    Args:
        headers: of all these files, or of some of them where `one_number` is given.
        one_number: what the names of all files tell: that every volume has the channel 0 alone (True), or that every
            file is a volume (False); None to find out.

    Returns:
        (stem, one header per channel) of each volume, and what was left out.
    """
    by_name = {header.file.path: header for header in headers}
    names = channels_by_name(by_name) if one_number is not False and headers else None
    volumes = {name: {n: by_name[path] for n, path in paths.items()} for name, paths in (names or {}).items()}
    expected = (0,) if one_number else _fitting_channels(volumes) if volumes else None
    if not volumes or expected is None:
        return [(split_ending(header.file.path)[0], [header]) for header in headers], []
    joined, left_out = [], []
    for name, channels in volumes.items():
        group = [channels[number] for number in sorted(channels)]
        if tuple(sorted(channels)) == expected and _same_geometry(group):
            joined.append((name, group))
            continue
        problem = f"its channels {_listed(sorted(channels))} are not {_listed(expected)} like the others' here"
        if name in by_name:
            problem = f"its name ends in no number of a channel, {_listed(expected)} like the others' here"
        if tuple(sorted(channels)) == expected:
            problem = "its channels differ in size, spacing or position"
        left_out.append(LeftOut("; ".join(header.file.path for header in group), problem, group[0].file.bundle))
    return joined, left_out


def _fitting_channels(volumes: Mapping[str, Mapping[int, Header]]) -> tuple[int, ...] | None:
    """The usual channels if those of most volumes fit together."""
    expected = usual_channels([channels.keys() for channels in volumes.values()])
    fitting = sum(
        tuple(sorted(channels)) == expected and _same_geometry(list(channels.values())) for channels in volumes.values()
    )
    return expected if fitting > len(volumes) / 2 else None


def _same_geometry(group: Sequence[Header]) -> bool:
    first = grid_of(group[0])
    return all(
        grid.size == first.size
        and np.allclose(grid.spacing, first.spacing)
        and np.allclose(grid.direction, first.direction, atol=1e-3)
        and np.allclose(grid.origin, first.origin, atol=max(first.spacing))
        for grid in map(grid_of, group[1:])
    )


def grid_of(header: Header) -> Grid:
    """The grid of an image file."""
    assert header.grid is not None
    return header.grid


def _listed(channels: Sequence[int]) -> str:
    return ", ".join(f"_{number:04d}" for number in channels)
