"""DICOM as archives hold it: what comes out is what the scanner measured, or nothing, with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dicom_files
import imagecodecs
import numpy as np
import phantoms
import pydicom
import pytest
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)

from nnunetv2_misfm.pool.dicom_pixels import _stored_values
from nnunetv2_misfm.pool.inspection import find_volumes
from nnunetv2_misfm.pool.reading import read_volume
from nnunetv2_misfm.pool.volume_files import VolumeProblem

HU = phantoms.ct(shape=(12, 20, 24)).astype(float)
POSITIONS = [[0, 0, 2.5 * number] for number in range(len(HU))]


def upright(lps: np.ndarray) -> np.ndarray:
    """Axes (z, y, x) as stored in LPS, as they are to be in RAS."""
    return lps[:, ::-1, ::-1]


def only_volume(folder: Path) -> tuple[np.ndarray, tuple[float, ...], str]:
    found = find_volumes([folder])
    assert len(found.volumes) == 1, found.left_out
    voxels, spacing, mended = read_volume(found.volumes[0])
    return voxels[0], spacing, mended


def only_reason(folder: Path) -> str:
    found = find_volumes([folder])
    assert not found.volumes
    assert len(found.left_out) == 1
    return found.left_out[0].reason


# Each gives attributes of slices; the stored numbers are written so that the Hounsfield units are those of HU.
SLOPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "first slice without negative values": lambda n: {"RescaleIntercept": 0 if n == 0 else -1024},
    "every other slice signed": lambda n: {"RescaleIntercept": -1024 if n % 2 else 0},
    "every slice its own": lambda n: {"RescaleSlope": 1 if n % 3 else 0.5, "RescaleIntercept": -1024 - n},
}


@pytest.mark.parametrize("kind", SLOPES)
def test_every_slice_is_scaled_by_its_own_header(tmp_path: Path, kind: str) -> None:
    hu = HU.copy()
    hu[0] = np.maximum(hu[0], 0)
    dicom_files.series(tmp_path, hu, SLOPES[kind])
    voxels, spacing, mended = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(hu))
    assert spacing == (2.5, 0.8, 0.8)
    assert "slices scaled one by one" in mended


def test_pet_with_a_slope_per_slice_goes_beyond_16_bits(tmp_path: Path) -> None:
    activity = np.maximum(HU + 1000, 0) * 100.0  # up to about 200,000 Bq/ml
    slopes = [4.0 + 0.25 * (number % 4) for number in range(len(HU))]
    for number, plane in enumerate(activity):
        dicom_files.one_file(
            tmp_path / f"{number}.dcm",
            np.rint(plane / slopes[number]),
            SOPClassUID=PositronEmissionTomographyImageStorage,
            Modality="PT",
            ImagePositionPatient=POSITIONS[number],
            RescaleSlope=slopes[number],
            RescaleIntercept=0,
        )
    voxels, _, _ = only_volume(tmp_path)
    assert voxels.max() > 65536
    np.testing.assert_allclose(voxels, upright(activity), atol=3)  # half a step of the largest slope


@pytest.mark.parametrize("bits", [12, 10])
def test_bits_above_those_stored_are_no_values(tmp_path: Path, bits: int) -> None:
    hu = np.clip(HU, -1024, (1 << bits) - 1025)
    for number, plane in enumerate(hu):
        stored = (plane + 1024).astype(int)
        stored[3:6, 3:6] |= 1 << 15  # an overlay
        dicom_files.one_file(
            tmp_path / f"{number}.dcm",
            stored,
            BitsStored=bits,
            HighBit=bits - 1,
            ImagePositionPatient=POSITIONS[number],
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )
    np.testing.assert_array_equal(only_volume(tmp_path)[0], upright(hu))


def test_values_of_twelve_bits_in_either_order_of_bytes() -> None:
    header = pydicom.Dataset()
    header.BitsStored, header.PixelRepresentation = 12, 0
    for order in "<>":
        np.testing.assert_array_equal(_stored_values(header, np.array([30, 4095], f"{order}u2")), [30, 4095])


def test_monochrome1_changes_how_a_ct_is_shown_not_its_values(tmp_path: Path) -> None:
    dicom_files.series(tmp_path / "ct", HU, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(only_volume(tmp_path / "ct")[0], upright(HU))
    dicom_files.series(tmp_path / "mr", HU, PhotometricInterpretation="MONOCHROME1", Modality="MR")
    assert "MONOCHROME1" in only_reason(tmp_path / "mr")


@pytest.mark.parametrize("order", [range(11, -1, -1), [*range(0, 12, 2), *range(1, 12, 2)], range(12)])
def test_frames_of_an_enhanced_file_are_sorted_by_position(tmp_path: Path, order: Sequence[int]) -> None:
    order = list(order)
    dicom_files.enhanced(tmp_path / "e.dcm", (HU + 1024)[order], [POSITIONS[number] for number in order])
    voxels, spacing, mended = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert spacing == (2.5, 0.8, 0.8)
    assert mended == ("" if order == sorted(order) else "frames sorted by position")


def test_every_frame_is_scaled_by_its_own_slope(tmp_path: Path) -> None:
    scales = [(0.5 * (1 + number % 3), -1024.0 - number) for number in range(len(HU))]
    hu = np.stack(
        [np.rint((plane - b) / a) * a + b for plane, (a, b) in zip(np.maximum(HU, -1000), scales, strict=True)]
    )
    stored = np.stack([(plane - b) / a for plane, (a, b) in zip(hu, scales, strict=True)])
    dicom_files.enhanced(tmp_path / "e.dcm", stored, POSITIONS, scales)
    np.testing.assert_array_equal(only_volume(tmp_path)[0], upright(hu))


def test_frames_of_an_oblique_enhanced_file_keep_their_distance(tmp_path: Path) -> None:
    cosine, sine = np.cos(np.radians(20)), np.sin(np.radians(20))
    orientation = [1, 0, 0, 0, cosine, sine]
    normal = np.array([0, -sine, cosine])
    dicom_files.enhanced(
        tmp_path / "e.dcm",
        HU + 1024,
        [list(3.0 * number * normal) for number in range(len(HU))],
        orientations=[orientation] * len(HU),
    )
    voxels, spacing, _ = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert spacing == pytest.approx((3.0, 0.8, 0.8))


TWO_TIMES = [*POSITIONS[:6], *POSITIONS[:6]]
MANY_FRAMES: dict[str, tuple[Callable[[Path], object], str]] = {
    "time points": (lambda path: dicom_files.enhanced(path, HU + 1024, TWO_TIMES), "4D"),
    "a gap": (
        lambda path: dicom_files.enhanced(
            path, HU + 1024, [*POSITIONS[:6], *([0, 0, 40 + z] for _, _, z in POSITIONS[6:])]
        ),
        "missing or unevenly spaced",
    ),
    "two orientations": (
        lambda path: dicom_files.enhanced(
            path, HU[:, :20, :20] + 1024, POSITIONS, orientations=[dicom_files.AXIAL] * 6 + [(0, 1, 0, 0, 0, -1)] * 6
        ),
        "different sizes or orientations",
    ),
    "no positions": (
        lambda path: dicom_files.one_file(path, HU + 1024, ImagePositionPatient=None, ImageOrientationPatient=None),
        "12 frames in one DICOM file without position or orientation",
    ),
    "one position for all": (lambda path: dicom_files.one_file(path, HU + 1024), "without position or orientation"),
    "a movie": (
        lambda path: dicom_files.one_file(path, HU + 1024, Modality="US", PixelSpacing=None),
        "DICOM modality US",
    ),
    "a rotating projection": (
        lambda path: dicom_files.one_file(
            path, HU + 1024, PixelSpacing=None, ImagePositionPatient=None, ImageOrientationPatient=None
        ),
        "the size of its voxels is not known",
    ),
    "dynamic nuclear medicine": (
        lambda path: dicom_files.nuclear_medicine(path, HU + 1024, 2.5, kind="DYNAMIC"),
        "no slices (DYNAMIC)",
    ),
}


@pytest.mark.parametrize("kind", MANY_FRAMES)
def test_frames_that_make_no_regular_grid_are_left_out(tmp_path: Path, kind: str) -> None:
    make, reason = MANY_FRAMES[kind]
    make(tmp_path / "e.dcm")
    assert reason in only_reason(tmp_path)


@pytest.mark.parametrize("step", [2.5, -2.5])
def test_slices_of_nuclear_medicine_are_stacked_as_their_step_says(tmp_path: Path, step: float) -> None:
    dicom_files.nuclear_medicine(tmp_path / "nm.dcm", HU + 1024, step)
    voxels, spacing, _ = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU + 1024)[:: 1 if step > 0 else -1])
    assert spacing == (2.5, 0.8, 0.8)


SHIFTED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "pixel spacing changes": (lambda n: {"PixelSpacing": [0.8, 0.8] if n < 6 else [0.5, 0.5]}, "0.5 to 0.8 mm"),
    "a table that jumps": (lambda n: {"ImagePositionPatient": [0 if n < 6 else 30, 0, 2.5 * n]}, "30 mm apart"),
    "slices that waver": (lambda n: {"ImagePositionPatient": [0, n % 2, 2.5 * n]}, "do not lie on each other"),
    "slices that turn": (
        lambda n: {"ImageOrientationPatient": [np.cos(n / 20), np.sin(n / 20), 0, -np.sin(n / 20), np.cos(n / 20), 0]},
        "orientations",
    ),
    "no pixel spacing": (lambda n: {"PixelSpacing": None}, "the size of its voxels is not known"),
    "pixel spacing 0": (lambda n: {"PixelSpacing": [0, 0]}, "voxel size 0 x 0 x 2.5 mm"),
    "a slice without position": (
        lambda n: {"ImagePositionPatient": None} if n == 5 else {},
        "without position or orientation",
    ),
    "a slope of 0": (lambda n: {"RescaleSlope": 0} if n == 5 else {}, "RescaleSlope 0"),
    "colours": (lambda n: {"PhotometricInterpretation": "PALETTE COLOR"}, "colours"),
}


@pytest.mark.parametrize("kind", SHIFTED)
def test_slices_that_do_not_lie_on_each_other_are_left_out(tmp_path: Path, kind: str) -> None:
    of_slice, reason = SHIFTED[kind]
    dicom_files.series(tmp_path, HU, of_slice)
    assert reason in only_reason(tmp_path)


def test_a_tilted_gantry_is_straightened(tmp_path: Path) -> None:
    """Slices move by one pixel (0.8 mm) each along y; the body they show stands straight."""
    large = np.pad(HU, ((0, 0), (0, 12), (0, 0)), constant_values=-1000)
    # Slice n shows the body from row n on, so its first row lies n pixels further along y.
    planes = np.stack([plane[n : n + 20] for n, plane in enumerate(large)])
    dicom_files.series(tmp_path, planes, lambda n: {"ImagePositionPatient": [0, 0.8 * n, 2.5 * n]})
    voxels, spacing, mended = only_volume(tmp_path)
    assert "straightened tilted axes: they were off by 17.7°" in mended
    assert spacing == pytest.approx((2.5, 0.8, 0.8))
    right = np.full((12, 20 + 11, 24), float(planes.min()))
    for n, plane in enumerate(planes):
        right[n, n : n + 20] = plane
    assert voxels.shape == right.shape
    np.testing.assert_allclose(voxels, upright(right), atol=1e-2)


def test_a_drift_below_half_a_pixel_changes_nothing(tmp_path: Path) -> None:
    dicom_files.series(tmp_path, HU, lambda n: {"ImagePositionPatient": [0.03 * n, 0, 2.5 * n]})
    voxels, spacing, mended = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert (spacing, mended) == ((2.5, 0.8, 0.8), "")


ANONYMISED: dict[str, dict[str, Any]] = {
    "one SOPInstanceUID for all": {"SOPInstanceUID": "1.2.3.4.5"},
    "empty SOPInstanceUID": {"SOPInstanceUID": ""},
    "empty modality": {"Modality": ""},
    "no SeriesInstanceUID": {"SeriesInstanceUID": None},
    "no patient, no study": {"PatientID": None, "StudyInstanceUID": None},
}


@pytest.mark.parametrize("kind", ANONYMISED)
def test_anonymised_series_are_told_by_their_positions(tmp_path: Path, kind: str) -> None:
    dicom_files.series(tmp_path, HU, **ANONYMISED[kind])
    np.testing.assert_array_equal(only_volume(tmp_path)[0], upright(HU))


@pytest.mark.parametrize("folder_of", ["I{0:03d}", "half{1}"])
def test_a_series_in_several_folders_is_one_volume(tmp_path: Path, folder_of: str) -> None:
    dicom_files.series(tmp_path, HU, name=lambda n: f"{folder_of.format(n, n // 6)}/image{n}.dcm")
    voxels, _, _ = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert "12 files in" in find_volumes([tmp_path]).volumes[0].source


@pytest.mark.parametrize("folder_of", ["half{1}", "turn{2}"])
def test_a_copy_of_a_series_in_several_folders_does_not_cut_it(tmp_path: Path, folder_of: str) -> None:
    """Every second slice would make a volume too, with the wrong spacing."""
    dicom_files.series(tmp_path / "archive", HU, name=lambda n: f"{folder_of.format(n, n // 6, n % 2)}/{n}.dcm")
    shutil.copytree(tmp_path / "archive", tmp_path / "copy")
    voxels, spacing, _ = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert spacing == (2.5, 0.8, 0.8)


def test_parts_of_a_series_that_is_whole_elsewhere_are_left_out(tmp_path: Path) -> None:
    dicom_files.series(tmp_path / "whole", HU)
    for number, file in enumerate(sorted((tmp_path / "whole").iterdir())):
        part = tmp_path / "parts" / f"turn{number % 2}"
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, part)
    voxels, spacing, _ = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert spacing == (2.5, 0.8, 0.8)
    reasons = [one.reason for one in find_volumes([tmp_path]).left_out]
    assert len(reasons) == 2 and all("a part of a DICOM series that is whole in" in reason for reason in reasons)


def test_parts_of_a_series_that_is_whole_but_no_volume_are_taken(tmp_path: Path) -> None:
    """Such as time points in a folder each, which were copied from a folder that holds all of them."""
    dicom_files.series(
        tmp_path / "all", np.concatenate([HU, HU + 1]), lambda n: {"ImagePositionPatient": [0, 0, 2.5 * (n % 12)]}
    )
    for number, file in enumerate(sorted((tmp_path / "all").iterdir())):
        phase = tmp_path / f"phase{number // 12}"
        phase.mkdir(exist_ok=True)
        shutil.copy(file, phase)
    found = find_volumes([tmp_path])
    read = sorted(float(read_volume(volume)[0].mean()) for volume in found.volumes)
    assert read == pytest.approx([HU.mean(), HU.mean() + 1], abs=1e-3)
    assert [one.reason.partition(":")[0] for one in found.left_out] == ["4D"]


def test_rounded_positions_are_even(tmp_path: Path) -> None:
    """0.625 mm with one digit: distances of 0.6 and 0.7 mm."""
    dicom_files.series(tmp_path, HU, lambda n: {"ImagePositionPatient": [0, 0, round(0.625 * n + 1e-9, 1)]})
    voxels, spacing, _ = only_volume(tmp_path)
    np.testing.assert_array_equal(voxels, upright(HU))
    assert spacing[0] == pytest.approx(0.625, abs=0.01)


def test_patients_with_one_series_uid_are_not_mixed(tmp_path: Path) -> None:
    for number, patient in enumerate(("a", "b")):
        dicom_files.series(tmp_path / patient, HU + number)
    found = find_volumes([tmp_path])
    read = sorted(float(read_volume(volume)[0].mean()) for volume in found.volumes)
    assert read == pytest.approx([HU.mean(), HU.mean() + 1], abs=1e-3)


def test_slices_of_several_folders_that_make_no_volume_say_where_they_belong(tmp_path: Path) -> None:
    kept = [number for number in range(12) if number not in (4, 5, 6)]
    dicom_files.series(tmp_path, HU, name=lambda n: f"I{n}/image.dcm")
    for number in {*range(12)} - {*kept}:
        (tmp_path / f"I{number}" / "image.dcm").unlink()
    (reason,) = {left_out.reason for left_out in find_volumes([tmp_path]).left_out}
    assert "9 files in 9 folders that make no volume together: DICOM slices missing" in reason


COMPRESSED = {
    "JPEG 2000": (JPEG2000Lossless, lambda plane: imagecodecs.jpeg2k_encode(plane, codecformat="J2K", reversible=True)),
    "JPEG-LS": (JPEGLSLossless, imagecodecs.jpegls_encode),
    "lossless JPEG": (JPEGLosslessSV1, imagecodecs.ljpeg_encode),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_slices_are_read_and_cut_ones_found_out(tmp_path: Path, kind: str) -> None:
    dicom_files.series(tmp_path, HU)
    syntax, encode = COMPRESSED[kind]
    for path in tmp_path.iterdir():
        dicom_files.compress(path, syntax, encode)
    np.testing.assert_array_equal(only_volume(tmp_path)[0], upright(HU))
    dicom_files.series(tmp_path, HU)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        dicom_files.compress(path, syntax, encode, share=0.5 if number == 7 else 1)
    with pytest.raises(VolumeProblem, match=r"its pixels cannot be read: .*\(0007.dcm\)"):
        only_volume(tmp_path)


def test_run_length_coded_slices_are_read(tmp_path: Path) -> None:
    dicom_files.series(tmp_path, HU)
    for path in tmp_path.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path)
    np.testing.assert_array_equal(only_volume(tmp_path)[0], upright(HU))


@pytest.mark.parametrize(
    "make", [dicom_files.series, lambda folder, hu: dicom_files.enhanced(folder / "e.dcm", hu + 1024, POSITIONS)]
)
def test_pixels_that_are_cut_short_are_found_out(tmp_path: Path, make: Callable[..., object]) -> None:
    make(tmp_path, HU)
    path = sorted(tmp_path.iterdir())[-1]
    dataset = pydicom.dcmread(path)
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) * 2 // 3 // 2 * 2]
    dataset.save_as(path)
    with pytest.raises(VolumeProblem, match="its pixels cannot be read|cut short"):
        only_volume(tmp_path)


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_lossy_frames_that_are_cut_short_are_found_out(tmp_path: Path, bits: int, share: float) -> None:
    """libjpeg fills up what is missing with grey and only warns."""
    grey = np.clip((HU + 1000) / 8, 0, 250)
    for number, plane in enumerate(grey):
        path = tmp_path / f"{number:04d}.dcm"
        dicom_files.one_file(path, plane.astype(int), Modality="MR", ImagePositionPatient=POSITIONS[number])

        def encode(pixels: np.ndarray) -> bytes:
            pixels = pixels.astype(np.uint8 if bits == 8 else np.uint16)
            code: bytes = imagecodecs.jpeg8_encode(pixels, level=95, bitspersample=bits)
            return code

        syntax = "1.2.840.10008.1.2.4.50" if bits == 8 else "1.2.840.10008.1.2.4.51"
        dicom_files.compress(path, syntax, encode, share if number == 7 else 1)
    with pytest.raises(VolumeProblem, match=r"cut short: a compressed frame without its end.*0007"):
        only_volume(tmp_path)


def test_values_that_do_not_begin_at_bit_0_are_left_out(tmp_path: Path) -> None:
    dicom_files.series(tmp_path, HU, BitsStored=12, HighBit=15)
    assert "BitsStored 12, HighBit 15" in only_reason(tmp_path)


@pytest.mark.parametrize("orientation", [[0.5, 0, 0, 0, 0.5, 0], [1, 0, 0, 0.5, 0.87, 0], [0] * 6])
def test_orientations_that_are_no_directions_are_left_out(tmp_path: Path, orientation: list[float]) -> None:
    dicom_files.series(tmp_path, HU, ImageOrientationPatient=orientation)
    assert "is no pair of directions" in only_reason(tmp_path)


def test_two_reconstructions_are_not_interleaved(tmp_path: Path) -> None:
    dicom_files.series(tmp_path, HU, ConvolutionKernel="B30")
    between = lambda n: {"ImagePositionPatient": [0, 0, 2.5 * n + 1.25]}  # noqa: E731
    dicom_files.series(tmp_path, HU + 300, between, name="other{}.dcm".format, ConvolutionKernel="B70")
    assert "several reconstructions under one SeriesInstanceUID (B30, B70)" in only_reason(tmp_path)


def test_two_patients_in_one_folder_with_one_series_uid_are_two_volumes(tmp_path: Path) -> None:
    for number, patient in enumerate("ab"):
        dicom_files.series(tmp_path, HU + number, name=f"{patient}{{}}.dcm".format, PatientID=patient)
    found = find_volumes([tmp_path])
    assert (len({volume.case for volume in found.volumes}), found.left_out) == (2, ())
    assert len({volume.source for volume in found.volumes}) == 2


def test_a_file_without_preamble_and_ending_is_found(tmp_path: Path) -> None:
    dicom_files.series(tmp_path, HU)
    for path in sorted(tmp_path.iterdir()):
        dataset = pydicom.dcmread(path)
        plain = pydicom.Dataset({element.tag: element for element in dataset})
        plain.save_as(path.with_suffix(""), implicit_vr=True, little_endian=True, enforce_file_format=False)
        path.unlink()
    np.testing.assert_array_equal(only_volume(tmp_path)[0], upright(HU))
