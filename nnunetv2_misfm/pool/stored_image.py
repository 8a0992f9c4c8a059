"""One volume in a file whose header has been read and whose voxels have not."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.volume_files import VolumeProblem

GZIP_START = b"\x1f\x8b"


@dataclass(frozen=True)
class StoredImage:
    """Where the voxels of a volume lie in its files, and how they are read: once, and only if all of them are there."""

    grid: Grid
    dtype: np.dtype[Any]
    """As stored, byte order included."""
    parts: tuple[tuple[str, int], ...]
    """The files that hold the voxels, and the byte to start from; negative: the voxels end where the file does."""
    decode: Callable[[bytes], bytes] = bytes
    skip: int = 0
    """Bytes before the first voxel of each file after decoding; negative: the voxels end where the data does."""
    slope: float = 1.0
    intercept: float = 0.0

    def read(self) -> np.ndarray:
        """The voxels (Z, Y, X), scaled as the header says, float32.

        Raises:
            VolumeProblem: for a file that is damaged or holds fewer voxels than its header says.
        """
        count = int(np.prod(self.grid.size, dtype=np.int64))
        wanted = count * self.dtype.itemsize
        share, rest = divmod(wanted, len(self.parts))
        if rest:
            raise VolumeProblem(
                f"unreadable: its {wanted} bytes of voxels do not share out over {len(self.parts)} files"
            )
        try:
            content = b"".join(self._part(path, start, share) for path, start in self.parts)
        except (EOFError, zlib.error, ValueError) as error:
            raise VolumeProblem(f"damaged or cut short: {error}") from error
        except OSError as error:
            raise VolumeProblem(f"unreadable: {error.strerror or error} ({error.filename})") from error
        if len(content) < wanted:
            raise VolumeProblem(f"cut short: {len(content)} of {wanted} bytes of voxels") from EOFError()
        voxels = np.frombuffer(content, self.dtype, count).reshape(self.grid.size[::-1])
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is found out later
            if (self.slope, self.intercept) == (1.0, 0.0):
                return voxels.astype(np.float32)
            scaled = np.empty(voxels.shape, np.float32)
            for plane, stored in zip(scaled, voxels, strict=True):  # one at a time, for the memory of float64
                plane[...] = stored.astype(np.float64) * self.slope + self.intercept
            return scaled

    def _part(self, path: str, start: int, share: int) -> bytes:
        """The voxels in one of the files."""
        content = self.decode(_bytes_of_file(path, start, share))
        skip = self.skip if self.skip >= 0 else max(0, len(content) - share)
        return content[skip : skip + share]


def _bytes_of_file(path: str, start: int, wanted: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start if start >= 0 else max(0, os.fstat(file.fileno()).st_size - wanted))
        return file.read()


def inflate(content: bytes) -> bytes:
    """Decompress gzip data, of one member or several, or zlib data; bytes after the end are ignored.

    Raises:
        EOFError, zlib.error: if the data is cut short or damaged; checksums are checked.
    """
    members: list[bytes] = []
    while not members or content.startswith(GZIP_START):
        decompressor = zlib.decompressobj(47)
        members.append(decompressor.decompress(content))
        if not decompressor.eof:
            raise EOFError("the compressed data ends early")
        content = decompressor.unused_data
    return b"".join(members)


def check_scalars(num_components: int, kind: str) -> None:
    """Raise VolumeProblem unless voxels are single real numbers; `kind` is that of a numpy dtype."""
    if num_components > 1:
        raise VolumeProblem(f"RGB or vector voxels ({num_components} numbers each)")
    if kind == "c":
        raise VolumeProblem("complex voxels")
    if kind not in "iuf":
        raise VolumeProblem("unreadable: its voxels are no numbers")
