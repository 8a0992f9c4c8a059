"""One listing of an archive for all parts of a job array: the first part that needs one writes the others' down, too.

    PART.jsonl    the groups of files in the part's share, one per line, then what is told of the whole archive

A part reads its own file alone and removes it when it is done, so that the next run lists the archive anew. Until then
a part that is started again goes on with the archive as it was listed, as all parts of that run do.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nnunetv2_misfm.files import append_json_lines, locked, read_json_lines, written_whole
from nnunetv2_misfm.pool.listing import ArchiveLister, GroupNames, Listing, list_archive
from nnunetv2_misfm.pool.share import WHOLE, Share
from nnunetv2_misfm.pool.volume_files import LeftOut

FILES_AT_ONCE = 1_000_000
"""Names that are held in memory before they are written down."""


def list_share(folder: Path, share: Share, folders: Sequence[Path], join_channels: bool) -> Listing:
    """What `list_archive` tells of a share, from the file in `folder` if an earlier part of this run has written it.

    Raises:
        UserError: naming every folder that does not exist.
    """
    if share.num_parts == 1:
        return list_archive(folders, join_channels)
    folder.mkdir(exist_ok=True)
    archive = [[str(one), os.path.abspath(one)] for one in folders] + [[join_channels]]
    with locked(folder / "listing.lock", -1.0, "another part is listing the archive"):
        listing = _read(_file(folder, share), archive)
        if listing is None:
            _write(folder, share.num_parts, folders, join_channels, archive)
            listing = _read(_file(folder, share), archive)
            assert listing is not None
    return listing


def forget_share(folder: Path, share: Share) -> None:
    """For a part that is done."""
    _file(folder, share).unlink(missing_ok=True)


def forget_all(folder: Path) -> None:
    """For a pool that is complete; parts that were never started leave theirs."""
    for path in folder.glob("part_*.jsonl"):
        path.unlink(missing_ok=True)


def _file(folder: Path, share: Share) -> Path:
    return folder / f"{share}.jsonl"


def _write(folder: Path, num_parts: int, folders: Sequence[Path], join_channels: bool, archive: Sequence[Any]) -> None:
    """List the archive, and write down the shares of all parts."""
    forget_all(folder)
    lines: dict[int, list[str]] = defaultdict(list)
    held = 0
    with ExitStack() as stack:
        files = [_file(folder, Share(num_parts, number)) for number in range(num_parts)]
        paths = [stack.enter_context(written_whole(file)) for file in files]

        def take(group: GroupNames) -> None:
            nonlocal held
            lines[group.bundle % num_parts].append(json.dumps(group, separators=(",", ":")))
            held += sum(len(names) for _, names in group.names)
            if held > FILES_AT_ONCE:
                flush()

        def flush() -> None:
            nonlocal held
            for number, of_part in lines.items():
                append_json_lines(paths[number], of_part)
            lines.clear()
            held = 0

        lister = ArchiveLister(folders, join_channels, WHOLE.bundles, take)
        copies: dict[int, list[str]] = defaultdict(list)
        for link in lister.run():
            copies[link.bundle % num_parts].append(link.path)
        left_out: dict[int, list[Any]] = defaultdict(list)
        for one in lister.left_out:
            left_out[one.bundle % num_parts].append(list(vars(one).values()))
        passed_over: dict[int, Counter[str]] = defaultdict(Counter)
        for bundle, counts in lister.passed_over.items():
            passed_over[bundle % num_parts].update(counts)
        for number in range(num_parts):
            of_whole = {"archive": archive, "num_files": lister.num_files, "token": lister.token}
            of_part = {"copies": copies[number], "left_out": left_out[number], "passed_over": passed_over[number]}
            lines[number].append(json.dumps(of_whole | of_part))
        flush()


def _read(path: Path, archive: Sequence[Any]) -> Listing | None:
    """The listing in a file; None if there is none, or one of other folders."""
    listing = Listing()
    end: Any = None
    for line in read_json_lines(path):
        if isinstance(line, dict):
            end = line
        else:
            group = GroupNames(*line)
            listing.groups[group.bundle].append(group.group())
    if end is None or end["archive"] != archive:
        return None
    listing.leave_out(set(end["copies"]))
    listing.left_out = [LeftOut(*one) for one in end["left_out"]]
    listing.passed_over = Counter(end["passed_over"])
    listing.num_files, listing.token = end["num_files"], end["token"]
    return listing
