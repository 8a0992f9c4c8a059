"""NIfTI files: where their voxels are and how they lie, from the header.

The voxels are taken from the very file that is named. ITK looks for another one beside it: for `A.nii.gz` it reads
`A.nii` if there is one.
"""

from __future__ import annotations

import gzip
import math
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import from_matvec
from nibabel.quaternions import quat2mat

from nnunetv2_misfm.pool.grid import check_spacing, make_grid, tilt
from nnunetv2_misfm.pool.stored_image import GZIP_START, StoredImage, check_scalars, inflate
from nnunetv2_misfm.pool.volume_files import VolumeProblem, unreadable

LPS_OF_RAS = np.diag([-1.0, -1.0, 1.0])
MM_PER_UNIT = {1: 1e3, 2: 1.0, 3: 1e-3}
"""By the first three bits of xyzt_units: metres, millimetres, micrometres."""
SAME_SIZE = 0.01
"""By which share two statements of one voxel size in a header may differ."""
QUATERNION_ROUNDING = 0.05
"""By how much the squared length of a quaternion may be above 1."""
RIGHT_ANGLES = 0.1
"""Axes that are no further than this from right angles, in degrees, differ from them by rounding only."""


def open_nifti(path: str) -> StoredImage:
    """Read the header of a NIfTI-1 or NIfTI-2 file, compressed or not.

    Raises:
        VolumeProblem: if it is no volume of scalars of a known voxel size, or its header contradicts itself.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP_START
    with gzip.open(path) if compressed else open(path, "rb") as file:
        header = _header(file.read(nibabel.Nifti2Header.sizeof_hdr))
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise VolumeProblem("unreadable: not a NIfTI file of its own (the magic number is missing)")
    dims = header["dim"].astype(int)
    size = [int(n) for n in dims[1 : 1 + dims[0]]] if 1 <= dims[0] <= 7 else []
    if len(size) == 5 and size[3] == 1 and size[4] > 1:
        raise VolumeProblem(f"RGB or vector voxels ({size[4]} numbers each)")
    try:
        dtype = header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # nibabel's errors for damaged headers have no common base class
        raise VolumeProblem(unreadable(error)) from error
    check_scalars(1 if dtype.names is None else len(dtype.names), dtype.kind)
    spacing, direction, origin = _axes(header)
    return StoredImage(
        grid=make_grid(size, spacing, LPS_OF_RAS @ direction, LPS_OF_RAS @ origin),
        dtype=dtype,
        parts=((path, 0),),
        decode=inflate if compressed else bytes,
        skip=max(int(header["vox_offset"]), int(header.sizeof_hdr) + 4),
        # A slope of 0 means that nothing is scaled, neither by the slope nor by the intercept; nibabel gives None.
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if slope is None else float(intercept or 0.0),
    )


def _header(block: bytes) -> Any:
    """nibabel's header of a NIfTI-1 or NIfTI-2 file."""
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    kind = nibabel.Nifti2Header if nibabel.Nifti2Header.sizeof_hdr in sizes else nibabel.Nifti1Header
    try:
        return kind(block[: kind.sizeof_hdr], check=False)
    except Exception as error:  # as above
        raise VolumeProblem(unreadable(error)) from error


def _axes(header: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxel size in mm, directions of the axes (columns of a matrix) and origin in mm, RAS.

    The voxel size is pixdim's. The directions are the sform's, as in ITK and nibabel, unless there is a qform and the
    sform's axes are not at right angles (a registration to an atlas, say). An sform alone may be sheared, as after a
    gantry tilt.
    """
    mm = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    sizes = np.abs(header["pixdim"][1:4].astype(float)) * mm
    check_spacing(sizes)
    sform = header.get_sform() if header["sform_code"] > 0 else None
    affines = [affine * mm for affine in (sform, _qform(header)) if affine is not None]
    if not affines:
        return sizes, np.eye(3), np.zeros(3)
    for affine in affines:
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            raise VolumeProblem(f"unreadable: its axes do not span space (affine {affine[:3, :3].tolist()})")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if tilt(affine[:3, :3]) < RIGHT_ANGLES and np.allclose(lengths, sizes, rtol=SAME_SIZE):
            return sizes, affine[:3, :3] / lengths, affine[:3, 3]
    lengths = np.linalg.norm(affines[0][:3, :3], axis=0)
    heights = lengths * np.cos(np.radians(tilt(affines[0][:3, :3])))
    if not (np.isclose(sizes, lengths, rtol=SAME_SIZE) | np.isclose(sizes, heights, rtol=SAME_SIZE)).all():
        shown = [" x ".join(f"{value:.4g}" for value in values) for values in (sizes, lengths)]
        raise VolumeProblem(f"its header contradicts itself: voxels of {shown[0]} mm (pixdim) or {shown[1]} mm (sform)")
    return lengths, affines[0][:3, :3] / lengths, affines[0][:3, 3]


def _qform(header: Any) -> np.ndarray | None:
    """The affine of the quaternion, as NIfTI-1 defines it (method 2); None if the header has none.

    nibabel refuses quaternions that rounding has made longer than 1, and a qfac of 0, which stands for 1.
    """
    if header["qform_code"] <= 0:
        return None
    b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
    rest = 1 - (b * b + c * c + d * d)
    if not np.isfinite(rest) or rest < -QUATERNION_ROUNDING:
        raise VolumeProblem(f"unreadable: the quaternion ({b:g}, {c:g}, {d:g}) in its header is no rotation")
    rotation = quat2mat((math.sqrt(rest) if rest > 1e-7 else 0.0, b, c, d))  # brings the length to 1
    sizes = np.abs(header["pixdim"][1:4].astype(float)) * (1.0, 1.0, -1.0 if header["pixdim"][0] < 0 else 1.0)
    return from_matvec(rotation * sizes, [float(header[f"qoffset_{name}"]) for name in "xyz"])
