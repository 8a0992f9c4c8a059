"""What volume files say about themselves without their voxels being read, and whether they are whole."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, BinaryIO

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.openers import ImageOpener

from nnunetv2_misfm.pool.volume_files import LeftOut, VolumeFile, split_ending

HEADERS_WORTH_A_PROCESS = 2000
READ_SIZE = 2**22
DICOM_TAGS = {
    "modality": "0008|0060",
    "series": "0020|000e",
    "instance": "0008|0018",
    "position": "0020|0032",
    "orientation": "0020|0037",
}


class VolumeProblem(Exception):
    """Why a volume cannot be used; the message becomes the reason in the report."""


@dataclass(frozen=True)
class Header:
    """Geometry and type of one file. Axes are (x, y, z) as stored, lengths in mm, directions in LPS as in DICOM."""

    file: VolumeFile
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    """Row-major matrix whose columns are the directions of the axes."""
    pixel_type: str
    num_components: int
    num_bytes: int
    modified_ns: int
    tags: dict[str, str] = field(default_factory=dict)
    """For DICOM, those of `DICOM_TAGS` that are present."""


def read_headers(files: Sequence[VolumeFile], num_processes: int = 1) -> tuple[list[Header], list[LeftOut]]:
    """The headers of all readable files in the order of `files`, and what could not be read, with its reason."""
    if num_processes > 1 and len(files) >= HEADERS_WORTH_A_PROCESS:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as executor:
            results: Iterable[Header | LeftOut] = list(executor.map(_header_or_reason, files, chunksize=200))
    else:
        results = [_header_or_reason(file) for file in files]
    headers = [result for result in results if isinstance(result, Header)]
    return headers, [result for result in results if isinstance(result, LeftOut)]


def read_header(file: VolumeFile) -> Header:
    """The header of one file, from SimpleITK or, where that refuses a NIfTI (sheared axes), from nibabel.

    Raises:
        VolumeProblem: if the file is empty or unreadable.
    """
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise VolumeProblem(f"unreadable: {error.strerror or error}") from error
    if status.st_size == 0:
        raise VolumeProblem("empty file (0 bytes)")
    reader = sitk.ImageFileReader()
    reader.SetFileName(file.path)
    try:
        with quiet_itk():
            reader.ReadImageInformation()
    except Exception as error:  # SimpleITK raises RuntimeError, its SWIG layer others for names it cannot encode
        if file.format == "NIfTI":
            return _nibabel_header(file, status, error)
        raise VolumeProblem(unreadable(error)) from error
    _check_voxel_size(reader, file)
    tags = {}
    if file.format == "DICOM":
        tags = {name: reader.GetMetaData(tag).strip(" \0") for name, tag in DICOM_TAGS.items() if _has(reader, tag)}
    return Header(
        file=file,
        size=tuple(reader.GetSize()),
        spacing=tuple(reader.GetSpacing()),
        origin=tuple(reader.GetOrigin()),
        direction=tuple(reader.GetDirection()),
        pixel_type=sitk.GetPixelIDValueAsString(reader.GetPixelID()),
        num_components=reader.GetNumberOfComponents(),
        num_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        tags=tags,
    )


def unreadable(error: BaseException) -> str:
    """The last line of a reader's error that tells something, without memory addresses, which differ in every run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    text = lines[-1].removeprefix("ITK ERROR: ") if lines else type(error).__name__
    return f"unreadable: {re.sub(r'[(]0x[0-9a-f]+[)]', '', text)}"


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Keeps ITK's C++ warnings about odd headers off the terminal; errors still raise."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def check_file(path: str) -> None:
    """Finds what ITK hides: truncated and damaged files, which it fills up with zeros or noise, and NaN in NIfTI.

    NIfTI: the voxels the header promises are there, and finite. Compressed files: the stream ends properly and its
    checksum fits.

    Raises:
        VolumeProblem: saying what is wrong.
    """
    ending = split_ending(path)[1]
    try:
        if ending in (".nii", ".nii.gz"):
            _check_nifti(path)
        else:
            offset = _compressed_data_offset(path, ending)
            if offset is not None:
                _check_compressed(path, offset)
    except (OSError, EOFError, zlib.error) as error:
        raise VolumeProblem(f"damaged or cut short: {error}") from error


def _header_or_reason(file: VolumeFile) -> Header | LeftOut:
    try:
        return read_header(file)
    except VolumeProblem as problem:
        return LeftOut(file.path, str(problem))


def _has(reader: sitk.ImageFileReader, tag: str) -> bool:
    return bool(reader.HasMetaDataKey(tag))


