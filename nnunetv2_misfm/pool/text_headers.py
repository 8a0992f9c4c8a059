"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): text headers that say where the voxels are.

ITK reads their geometry. What it would make up is looked for in the header itself: a voxel size that is not given is
1 mm to ITK, and voxels that are missing are zeros.
"""

from __future__ import annotations

import bz2
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import SimpleITK as sitk

from nnunetv2_misfm.pool.grid import Grid, make_grid
from nnunetv2_misfm.pool.stored_image import StoredImage, check_scalars, inflate
from nnunetv2_misfm.pool.volume_files import VolumeProblem, unreadable

MM_PER_UNIT = {
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "", "?"), 1.0),
    **dict.fromkeys(("um", "µm", "micron", "micrometer", "micrometers"), 1e-3),
    "cm": 10.0,
    "m": 1e3,
}
MOST_HEADER_LINES = 10_000
VOXEL_TYPES = {
    sitk.sitkUInt8: "u1",
    sitk.sitkInt8: "i1",
    sitk.sitkUInt16: "u2",
    sitk.sitkInt16: "i2",
    sitk.sitkUInt32: "u4",
    sitk.sitkInt32: "i4",
    sitk.sitkUInt64: "u8",
    sitk.sitkInt64: "i8",
    sitk.sitkFloat32: "f4",
    sitk.sitkFloat64: "f8",
}


def open_metaimage(path: str) -> StoredImage:
    """Read the header of an .mha or .mhd file.

    Raises:
        VolumeProblem: if it is no volume of scalars, or does not say how large its voxels are.
    """
    with open(path, "rb") as file:
        fields = _fields(file, b"=", last="elementdatafile")
        data = fields.get("elementdatafile", "")
        paths = _voxel_files(path, data, file)
        end_of_header = file.tell()
    if not data:
        raise VolumeProblem("unreadable: not a MetaImage header (ElementDataFile is missing)")
    if "elementspacing" not in fields and "elementsize" not in fields:
        raise VolumeProblem("the size of its voxels is not known: no ElementSpacing in its header")
    grid, dtype = _itk_header(path, [_mm_per_unit(fields.get("distanceunits", "mm"))] * 3)
    start = int(fields.get("headersize", "0"))
    if data.upper() == "LOCAL":
        parts = [(path, end_of_header if start >= 0 else start)]
    else:
        parts = [(voxel_file, start) for voxel_file in paths]
    decode: Callable[[bytes], bytes] = inflate if _is_true(fields.get("compresseddata", "")) else bytes
    if fields.get("binarydata", "true").lower() in ("false", "0"):
        decode = _numbers_as(dtype.newbyteorder("<"))  # the byte order is then applied to them, as in ITK
    big_endian = any(_is_true(fields.get(f"{name}byteordermsb", "")) for name in ("binarydata", "element"))
    return StoredImage(grid, dtype.newbyteorder("big" if big_endian else "little"), tuple(parts), decode)


def open_nrrd(path: str) -> StoredImage:
    """Read the header of a .nrrd or .nhdr file.

    Raises:
        VolumeProblem: if it is no volume of scalars, or does not say how large its voxels are.
    """
    with open(path, "rb") as file:
        if not file.readline().startswith(b"NRRD"):
            raise VolumeProblem("unreadable: not a NRRD file (the magic number is missing)")
        fields = _fields(file, b":", last="")
        end_of_header = file.tell()
        data = fields.get("datafile", "")
        if data.upper().startswith("LIST"):  # the names of files follow that line, to the end
            file.seek(0)
            _fields(file, b":", last="datafile")
        paths = _voxel_files(path, data, file)
    if "nan" in fields.get("spacedirections", fields.get("spacings", "nan")).lower():
        raise VolumeProblem("the size of its voxels is not known: no space directions and no spacings in its header")
    units = re.findall(r'"([^"]*)"', fields.get("spaceunits", fields.get("units", "")))
    grid, dtype = _itk_header(path, [_mm_per_unit(unit) for unit in units] if len(units) == 3 else [1.0] * 3)
    dtype = dtype.newbyteorder("big" if fields.get("endian", "little").lower() == "big" else "little")
    decoders: dict[str, Callable[[bytes], bytes]] = {
        "raw": bytes,
        **dict.fromkeys(("gzip", "gz"), inflate),
        **dict.fromkeys(("bzip2", "bz2"), bz2.decompress),
        **dict.fromkeys(("txt", "text", "ascii"), _numbers_as(dtype)),
        "hex": lambda content: bytes.fromhex(content.decode("ascii")),
    }
    encoding = fields.get("encoding", "raw").lower()
    if encoding not in decoders:
        raise VolumeProblem(f"unreadable: NRRD encoding {encoding!r} is not known")
    lines_before = int(fields.get("lineskip", "0"))
    return StoredImage(
        grid=grid,
        dtype=dtype,
        parts=tuple((voxel_file, 0) for voxel_file in paths) if data else ((path, end_of_header),),
        decode=lambda content: decoders[encoding](content.split(b"\n", lines_before)[-1] if lines_before else content),
        skip=int(fields.get("byteskip", "0")),
    )


def _fields(file: BinaryIO, separator: bytes, last: str) -> dict[str, str]:
    """The `key = value` lines of a text header, keys in lower case without spaces, up to the one named `last`."""
    fields: dict[str, str] = {}
    for _ in range(MOST_HEADER_LINES):
        line = file.readline()
        key, _, value = line.partition(separator)
        name = key.strip().lower().replace(b" ", b"").decode("ascii", "replace")
        if value.startswith(b"="):  # NRRD's `key:=value` is somebody's remark
            continue
        fields.setdefault(name, value.strip().decode("utf-8", "surrogateescape"))
        if not line or name == last:
            break
    return fields


def _voxel_files(path: str, data: str, file: BinaryIO) -> list[str]:
    """The files of voxels, found beside the header.

    Args:
        path: of the header.
        data: a file's name, a pattern such as `slice%03d.raw 1 24 1`, or LIST.
        file: the header, at the line after LIST.
    """
    match = re.fullmatch(r"(.*%\d*d\S*)\s+(-?\d+)\s+(-?\d+)(?:\s+(-?\d+))?(?:\s+\d+)?", data)
    if data.upper().startswith("LIST"):
        lines = [line.decode("utf-8", "surrogateescape").strip() for line in file]
        names = [line for line in lines if line]
    elif match is not None:
        first, last, step = int(match[2]), int(match[3]), int(match[4] or 1) or 1
        names = [match[1] % number for number in range(first, last + (1 if step > 0 else -1), step)]
    else:
        names = [data]
    return [os.path.join(os.path.dirname(path), name) for name in names]


def _itk_header(path: str, mm_per_unit: Sequence[float]) -> tuple[Grid, np.dtype[Any]]:
    """Geometry and voxel type (of no byte order) as ITK reads them from the header."""
    if not _is_utf8(path):  # SimpleITK ends the program
        raise VolumeProblem("unreadable: the name of its file is not UTF-8; rename it")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.lower().endswith((".nrrd", ".nhdr")) else "MetaImageIO")
    reader.SetFileName(path)
    try:
        with quiet_itk():
            reader.ReadImageInformation()
    except Exception as error:  # SimpleITK raises RuntimeError, its SWIG layer others for names it cannot encode
        raise VolumeProblem(unreadable(error)) from error
    name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    check_scalars(reader.GetNumberOfComponents(), "c" if "complex" in name else "f")
    if reader.GetPixelID() not in VOXEL_TYPES:
        raise VolumeProblem(f"unreadable: voxels of type {name}")
    size = reader.GetSize()
    direction = np.reshape(reader.GetDirection(), (len(size), len(size)))
    spacing = [mm * factor for mm, factor in zip(reader.GetSpacing(), mm_per_unit, strict=False)]
    return make_grid(size, spacing, direction, reader.GetOrigin()), np.dtype(VOXEL_TYPES[reader.GetPixelID()])


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Keeps ITK's C++ warnings about odd headers off the terminal; errors still raise."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _mm_per_unit(unit: str) -> float:
    if unit.strip().lower() not in MM_PER_UNIT:
        raise VolumeProblem(f"the size of its voxels is not known: it is given in {unit!r}")
    return MM_PER_UNIT[unit.strip().lower()]


def _numbers_as(dtype: np.dtype[Any]) -> Callable[[bytes], bytes]:
    return lambda content: np.array(content.split()).astype(dtype).tobytes()


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("true", "1")
