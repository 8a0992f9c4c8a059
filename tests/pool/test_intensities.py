"""Values that are not what they seem: other units than Hounsfield's, MR that reaches below -500, labels in disguise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import phantoms
import pytest
from scipy.ndimage import zoom

from nnunetv2_misfm.pool.volume_files import VolumeProblem
from nnunetv2_misfm.pool.voxels import check_hounsfield, check_normalised, check_voxels, guess_modality

SHAPE = (40, 48, 56)
CT, MR = phantoms.ct(shape=SHAPE).astype(np.float32), phantoms.mr(shape=SHAPE).astype(np.float32)
BODY = CT > -500
LABELS = phantoms.labels(SHAPE).astype(np.float32)


def undershooting() -> np.ndarray:
    """A bright MR after interpolation with cubic splines, as a resampling leaves it."""
    coarse = np.where(phantoms.mr(shape=(40, 24, 28)) > 200, 5000.0, 0.0)
    image: np.ndarray = zoom(coarse, (1, 2, 2), order=3)
    assert image.min() < -500
    return image


NOT_CT: dict[str, Callable[[], np.ndarray]] = {
    "undershoot of splines": undershooting,
    "z-scores times 200": lambda: np.random.default_rng(0).normal(0, 200, SHAPE),
    "phase": lambda: np.random.default_rng(0).integers(-4096, 4096, SHAPE),
    "subtraction of two MR": lambda: np.random.default_rng(0).normal(0, 900, SHAPE),
    "bright MR": lambda: MR * 20 - 600,
}


@pytest.mark.parametrize("kind", NOT_CT)
def test_values_below_minus_500_alone_make_no_ct(kind: str) -> None:
    assert guess_modality(NOT_CT[kind]()[None].astype(np.float32), None)[0] == "mr"


IS_CT: dict[str, Callable[[], np.ndarray]] = {
    "as it is": lambda: CT,
    "zeros around the patient": lambda: np.where(BODY | (CT < -700) & np.roll(BODY, 3, 1), CT, 0),
    "padded with -2000": lambda: np.pad(CT, 6, constant_values=-2000),
    "with metal": lambda: np.where(np.random.default_rng(0).random(SHAPE) < 0.002, 20000, CT),
    "up to 3071 in bone": lambda: np.where(np.random.default_rng(0).random(SHAPE) < 0.05, 3071, CT),
}


@pytest.mark.parametrize("kind", IS_CT)
def test_hounsfield_units_are_known_by_their_distribution(kind: str) -> None:
    voxels = IS_CT[kind]()[None].astype(np.float32)
    assert guess_modality(voxels, None)[0] == "ct"
    check_hounsfield(voxels)


NO_HU: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "0 to 4095": (lambda: np.clip(CT + 1024, 0, 4095), r"look like HU \+ 1024; subtract 1024"),
    "0 to 4095 with padding": (lambda: np.pad(CT + 1024, 4, constant_values=-2000), r"look like HU \+ 1024"),
    "0 to 65535": (lambda: CT + 32768, r"look like HU \+ 32768; subtract 32768"),
    "with an offset of 8192": (lambda: CT + 8192, r"look like HU \+ 8192"),
    "a body without air, offset": (lambda: CT[15:25, 18:30, 20:36] + 1024, r"look like HU \+ 1024"),
    "the intercept twice": (lambda: CT - 1024, "look like HU - 1024; add 1024"),
    "0 to 1": (lambda: (np.clip(CT, -160, 240) + 160) / 400, "look like grey values"),
    "0 to 255": (lambda: np.rint((np.clip(CT, -160, 240) + 160) / 400 * 255), "look like grey values"),
}


@pytest.mark.parametrize("kind", NO_HU)
def test_a_ct_in_other_units_is_named(kind: str) -> None:
    make, looks = NO_HU[kind]
    with pytest.raises(VolumeProblem, match=f"not in Hounsfield units.*{looks}.*-modality mr"):
        check_hounsfield(make()[None].astype(np.float32))


@pytest.mark.parametrize("crop", [np.s_[15:25, 18:30, 20:36], np.s_[:, 20:28, :], np.s_[10:, :, :]])
def test_crops_of_a_ct_in_hounsfield_units_pass(crop: tuple[slice, ...]) -> None:
    check_hounsfield(CT[crop][None])


NOT_WORTH_LEARNING: dict[str, tuple[np.ndarray, str]] = {
    "clipped": (np.where(np.random.default_rng(0).random(SHAPE) < 0.7, 1, CT / 1000), "70% of the voxels are clipped"),
    "flat": (np.random.default_rng(0).normal(0.04, 1e-4, SHAPE), "hardly any spread"),
    "one value": (np.ones(SHAPE), "constant after normalisation"),
    "infinite": (np.full(SHAPE, np.inf), "NaN or infinity"),
}


@pytest.mark.parametrize("kind", NOT_WORTH_LEARNING)
def test_a_normalised_array_without_contrast_is_left_out(kind: str) -> None:
    data, reason = NOT_WORTH_LEARNING[kind]
    with pytest.raises(VolumeProblem, match=reason):
        check_normalised(data[None].astype(np.float32), CT[None], ["CTNormalization"])


def test_a_white_background_of_an_mr_is_no_clipping() -> None:
    data = np.where(BODY, np.random.default_rng(0).normal(0, 1, SHAPE), 1.5)
    check_normalised(data[None].astype(np.float32), MR[None], ["ZScoreNormalization"])


LABELS_IN_DISGUISE: dict[str, np.ndarray] = {
    "scaled": LABELS * 0.00098823,
    "of 255": (LABELS > 0) * 255 / 255,
    "with -1": np.where(LABELS == 0, -1, LABELS),
    "with -1 to ignore, background 0": np.where(np.arange(SHAPE[0])[:, None, None] < 2, -1, LABELS),
    "almost whole": LABELS * 0.9999999975,
    "two values far apart": np.where(LABELS > 1, 1000, -1000),
    "of an atlas": np.where(LABELS > 0, LABELS * 700 + np.arange(SHAPE[2])[None, None, :] // 14, 0),
    "no background": LABELS + 1,
    "thousands of instances": np.arange(1568.0).reshape(14, 16, 7).repeat(3, 0)[:40].repeat(3, 1).repeat(8, 2),
    "changing along one axis": LABELS + 5 * np.arange(SHAPE[2])[None, None, :],
    "one structure of 10.92": (LABELS > 0) * 10.921457,
}


@pytest.mark.parametrize("kind", LABELS_IN_DISGUISE)
def test_few_values_in_even_regions_are_labels_whatever_they_are(kind: str) -> None:
    with pytest.raises(VolumeProblem, match="looks like a label map.*--no_skip_label_maps"):
        check_voxels(LABELS_IN_DISGUISE[kind][None].astype(np.float32), skip_label_maps=True)


IMAGES: dict[str, np.ndarray] = {
    "CT": CT,
    "MR": MR,
    "MR without its background": np.where(MR > 200, MR, 0),
    "CT in a window": np.clip(CT, -20, 80),
    "eight-bit": np.rint(np.clip(MR / 2, 0, 255)),
    "twice as fine without interpolation": np.repeat(np.repeat(np.repeat(MR[:20, :24, :28], 2, 0), 2, 1), 2, 2),
    "a binary mask times an image": (LABELS > 0) * MR,
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_with_even_parts_are_no_labels(kind: str) -> None:
    check_voxels(IMAGES[kind][None].astype(np.float32), skip_label_maps=True)
