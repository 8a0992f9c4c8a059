"""Image files that are channels of one volume, as nnU-Net names them: all end in _0000, _0001, ..."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.headers import Header
from nnunetv2_misfm.pool.volume_files import LeftOut, split_ending

MOST_CHANNELS_OF_A_LONE_VOLUME = 4
"""`scan_0000` to `scan_0099` in a folder of their own are rather a hundred numbered scans than a hundred channels."""
MOST_CHANNELS = 100
"""Of any volume; files with higher numbers need not be looked at together."""


def volume_name(name: str) -> str:
    """The name of an image file without a number that may be that of a channel, so equal for all channels of a volume.

    It tells what belongs together whatever other files there are.
    """
    stem, _ = split_ending(name)
    numbered = _numbered(stem)
    return name if numbered is None or numbered[1] >= MOST_CHANNELS else numbered[0] + name[len(stem) :]


def channels_of_names(names: Iterable[str]) -> tuple[int, ...] | None:
    """The channels that volumes among these files have, by the names of all of them; None if every file is a volume.

    They are channels when all but a few names end in four digits, and most volumes have the same 0000 to 000N.
    """
    volumes: dict[str, set[int]] = defaultdict(set)
    without = 0
    for name in names:
        numbered = _numbered(split_ending(name)[0])
        if numbered is None:
            without += 1
        else:
            volumes[numbered[0]].add(numbered[1])
    if without >= len(volumes):
        return None
    counts = Counter(tuple(sorted(channels)) for channels in volumes.values())
    usual, count = counts.most_common(1)[0]
    most = MOST_CHANNELS_OF_A_LONE_VOLUME if len(volumes) == 1 else MOST_CHANNELS
    if usual != tuple(range(len(usual))) or len(usual) > most or 2 * count <= len(volumes) + without:
        return None
    return None if without and len(usual) == 1 else usual


def join_channels(
    headers: Sequence[Header], usual: Sequence[int] | None
) -> tuple[list[tuple[str, list[Header]]], list[LeftOut]]:
    """Group image files of one folder and one ending into volumes.

    A name that has other channels than usual is left out. Where the channels of a name differ in size, spacing or
    position they are none, and every file is a volume.

    Args:
        headers: of all these files, or of those that share some volume names.
        usual: what `channels_of_names` says of all files.

    Returns:
        (stem, one header per channel) of each volume, and what was left out.
    """
    if usual is None:
        return [_alone(header) for header in headers], []
    volumes: dict[str, dict[int, Header]] = defaultdict(dict)
    for header in headers:
        name, number = _numbered(split_ending(header.file.path)[0]) or (header.file.path, 0)
        volumes[name][number] = header
    joined: list[tuple[str, list[Header]]] = []
    left_out = []
    for name, channels in volumes.items():
        group = [channels[number] for number in sorted(channels)]
        if name == group[0].file.path and len(usual) > 1:
            problem = f"its name ends in no number of a channel, {_listed(usual)} like the others' here"
        elif sorted(channels) != list(usual):
            problem = f"its channels {_listed(sorted(channels))} are not {_listed(usual)} like the others' here"
        else:
            joined += [(name, group)] if _same_geometry(group) else map(_alone, group)
            continue
        left_out.append(LeftOut("; ".join(header.file.path for header in group), problem, group[0].file.bundle))
    return joined, left_out


def _numbered(stem: str) -> tuple[str, int] | None:
    """The name of a volume and the number of a channel, if a stem ends in four digits."""
    match = re.fullmatch(r"(.+)_(\d{4})", stem, re.ASCII)
    return None if match is None else (match[1], int(match[2]))


def _alone(header: Header) -> tuple[str, list[Header]]:
    """A file that is a volume of its own, called as where all files here are known to have one channel."""
    return split_ending(header.file.path)[0].removesuffix("_0000"), [header]


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
