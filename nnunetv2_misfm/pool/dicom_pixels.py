"""The values of DICOM frames, decoded and scaled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import imagecodecs
import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import iter_pixels

from nnunetv2_misfm.pool.dicom_frames import Frame, tolerant
from nnunetv2_misfm.pool.volume_files import VolumeProblem, unreadable

_END_OF_IMAGE = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike
_COMPRESSED = "1.2.840.10008.1.2.4."
# What pydicom decodes itself (uncompressed, deflated, run lengths) is left to it; the rest needs one of its plugins,
# where imagecodecs, which nnU-Net brings along, serves as well.
_DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    **dict.fromkeys(("50", "51"), imagecodecs.jpeg8_decode),
    **dict.fromkeys(("57", "70"), imagecodecs.ljpeg_decode),
    **dict.fromkeys(("80", "81"), imagecodecs.jpegls_decode),
    **dict.fromkeys(("90", "91", "201", "202", "203"), imagecodecs.jpeg2k_decode),
}


def scaled_frames(dataset: pydicom.Dataset, frames: tuple[Frame, ...]) -> Iterator[np.ndarray]:
    """The frames of a file in the order in which they are stored, each scaled by its own slope and intercept.

    Args:
        dataset: read with its pixels.
        frames: all of its frames, as in its header.

    Yields:
        arrays (rows, columns), float32.

    Raises:
        VolumeProblem: if pixels are missing, damaged or coded in a way that cannot be read.
    """
    try:
        with tolerant():
            planes = [_stored_values(dataset, plane) for plane in _planes(dataset)]
    except Exception as error:  # decoders raise whatever their library raises
        raise VolumeProblem(f"its pixels cannot be read: {unreadable(error).removeprefix('unreadable: ')}") from error
    if len(planes) != len(frames):
        raise VolumeProblem(f"cut short: {len(planes)} of {len(frames)} frames")
    for frame, plane in zip(frames, planes, strict=True):
        if plane.shape != frame.size[::-1]:
            raise VolumeProblem(f"its pixels cannot be read: {plane.shape} instead of {frame.size[::-1]}")
        if "ModalityLUTSequence" in dataset:
            yield apply_modality_lut(plane, dataset).astype(np.float32)
        elif (frame.slope, frame.intercept) == (1.0, 0.0):
            yield plane.astype(np.float32)
        else:
            yield (plane.astype(np.float64) * frame.slope + frame.intercept).astype(np.float32)


def _planes(dataset: pydicom.Dataset) -> Iterator[np.ndarray]:
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    decode = _DECODERS.get(syntax.removeprefix(_COMPRESSED)) if syntax.startswith(_COMPRESSED) else None
    if decode is None:
        yield from iter_pixels(dataset, raw=True)
        return
    count = int(dataset.get("NumberOfFrames") or 1)
    offsets = dataset.get("ExtendedOffsetTable")
    extended = (offsets, dataset.ExtendedOffsetTableLengths) if offsets else None
    for code in generate_frames(dataset.PixelData, number_of_frames=count, extended_offsets=extended):
        if not code.rstrip(b"\x00").endswith(_END_OF_IMAGE):  # some decoders fill up what is missing without a word
            raise VolumeProblem("cut short: a compressed frame without its end")
        yield decode(code)


def _stored_values(dataset: pydicom.Dataset, plane: np.ndarray) -> np.ndarray:
    """Values from the bits that are stored: without overlays above them, signed or not as the header says."""
    allocated = plane.dtype.itemsize * 8
    stored = int(dataset.get("BitsStored") or allocated)
    is_signed = int(dataset.get("PixelRepresentation") or 0) == 1
    if plane.dtype.kind == "f" or (stored >= allocated and is_signed == (plane.dtype.kind == "i")):
        return plane
    plane = plane.astype(plane.dtype.newbyteorder("="), copy=False)  # a view forgets the order of bytes
    values = plane.view(f"u{plane.dtype.itemsize}").astype(np.int64) & ((1 << stored) - 1)
    return np.where(values >> (stored - 1), values - (1 << stored), values) if is_signed else values
