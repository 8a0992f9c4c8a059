"""What volume files say about themselves without their voxels being read; many files at once."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from nnunetv2_misfm.pool.dicom_frames import DicomHeader, read_dicom_header
from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.nifti import open_nifti
from nnunetv2_misfm.pool.stored_image import StoredImage
from nnunetv2_misfm.pool.text_headers import open_metaimage, open_nrrd
from nnunetv2_misfm.pool.volume_files import LeftOut, VolumeFile, VolumeProblem, unreadable

HEADERS_WORTH_A_PROCESS = 2000


@dataclass(frozen=True)
class Header:
    file: VolumeFile
    num_bytes: int
    modified_ns: int
    """When the file was changed, in ns since 1970."""
    grid: Grid | None
    """Of all files but DICOM."""
    dicom: DicomHeader | None


def read_headers(files: Sequence[VolumeFile], num_processes: int = 1) -> tuple[list[Header], list[LeftOut]]:
    """The headers of all readable files in the order of `files`, and what could not be read, with its reason."""
    if num_processes > 1 and len(files) >= HEADERS_WORTH_A_PROCESS:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as executor:
            results: Iterable[Header | LeftOut] = list(executor.map(_header_or_reason, files, chunksize=200))
    else:
        results = [_header_or_reason(file) for file in files]
    headers = [result for result in results if isinstance(result, Header)]
    return headers, [result for result in results if isinstance(result, LeftOut)]


def open_image(path: str) -> StoredImage:
    """The header of an image file, whose kind its ending tells.

    Raises:
        VolumeProblem: if the file is empty or unreadable, or is no volume of scalars of a known voxel size.
    """
    try:
        if path.lower().endswith((".nii", ".nii.gz")):
            return open_nifti(path)
        return open_nrrd(path) if path.lower().endswith((".nrrd", ".nhdr")) else open_metaimage(path)
    except OSError as error:
        raise VolumeProblem(f"unreadable: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise VolumeProblem(f"damaged or cut short: {error}") from error


def _header_or_reason(file: VolumeFile) -> Header | LeftOut:
    try:
        status = os.stat(file.path)
        if status.st_size == 0:
            raise VolumeProblem("empty file (0 bytes)")
        is_dicom = file.format == "DICOM"
        return Header(
            file=file,
            num_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            grid=None if is_dicom else open_image(file.path).grid,
            dicom=read_dicom_header(file.path) if is_dicom else None,
        )
    except OSError as error:
        return LeftOut(file.path, f"unreadable: {error.strerror or error}")
    except VolumeProblem as problem:
        return LeftOut(file.path, str(problem))
    except Exception as error:  # numbers that are none, in headers of any format: one file never stops the rest
        return LeftOut(file.path, unreadable(error))
