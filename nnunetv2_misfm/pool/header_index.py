"""The headers of an archive, kept so that a file is opened once: it is known by its path, size and date.

One file of JSON lines per bundle (`share.py`), written by the part that looks after the bundle and read by any:

    {"folder": PATH, "key": KEY, "files": {NAME: [size, date, header], ...}}

A second file per bundle keeps what groups of files amounted to, so that nothing is looked at again of a group whose
files are as they were:

    {"state": HASH, "found": [...]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nnunetv2_misfm.plans.settings import as_tuples
from nnunetv2_misfm.pool.bundle_files import BundleFiles
from nnunetv2_misfm.pool.dicom_frames import DicomHeader, Frame
from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.headers import NEVER, Header, HeaderReader
from nnunetv2_misfm.pool.volume_files import VolumeFile, is_detached

FILES_AT_ONCE = 1000
"""Headers that are read before they are written down: what a part that is killed has to read again at most."""


class HeaderIndex:
    """Headers by bundle.

    Args:
        folder: where they are kept; None keeps them in memory.
        writes: the bundles whose new headers are written down.
    """

    def __init__(self, folder: Path | None, writes: range):
        self.writes = writes
        self.in_memory: dict[str, Header] = {}
        self._headers = None if folder is None else BundleFiles(folder, writes)
        self._groups = None if folder is None else BundleFiles(folder, writes, ".groups.jsonl")

    def headers(self, bundle: int, files: Sequence[VolumeFile], read: HeaderReader) -> list[Header]:
        """Headers of files of one bundle in their order; `read` is given those that are not known as they are now."""
        folders = {file.folder for file in files}
        known = self.in_memory if self._headers is None else {h.file.path: h for h in self.known(bundle, folders)}
        current = {file.path: known[file.path] for file in files if _holds(known.get(file.path))}
        new = [file for file in files if file.path not in current]
        for first in range(0, len(new), FILES_AT_ONCE):
            headers = list(read(new[first : first + FILES_AT_ONCE]))
            current.update({header.file.path: header for header in headers})
            if self._headers is None:
                self.in_memory.update({header.file.path: header for header in headers})
            elif bundle in self.writes:
                self._headers.append(bundle, _lines(headers))
        return [current[file.path] for file in files]

    def known(self, bundle: int, folders: Collection[str] | None = None) -> list[Header]:
        """All headers of a bundle, or of these folders in it, that were ever read, in the state they had last."""
        if self._headers is None:
            return [header for header in self.in_memory.values() if header.file.bundle == bundle]
        found = {}
        for line in self._headers.read(bundle):
            if folders is not None and line["folder"] not in folders:
                continue
            for name, (size, date, content) in line["files"].items():
                path, key = os.path.join(line["folder"], name), f"{line['key']}/{name}"
                found[path] = _decoded(VolumeFile(path, key, line["format"], bundle), size, date, content)
        return list(found.values())

    def unchanged(self, bundle: int) -> list[Header]:
        """Those of them whose files are as they were."""
        return [header for header in self.known(bundle) if _holds(header)]

    def outcomes(self, bundle: int) -> dict[str, Any]:
        """What groups of files in a bundle amounted to, by `FileGroup.state`."""
        return {line["state"]: line["found"] for line in self._groups.read(bundle)} if self._groups else {}

    def keep_outcomes(self, bundle: int, found: Mapping[str, Any]) -> None:
        """Write down what groups amounted to."""
        if found and self._groups is not None and bundle in self.writes:
            self._groups.append(bundle, (json.dumps({"state": s, "found": one}) for s, one in found.items()))


def _holds(header: Header | None) -> bool:
    if header is None or is_detached(header.file.path):
        return False
    try:
        status = os.stat(header.file.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (header.num_bytes, header.modified_ns)


def _lines(headers: Sequence[Header]) -> Iterator[str]:
    lasting = [header for header in headers if header.modified_ns != NEVER]
    for (folder, key, kind), group in groupby(
        lasting, lambda h: (h.file.folder, _folder_of(h.file.key), h.file.format)
    ):
        files = {os.path.basename(h.file.path): [h.num_bytes, h.modified_ns, _encoded(h)] for h in group}
        yield json.dumps({"folder": folder, "key": key, "format": kind, "files": files}, separators=(",", ":"))


def _folder_of(key: str) -> str:
    return key.rpartition("/")[0]


def _encoded(header: Header) -> Any:
    if header.dicom is not None:
        *values, frames, problem = vars(header.dicom).values()
        return [*values, [list(vars(frame).values()) for frame in frames], problem]
    return header.problem if header.grid is None else list(vars(header.grid).values())


def _decoded(file: VolumeFile, num_bytes: int, modified_ns: int, content: Any) -> Header:
    if isinstance(content, str):
        return Header(file, num_bytes, modified_ns, problem=content)
    if file.format != "DICOM":
        return Header(file, num_bytes, modified_ns, grid=Grid(*map(tuple, content)))
    modality, patient, series, instance, kernel, num_frames, frames, problem = content
    restored = tuple(Frame(*as_tuples(frame)) for frame in frames)
    dicom = DicomHeader(modality, patient, series, instance, kernel, num_frames, restored, problem)
    return Header(file, num_bytes, modified_ns, dicom=dicom)
