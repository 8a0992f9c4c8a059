"""How the parts of a job array share an archive.

Everything in it belongs to one of `BUNDLES` bundles, by a checksum of its name: an image file by its own, so that a
huge folder is shared, but without a number that may be a channel's, so that no volume is cut, and DICOM files by their
folder's, so that no series in it is cut. Part i of N looks after the bundles i, i + N, i + 2N, ... So whose a file is
does not depend on what else there is, and what is written down by bundle serves any number of parts.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

BUNDLES = 1024
"""Fixed for the life of all pools."""


@dataclass(frozen=True)
class Share:
    """What one part looks after."""

    num_parts: int = 1
    part_id: int = 0

    @property
    def bundles(self) -> range:
        return range(self.part_id, BUNDLES, self.num_parts)

    def __str__(self) -> str:
        return f"part_{self.part_id}_of_{self.num_parts}"

    @classmethod
    def of(cls, text: str) -> Share:
        """The share of which this is the text."""
        _, part_id, _, num_parts = text.split("_")
        return cls(int(num_parts), int(part_id))


WHOLE = Share()


def bundle_of(name: str) -> int:
    """The bundle of a file or folder that is known by this name."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape")) % BUNDLES
