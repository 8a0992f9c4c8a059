"""Finding the volumes in folders, and the error for pools that cannot be made of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.pool.header_index import HeaderIndex
from nnunetv2_misfm.pool.headers import HEADERS_WORTH_A_PROCESS, header_reader
from nnunetv2_misfm.pool.listing import FileGroup, Listing, list_archive
from nnunetv2_misfm.pool.share import WHOLE
from nnunetv2_misfm.pool.volume_files import LeftOut
from nnunetv2_misfm.pool.volumes import Volume, headers_of, joined_series, outcomes, with_own_names
from nnunetv2_misfm.progress import progress_bar
from nnunetv2_misfm.units import format_bytes


class PoolError(UserError):
    """A pool cannot be made or continued; the message says why and what to do."""


@dataclass(frozen=True)
class PoolInspection:
    """What lies in the folders, as far as the headers tell."""

    volumes: tuple[Volume, ...]
    """Usable so far, sorted by case name; their voxels are judged while the pool is prepared."""
    left_out: tuple[LeftOut, ...]
    passed_over: Counter[str]
    """Number of files that are no volumes, by ending."""
    num_files: int = 0
    """In the whole archive, that may be (parts of) volumes."""
    token: str = ""
    """Differs between archives of different folders or numbers of files."""

    @property
    def num_channels(self) -> int:
        """Of most volumes; the others cannot go into the same pool. Label maps beside images have the fewer."""
        counts = Counter(volume.num_channels for volume in self.volumes)
        return min(counts, key=lambda channels: (-counts[channels], -channels)) if counts else 0

    def summary(self) -> str:
        """Counts, sizes, spacings and reasons, as several lines of text."""
        lines = [f"Found {len(self.volumes)} volumes, {format_bytes(sum(v.num_bytes for v in self.volumes))}"]
        if self.volumes:
            lines += [
                f"  formats: {_counts(v.format for v in self.volumes)}",
                f"  channels: {_counts(v.num_channels for v in self.volumes)}",
                f"  orientation as stored: {_counts(v.orientation for v in self.volumes)}",
                f"  DICOM modality: {_counts(v.dicom_modality or 'not given' for v in self.volumes)}",
                _spread("size (z, y, x) in voxels", [v.shape for v in self.volumes]),
                _spread("spacing (z, y, x) in mm", [v.spacing for v in self.volumes]),
            ]
        if self.left_out:
            lines.append(f"Left out {len(self.left_out)}:")
            lines += [f"  {left_out.source}: {left_out.reason}" for left_out in self.left_out[:10]]
            lines += [f"  ... and {len(self.left_out) - 10} more, see report.csv"] if len(self.left_out) > 10 else []
        if self.passed_over:
            lines.append(f"Other files passed over: {_counts(self.passed_over.elements())}")
        return "\n".join(lines)


def find_volumes(
    folders: Sequence[Path],
    join_channels: bool = True,
    num_processes: int = 1,
    bundles: range = WHOLE.bundles,
    index: HeaderIndex | None = None,
    listing: Listing | None = None,
) -> PoolInspection:
    """Find volumes below the folders, reading headers only; about 1 ms per DICOM file and 2 ms per NIfTI file.

    A DICOM series that lies in several folders is one volume if all of them are in these bundles; else each folder is
    taken by itself, which `joined_series` mends.

    Args:
        folders: searched with everything below them; single files are taken too.
        join_channels: join files that end in `_0000`, `_0001`, ... as nnU-Net does.
        num_processes: processes to read headers with, used from a few thousand files on.
        bundles: of `share.py`; only what is in them is found.
        index: of the headers that are known already.
        listing: of the folders for these bundles, if they are listed already.

    Raises:
        UserError: naming every folder that does not exist.
    """
    listing = listing or list_archive(folders, join_channels, bundles)
    index = index or HeaderIndex(None, bundles)
    outcome: list[Volume | LeftOut] = list(listing.left_out)
    in_groups: dict[str, list[FileGroup]] = defaultdict(list)
    num_files = sum(len(group.files) for groups in listing.groups.values() for group in groups)
    few = num_files < HEADERS_WORTH_A_PROCESS
    with (
        header_reader(num_files, num_processes) as read,
        progress_bar(num_files, "Reading headers", unit="file", disable=few) as bar,
    ):
        for bundle, groups in sorted(listing.groups.items()):
            for group, found in outcomes(bundle, groups, index, read):
                for series in {one.series for one in found if one.series}:
                    in_groups[series].append(group)
                outcome += found
                bar.update(len(group.files))
        spread = {series for series, groups in in_groups.items() if len(groups) > 1}
        outcome = [one for one in outcome if one.series not in spread]
        outcome += joined_series(headers_of(in_groups, spread, index, read), spread)
    return PoolInspection(
        tuple(with_own_names([one for one in outcome if isinstance(one, Volume)], {})),
        tuple(one for one in outcome if isinstance(one, LeftOut)),
        listing.passed_over,
        listing.num_files,
        listing.token,
    )


def _counts(values: Iterable[object]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(8))


def _spread(name: str, rows: Sequence[Sequence[float]]) -> str:
    low, middle, high = (np.percentile(rows, q, axis=0) for q in (0, 50, 100))
    shown = [" x ".join(f"{value:.4g}" for value in values) for values in (middle, low, high)]
    return f"  {name}: median {shown[0]}, from {shown[1]} to {shown[2]}"
