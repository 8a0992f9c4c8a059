"""A file of JSON lines for each bundle of an archive (`share.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2_misfm.files import append_json_lines, read_json_lines


class BundleFiles:
    """The files in one folder.

    Args:
        folder: where they lie.
        own: bundles in whose files this process alone writes. Which of these files there are is looked up once, for
            all together: on a parallel file system, finding that a file is not there costs as much as opening it.
        ending: of their names.
    """

    def __init__(self, folder: Path, own: range, ending: str = ".jsonl"):
        self.folder = folder
        self.own = own
        self.ending = ending

    def read(self, bundle: int) -> Iterator[Any]:
        """What the lines of a bundle's file hold; nothing if there is none."""
        path = self._path(bundle)
        if bundle not in self.own or path.name in self._there:
            yield from read_json_lines(path)

    def append(self, bundle: int, lines: Iterable[str]) -> None:
        """Add lines to the file of one of the bundles that this process writes."""
        path = self._path(bundle)
        append_json_lines(path, lines)
        self._there.add(path.name)

    @cached_property
    def _there(self) -> set[str]:
        return set(os.listdir(self.folder))

    def _path(self, bundle: int) -> Path:
        return self.folder / f"{bundle:04d}{self.ending}"
