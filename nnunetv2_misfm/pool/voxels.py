"""The voxels of one volume: reading them with nnU-Net's readers, judging them, and finding the body in a CT.

Arrays are (C, Z, Y, X) as nnU-Net's readers return them, float32; spacings are mm in the order (Z, Y, X).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from typing import Any, cast

import numpy as np
import scipy.ndimage
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunetv2_misfm.pool.headers import VolumeProblem, check_file, not_finite, quiet_itk, unreadable
from nnunetv2_misfm.pool.volumes import Volume

CANONICAL_READER = "SimpleITKIOWithReorient"
AIR_BELOW_HU = -500
SOFT_TISSUE_HU = (-200, 300)
SOFT_TISSUE_SHARE_OF_CT = 0.3
"""Least share of soft tissue among what is not air, above which values reaching below -500 are taken for HU. Phase
images and other signed MR values spread over their whole range instead."""
LABEL_NEIGHBOURS_EQUAL = 0.85
"""Share of equal neighbours from which integers are labels: measured .95 to 1 for label maps, .66 at most for images
of 16 grey levels and .4 for those of 64."""
MOST_LABELS = 1024
SMALL_STRUCTURE = 0.05
"""Structures below this share of the largest are no part of the body: specks, pillows, cables."""
BODY_MARGIN_MM = 10.0
BODY_SEARCH_MM = 4.0
CONTENT_LOST_AT_MOST = 0.1

BoundingBox = tuple[tuple[int, int], ...]
"""Per axis (first, last + 1)."""


def read_voxels(volume: Volume, reader_name: str = CANONICAL_READER) -> tuple[np.ndarray, dict[str, Any], str]:
    """Read all channels of a volume with an nnU-Net reader.

    A file the named reader cannot handle is read by its counterpart, SimpleITK's or nibabel's, in the same orientation.

    Args:
        volume: what to read.
        reader_name: an nnU-Net reader class, as in a plan's `image_reader_writer`.

    Returns:
        voxels (C, Z, Y, X) float32, nnU-Net's properties (with `spacing` in mm, order Z, Y, X), the reader used.

    Raises:
        VolumeProblem: if a file is damaged or no reader can read it.
    """
    for files in volume.channels:
        for path in files:
            check_file(path)
    # sitk.ReadImage, which nnU-Net's readers call on each channel's entry, takes a list of slices as well as one file.
    entries = [files[0] if len(files) == 1 else list(files) for files in volume.channels]
    first_error: Exception | None = None
    for name in _readers(reader_name, volume.format):
        reader = recursive_find_reader_writer_by_name(name)()
        try:
            # The readers print what they then raise without a message; one line per volume goes into the report.
            with quiet_itk(), contextlib.redirect_stdout(io.StringIO()):
                voxels, properties = reader.read_images(cast(list[str], entries))
            return voxels, properties, name
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # readers raise whatever their library raises
            first_error = first_error or error
    raise VolumeProblem(unreadable(first_error or RuntimeError("no reader"))) from first_error


def check_voxels(voxels: np.ndarray, skip_label_maps: bool) -> None:
    """Find out whether voxels (C, Z, Y, X) are worth learning from.

    Raises:
        VolumeProblem: not finite, constant, or (if `skip_label_maps`) labels instead of intensities.
    """
    bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
    if bad:
        raise VolumeProblem(not_finite(bad, voxels.size))
    for number, channel in enumerate(voxels):
        of_channel = f" in channel {number}" if len(voxels) > 1 else ""
        if channel.min() == channel.max():
            raise VolumeProblem(f"constant: every voxel{of_channel} is {channel.flat[0]:g}")
        if skip_label_maps and (labels := _number_of_labels(channel)):
            raise VolumeProblem(
                f"looks like a label map{of_channel}: {labels} different integers in even regions "
                "(set skip_label_maps to false to use it)"
            )


def content_hash(voxels: np.ndarray) -> str:
    """A fingerprint of shape and voxel values; equal for equal content in whatever format it was stored."""
    digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(voxels).view(np.uint8).data)
    return digest.hexdigest()


def guess_modality(voxels: np.ndarray, dicom_modality: str | None) -> tuple[str, str]:
    """`ct` or `mr`, and what that was decided from.

    The DICOM tag decides where there is one. Otherwise a volume is CT if its values reach below -500 as Hounsfield
    units of air or lung do, and at least 30 % of what is not air lies between -200 and 300 as soft tissue does.
    Everything that is not CT is normalised like MR.
    """
    if dicom_modality is not None:
        return ("ct" if dicom_modality == "CT" else "mr"), f"DICOM modality {dicom_modality}"
    lowest = float(voxels.min())
    if lowest > AIR_BELOW_HU:
        return "mr", f"intensities: lowest value {lowest:g}"
    low, high = SOFT_TISSUE_HU
    not_air = int(np.count_nonzero(voxels > AIR_BELOW_HU))
    soft_tissue = int(np.count_nonzero((voxels > low) & (voxels < high)))
    share = soft_tissue / max(not_air, 1)
    modality = "ct" if share >= SOFT_TISSUE_SHARE_OF_CT else "mr"
    return modality, f"intensities: lowest value {lowest:g}, {share:.0%} of what is above {AIR_BELOW_HU} is soft tissue"


def body_box(voxels: np.ndarray, spacing: tuple[float, ...], min_size: int) -> BoundingBox | None:
    """The part of a CT that holds the patient, to cut the air around it away.

    The box holds all structures above -500 HU that are at least 5 % of the largest, with 10 mm around them.

    Args:
        voxels: (C, Z, Y, X) in Hounsfield units; the first channel is looked at.
        spacing: mm along (Z, Y, X).
        min_size: least number of voxels per axis that a box must keep.

    Returns:
        The box in voxels, or None where nothing should be cut: no structure found, nothing to gain, a box that would
        lose more than 10 % of what is not air, or one that gets too small.
    """
    image = voxels[0]
    step = [max(1, int(BODY_SEARCH_MM / mm)) for mm in spacing]
    coarse = image[:: step[0], :: step[1], :: step[2]] > AIR_BELOW_HU
    structures, count = scipy.ndimage.label(coarse)
    if count == 0:
        return None
    sizes = np.bincount(structures.ravel())[1:]
    of_body = 1 + np.flatnonzero(sizes >= SMALL_STRUCTURE * sizes.max())
    body = np.isin(structures, of_body)
    box = []
    for axis, (length, mm) in enumerate(zip(image.shape, spacing, strict=True)):
        occupied = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = int(np.ceil(BODY_MARGIN_MM / mm))
        first = int(occupied[0]) * step[axis] - step[axis] + 1 - margin
        last = int(occupied[-1]) * step[axis] + step[axis] - 1 + margin
        box.append((max(0, first), min(length, last + 1)))
    kept = coarse[tuple(slice(first // s, -(-last // s)) for (first, last), s in zip(box, step, strict=True))]
    lost = 1 - np.count_nonzero(kept) / np.count_nonzero(coarse)
    whole = all(last - first == length for (first, last), length in zip(box, image.shape, strict=True))
    too_small = any(last - first < min_size for first, last in box)
    return None if whole or too_small or lost > CONTENT_LOST_AT_MOST else tuple(box)


def intensity_statistics(voxels: np.ndarray) -> list[dict[str, float]]:
    """Per channel nnU-Net's intensity properties of the voxels that are not 0, from about 100,000 of them."""
    statistics = []
    for channel in voxels:
        content = channel[channel != 0]
        sample = content[:: max(1, content.size // 100_000)].astype(np.float64)
        low, median, high = np.percentile(sample, (0.5, 50.0, 99.5))
        statistics.append(
            {
                "mean": float(sample.mean()),
                "median": float(median),
                "std": float(sample.std()),
                "min": float(content.min()),
                "max": float(content.max()),
                "percentile_99_5": float(high),
                "percentile_00_5": float(low),
            }
        )
    return statistics


def _readers(named: str, file_format: str) -> list[str]:
    suffix = "WithReorient" if named.endswith("WithReorient") else ""
    if file_format != "NIfTI":
        return [f"SimpleITKIO{suffix}"]
    return list(dict.fromkeys([named, f"SimpleITKIO{suffix}", f"NibabelIO{suffix}"]))


def _number_of_labels(channel: np.ndarray) -> int:
    """How many labels a label map (Z, Y, X) holds; 0 if these are intensities.

    Labels are integers from 0 on that stay the same from voxel to neighbouring voxel. Voxels of 0 and of the highest
    value are not compared, because an image's background and overexposed parts are even, too.
    """
    highest = channel.max()
    if channel.min() < 0 or not np.array_equal(channel, np.rint(channel)):
        return 0
    between = (channel != 0) & (channel != highest)
    compared = between[..., :-1] & between[..., 1:]
    equal = compared & (channel[..., :-1] == channel[..., 1:])
    if np.count_nonzero(equal) < LABEL_NEIGHBOURS_EQUAL * np.count_nonzero(compared):
        return 0
    different = len(np.unique(channel))
    return different if different <= MOST_LABELS else 0
