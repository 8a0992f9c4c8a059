"""What volume files say about themselves without their voxels being read; many files at once."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nnunetv2_misfm.pool.dicom_frames import DicomHeader, read_dicom_header
from nnunetv2_misfm.pool.grid import Grid
from nnunetv2_misfm.pool.nifti import open_nifti
from nnunetv2_misfm.pool.stored_image import StoredImage
from nnunetv2_misfm.pool.text_headers import open_metaimage, open_nrrd
from nnunetv2_misfm.pool.volume_files import VolumeFile, VolumeProblem, unreadable
from nnunetv2_misfm.pool.workers import WorkerProcesses

HEADERS_WORTH_A_PROCESS = 2000
NEVER = -1
"""The date of a file that the system could not read; the next run tries it again."""

HeaderReader = Callable[[Sequence[VolumeFile]], Iterable["Header"]]


@dataclass(frozen=True)
class Header:
    file: VolumeFile
    num_bytes: int
    modified_ns: int
    """When the file was changed, in ns since 1970, or `NEVER`."""
    grid: Grid | None = None
    """Of all files but DICOM."""
    dicom: DicomHeader | None = None
    problem: str = ""
    """Why there is neither."""


@contextmanager
def header_reader(num_files: int, num_processes: int) -> Iterator[HeaderReader]:
    """A function that reads the headers of files in their order, in several processes where there are many files."""
    if num_processes == 1 or num_files < HEADERS_WORTH_A_PROCESS:
        yield lambda files: map(read_header, files)
        return
    with WorkerProcesses(num_processes) as executor:
        yield lambda files: executor.map(read_header, files, chunksize=1 + min(200, len(files) // num_processes))


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


def read_header(file: VolumeFile) -> Header:
    """The header of a file, or what is wrong with it."""
    num_bytes, modified_ns = 0, NEVER
    try:
        status = os.stat(file.path)
        num_bytes, modified_ns = status.st_size, status.st_mtime_ns
        if num_bytes == 0:
            raise VolumeProblem("empty file (0 bytes)")
        if file.format == "DICOM":
            return Header(file, num_bytes, modified_ns, dicom=read_dicom_header(file.path))
        image = open_image(file.path)
        for part in {part for part, _ in image.parts} - {file.path}:  # of a header beside its voxels
            if os.path.exists(part):
                status = os.stat(part)
                num_bytes, modified_ns = num_bytes + status.st_size, max(modified_ns, status.st_mtime_ns)
        return Header(file, num_bytes, modified_ns, grid=image.grid)
    except OSError as error:
        return Header(file, num_bytes, NEVER, problem=f"unreadable: {error.strerror or error}")
    except VolumeProblem as problem:
        return Header(file, num_bytes, NEVER if problem.is_of_system else modified_ns, problem=str(problem))
    except Exception as error:  # numbers that are none, in headers of any format: one file never stops the rest
        return Header(file, num_bytes, modified_ns, problem=unreadable(error))
