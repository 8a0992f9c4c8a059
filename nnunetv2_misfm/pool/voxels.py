"""The voxels of one volume: judging whether they are worth learning from, CT or MR, and finding the body in a CT.

Arrays are (C, Z, Y, X), float32; spacings are mm in the order (Z, Y, X).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import scipy.ndimage

from nnunetv2_misfm.plans.normalisation import CT
from nnunetv2_misfm.pool.volume_files import VolumeProblem

AIR_BELOW_HU = -500
GAS_BELOW_HU = -700
LEAST_SHARE_OF_GAS = 2e-3
"""Air, lungs or bowel gas in a CT; the undershoot of interpolated MR reaches as low in fewer voxels."""
SOFT_TISSUE_HU = (-200, 300)
SOFT_TISSUE_SHARE_OF_CT = 0.3
"""Least share of soft tissue among what is neither air nor background, from which on values are taken for HU. Phase
images and other signed MR values spread over their whole range instead."""
ABOVE_BONE_HU = 3100
MOST_SHARE_ABOVE_BONE = 0.01
"""Scanners end at 3071 HU; only metal is above that."""
OFFSETS_OF_CT = (1024.0, 8192.0, 32768.0, -1024.0)
"""What is added to HU where they are stored as numbers from 0 on, as by DICOM without its rescale intercept; or where
the intercept was applied twice."""
WORTH_EXPLAINING, LEFT_UNEXPLAINED = 0.1, 0.3
"""An offset is believed where more than this share of values lies outside air to soft tissue without it, and no more
than this part of them is left with it."""
AIR_AT_LEAST_HU = -1100
FAT_HU = (-200, -40)
LEAST_SHARE_OF_FAT = 0.01
"""A patient in Hounsfield units has fat; air that is stored as 24 does not reach below -40."""
LOWEST_HU = -1200
MOST_SHARE_BELOW_AIR = 0.01
"""Of values below -1200 that are not the lowest one, which may be padding."""
GREY_VALUES_UP_TO = 255
LABEL_NEIGHBOURS_EQUAL = 0.85
"""Share of equal neighbours from which values are labels: measured .95 to 1 for label maps, .66 at most for images
of 16 grey levels and .4 for those of 64."""
MOST_LABELS = 1024
MOST_CLIPPED = 0.5
LEAST_SPREAD = 0.02
"""Of normalised values (CT from -1 to 1, MR with standard deviation 1) between their 0.5th and 99.5th percentile."""
SAMPLE = 200_000
"""Voxels from which shares and percentiles are found."""
SMALL_STRUCTURE = 0.05
"""Structures below this share of the largest are no part of the body: specks, pillows, cables."""
BODY_MARGIN_MM = 10.0
BODY_SEARCH_MM = 4.0
CONTENT_LOST_AT_MOST = 0.1

BoundingBox = tuple[tuple[int, int], ...]
"""Per axis (first, last + 1)."""


def check_voxels(voxels: np.ndarray, skip_label_maps: bool) -> None:
    """Find out whether voxels (C, Z, Y, X) are worth learning from.

    Raises:
        VolumeProblem: not finite, constant, or (if `skip_label_maps`) labels instead of intensities.
    """
    bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
    if bad:
        raise VolumeProblem(f"NaN or infinity in {bad} of {voxels.size} voxels")
    for number, channel in enumerate(voxels):
        of_channel = f" in channel {number}" if len(voxels) > 1 else ""
        if channel.min() == channel.max():
            raise VolumeProblem(f"constant: every voxel{of_channel} is {channel.flat[0]:g}")
        if skip_label_maps and (labels := _number_of_labels(channel)):
            raise VolumeProblem(
                f"looks like a label map{of_channel}: {labels} different values in even regions "
                "(--no_skip_label_maps uses it all the same)"
            )


def check_hounsfield(voxels: np.ndarray) -> None:
    """Find out whether voxels (C, Z, Y, X) that are to be normalised as CT can be in Hounsfield units.

    Raises:
        VolumeProblem: if nearly all of them are air to soft tissue once one of `OFFSETS_OF_CT` is taken away, but
            not before, or if all are grey values from 0 to 255.
    """
    sample = _sample(voxels[0])
    low, high = float(voxels[0].min()), float(voxels[0].max())
    inside = sample[sample != _background(sample)] if _background(sample) == low else sample  # without padding
    fat = float(np.mean((inside > FAT_HU[0]) & (inside < FAT_HU[1])))
    unexplained = _share_unexplained(inside, 0)
    offset = min(OFFSETS_OF_CT, key=lambda value: _share_unexplained(inside, value))
    has_air = float(np.mean(np.abs(inside + 1000) < 100)) > LEAST_SHARE_OF_FAT
    explains = not (has_air and offset > 0) and _share_unexplained(inside, offset) < LEFT_UNEXPLAINED * unexplained
    if explains and unexplained > WORTH_EXPLAINING and fat < LEAST_SHARE_OF_FAT:
        operation = f"+ {offset:g}; subtract {offset:g}" if offset > 0 else f"- {-offset:g}; add {-offset:g}"
        remedy = f"look like HU {operation}"
    elif low >= 0 and high <= GREY_VALUES_UP_TO:
        remedy = "look like grey values; use the original images"
    else:
        return
    raise VolumeProblem(
        f"CT that is not in Hounsfield units: its values ({low:g} to {high:g}, median {np.median(sample):g}) {remedy}, "
        "or give -modality mr, which needs no units"
    )


def check_normalised(data: np.ndarray, voxels: np.ndarray, schemes: Sequence[str]) -> None:
    """Find out whether a normalised array (C, X, Y, Z) can be learnt from.

    Args:
        data: what is to be stored.
        voxels: what it was made of, for the message.
        schemes: nnU-Net's normalisation scheme for each channel.

    Raises:
        VolumeProblem: not finite, hardly any spread, or a CT that is mostly clipped to the upper end of the window.
    """
    if not np.isfinite(data).all():
        raise VolumeProblem("NaN or infinity after normalisation: the intensities are too large for float32")
    for channel, before, scheme in zip(data, voxels, schemes, strict=True):
        is_ct = scheme == CT
        sample, high = _sample(channel), channel.max()
        first, last = np.percentile(sample, (0.5, 99.5))
        clipped = float(np.mean(sample == high)) if is_ct else 0.0
        if channel.min() == high:
            problem = "constant after normalisation"
        elif last - first < LEAST_SPREAD:
            problem = f"hardly any spread after normalisation ({first:.3g} to {last:.3g} for 99 % of the voxels)"
        elif clipped > MOST_CLIPPED:
            problem = f"{clipped:.0%} of the voxels are clipped to the upper end of the CT window"
        else:
            continue
        advice = "; are these Hounsfield units? -modality mr needs no units" if is_ct else ""
        was = f"from {before.min():g} to {before.max():g}, median {np.median(_sample(before)):g}"
        raise VolumeProblem(f"{problem}: its values are {was}{advice}")


def content_hash(voxels: np.ndarray) -> str:
    """A fingerprint of shape and voxel values; equal for equal content in whatever format it was stored."""
    digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(voxels).view(np.uint8).data)
    return digest.hexdigest()


def guess_modality(voxels: np.ndarray, dicom_modality: str | None) -> tuple[str, str]:
    """`ct` or `mr`, and what that was decided from.

    The DICOM tag decides where there is one. Otherwise a volume is CT if its values are distributed like Hounsfield
    units: some gas below -700, hardly anything above 3100, and soft tissue between -200 and 300 among the rest.
    Everything that is not CT is normalised like MR.
    """
    if dicom_modality is not None:
        return ("ct" if dicom_modality == "CT" else "mr"), f"DICOM modality {dicom_modality}"
    sample = _sample(voxels[0])
    lowest = f"intensities: lowest value {float(voxels.min()):g}"
    gas, above = float(np.mean(sample < GAS_BELOW_HU)), float(np.mean(sample > ABOVE_BONE_HU))
    below = float(np.mean((sample < LOWEST_HU) & (sample > sample.min())))
    if gas < LEAST_SHARE_OF_GAS or above > MOST_SHARE_ABOVE_BONE or below > MOST_SHARE_BELOW_AIR:
        shares = f"{gas:.1%} below {GAS_BELOW_HU}, {below:.1%} below {LOWEST_HU}, {above:.1%} above {ABOVE_BONE_HU}"
        return "mr", f"{lowest}, {shares}"
    not_air = sample[(sample > AIR_BELOW_HU) & (sample != _background(sample))]
    low, high = SOFT_TISSUE_HU
    share = np.count_nonzero((not_air > low) & (not_air < high)) / max(not_air.size, 1)
    modality = "ct" if share >= SOFT_TISSUE_SHARE_OF_CT else "mr"
    return modality, f"{lowest}, {share:.0%} of what is above {AIR_BELOW_HU} is soft tissue"


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
        content = channel[channel != 0] if channel.any() else channel
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


def _sample(channel: np.ndarray) -> np.ndarray:
    """Some 200,000 voxels from all over a channel (Z, Y, X)."""
    step = max(1, round((channel.size / SAMPLE) ** (1 / 3)))
    return channel[::step, ::step, ::step].ravel()


def _background(sample: np.ndarray) -> float:
    """The most frequent value."""
    values, counts = np.unique(sample, return_counts=True)
    return float(values[counts.argmax()])


def _share_unexplained(sample: np.ndarray, offset: float) -> float:
    """The share of values that are, without the offset, no Hounsfield units from air to soft tissue."""
    hu = sample - offset
    return 1 - float(np.mean((hu > AIR_AT_LEAST_HU) & (hu < SOFT_TISSUE_HU[1])))


def _number_of_labels(channel: np.ndarray) -> int:
    """How many labels a label map (Z, Y, X) holds; 0 if these are intensities.

    Labels are few, or whole numbers, and stay the same from voxel to neighbouring voxel along one axis at least. Voxels
    of the most frequent and of the highest value are not compared: an image's background and overexposed parts are
    even, too.
    """
    between = (channel != _background(_sample(channel))) & (channel != channel.max())
    if not any(_is_even(channel, between, axis) for axis in (2, 1, 0)):
        return 0
    different = len(np.unique(channel))
    return different if different <= MOST_LABELS or np.array_equal(channel, np.rint(channel)) else 0


def _is_even(channel: np.ndarray, between: np.ndarray, axis: int) -> bool:
    """Whether most neighbours along an axis are equal."""
    first, second = ((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
    compared = between[first] & between[second]
    equal = compared & (channel[first] == channel[second])
    return bool(np.count_nonzero(equal) >= LABEL_NEIGHBOURS_EQUAL * np.count_nonzero(compared))