def _check_voxel_size(reader: sitk.ImageFileReader, file: VolumeFile) -> None:
    """Raise VolumeProblem for voxels without a size. Where a NIfTI says 0, ITK and nibabel take 1 mm in silence."""
    sizes = [float(mm) for mm in reader.GetSpacing()]
    if file.format == "NIfTI":
        try:
            with ImageOpener(file.path) as opened:
                header = nibabel.Nifti1Header.from_fileobj(opened, check=False)
        except Exception:  # another kind of NIfTI (2, or a pair of files), which ITK has read
            return
        sizes = [float(mm) for mm in header["pixdim"][1 : 1 + min(3, reader.GetDimension())]]
    if not all(0 < abs(mm) < math.inf for mm in sizes):
        raise VolumeProblem(f"voxel size {' x '.join(f'{mm:g}' for mm in sizes)} mm in its header")


def _nibabel_header(file: VolumeFile, status: os.stat_result, itk_error: Exception) -> Header:
    try:
        image: Any = nibabel.load(file.path)
        affine, zooms = np.asarray(image.affine, dtype=float), image.header.get_zooms()
        columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    except Exception as error:  # nibabel's errors for damaged files have no common base class
        raise VolumeProblem(unreadable(itk_error)) from error
    if any(n < 1 for n in image.shape):  # ITK refuses them, nibabel does not
        raise VolumeProblem(f"unreadable: size {' x '.join(map(str, image.shape))} in its header")
    to_lps = np.diag([-1.0, -1.0, 1.0])
    return Header(
        file=file,
        size=tuple(int(n) for n in image.shape),
        spacing=tuple(float(z) for z in zooms),
        origin=tuple(float(v) for v in to_lps @ affine[:3, 3]),
        direction=tuple(float(v) for v in (to_lps @ columns).ravel()),
        pixel_type=str(image.get_data_dtype()),
        num_components=len(image.get_data_dtype().names or (1,)),
        num_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


def _check_nifti(path: str) -> None:
    with gzip.open(path) if _is_gzip(path) else open(path, "rb") as file:
        header = _nifti_header(file)
        count, dtype = int(np.prod(header.get_data_shape(), dtype=np.int64)), header.get_data_dtype()
        offset = int(header["vox_offset"])
        file.seek(offset)
        read, bad = 0, 0
        while chunk := file.read(READ_SIZE):
            if dtype.kind == "f":
                voxels = min(len(chunk) // dtype.itemsize, count - read // dtype.itemsize)
                bad += int(np.count_nonzero(~np.isfinite(np.frombuffer(chunk, dtype, max(voxels, 0)))))
            read += len(chunk)
    if read < count * dtype.itemsize:
        raise VolumeProblem(f"cut short: {offset + read} of {offset + count * dtype.itemsize} bytes")
    if bad:
        raise VolumeProblem(not_finite(bad, count))


def _nifti_header(file: BinaryIO | gzip.GzipFile) -> Any:
    """nibabel's header of a NIfTI-1 or NIfTI-2 file."""
    block = file.read(nibabel.Nifti2Header.sizeof_hdr)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    kind = nibabel.Nifti2Header if nibabel.Nifti2Header.sizeof_hdr in sizes else nibabel.Nifti1Header
    try:
        return kind(block[: kind.sizeof_hdr], check=False)
    except Exception as error:  # nibabel's errors for damaged headers have no common base class
        raise VolumeProblem(unreadable(error)) from error


def not_finite(bad: int, count: int) -> str:
    return f"NaN or infinity in {bad} of {count} voxels"


def _is_gzip(path: str, offset: int = 0) -> bool:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(2) == b"\x1f\x8b"


def _check_compressed(path: str, offset: int) -> None:
    """Decompress gzip or zlib data that starts at `offset`, which checks its checksums."""
    with open(path, "rb") as file:
        file.seek(offset)
        if _is_gzip(path, offset):
            with gzip.GzipFile(fileobj=file) as stream:
                while stream.read(READ_SIZE):
                    pass
            return
        decompressor = zlib.decompressobj()
        while not decompressor.eof:
            compressed = decompressor.unconsumed_tail or file.read(READ_SIZE)
            if not compressed:
                raise EOFError("the compressed data ends early")
            decompressor.decompress(compressed, READ_SIZE)


def _compressed_data_offset(path: str, ending: str) -> int | None:
    """Where compressed voxels start in an .mha or .nrrd file; None if they are not compressed or in another file."""
    with open(path, "rb") as file:
        if ending == ".mha":
            return _after_line(file, rb"ElementDataFile\s*=\s*LOCAL", rb"CompressedData\s*=\s*True")
        if ending == ".nrrd":
            return _after_line(file, rb"", rb"encoding:\s*(gzip|gz)")
    return None


def _after_line(file: BinaryIO, last_line: bytes, required_line: bytes) -> int | None:
    """Position after the line `last_line` of a text header, if a line `required_line` came before it."""
    compressed = False
    for line in file:
        compressed = compressed or re.fullmatch(required_line, line.strip(), re.IGNORECASE) is not None
        if re.fullmatch(last_line, line.strip(), re.IGNORECASE):
            return file.tell() if compressed else None
    return None
