"""Finding volumes in folders: formats, DICOM series, channels, names, and what is left out for which reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import phantoms
import pytest
import SimpleITK as sitk

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.pool.inspection import PoolInspection, find_volumes
from nnunetv2_misfm.pool.reading import read_volume


def only_reason(found: PoolInspection) -> str:
    assert not found.volumes
    assert len(found.left_out) == 1
    return found.left_out[0].reason


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"])
def test_every_file_format_is_found_and_read_alike(tmp_path: Path, ending: str) -> None:
    voxels = phantoms.mr()
    phantoms.write(tmp_path / "deep" / "er" / f"scan{ending}", voxels, (2, 1, 0.5))
    (volume,) = find_volumes([tmp_path]).volumes
    reference = phantoms.write(tmp_path / "reference.nii.gz", voxels, (2, 1, 0.5))
    (expected,) = find_volumes([reference]).volumes
    assert volume.spacing == pytest.approx((2, 1, 0.5))
    np.testing.assert_array_equal(read_volume(volume)[0], read_volume(expected)[0])


def test_several_series_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    phantoms.write_dicom(tmp_path, phantoms.mr(0), series="1.2.3.4", prefix="a")
    phantoms.write_dicom(tmp_path, phantoms.mr(1, (12, 24, 28)), series="1.2.3.5", prefix="b")
    assert sorted(volume.shape for volume in find_volumes([tmp_path]).volumes) == [(12, 24, 28), (20, 24, 28)]


def test_dicom_slices_are_put_in_order_whatever_their_names(tmp_path: Path) -> None:
    voxels = phantoms.mr()
    phantoms.write_dicom(tmp_path / "dicom", voxels, (2, 1, 1))
    phantoms.write(tmp_path / "nifti" / "scan.nii.gz", voxels, (2, 1, 1))
    (dicom,) = find_volumes([tmp_path / "dicom"]).volumes
    (nifti,) = find_volumes([tmp_path / "nifti"]).volumes
    assert dicom.spacing == pytest.approx((2, 1, 1))
    np.testing.assert_array_equal(read_volume(dicom)[0], read_volume(nifti)[0])


def test_dicom_without_a_file_ending_is_found(tmp_path: Path) -> None:
    for file in phantoms.write_dicom(tmp_path, phantoms.mr()):
        file.rename(file.with_suffix(""))
    assert [volume.format for volume in find_volumes([tmp_path]).volumes] == ["DICOM"]


def test_a_file_of_a_series_that_is_there_twice_is_used_once(tmp_path: Path) -> None:
    first, *_ = phantoms.write_dicom(tmp_path, phantoms.mr())
    (tmp_path / "copy.dcm").write_bytes(first.read_bytes())
    (volume,) = find_volumes([tmp_path]).volumes
    assert volume.shape == phantoms.DEFAULT_SHAPE


def test_a_missing_dicom_slice_is_reported(tmp_path: Path) -> None:
    phantoms.write_dicom(tmp_path, phantoms.mr())[7].unlink()
    assert "slices missing or unevenly spaced" in only_reason(find_volumes([tmp_path]))


def test_time_points_in_one_dicom_series_are_reported(tmp_path: Path) -> None:
    voxels = phantoms.mr()
    phantoms.write_dicom(tmp_path, voxels, positions=[index // 2 for index in range(len(voxels))])
    assert only_reason(find_volumes([tmp_path])).startswith("4D")


@pytest.mark.parametrize("modality", ["CR", "SEG", "XA"])
def test_dicom_that_is_no_scan_of_a_volume_is_reported(tmp_path: Path, modality: str) -> None:
    phantoms.write_dicom(tmp_path, phantoms.mr(), modality=modality)
    assert modality in only_reason(find_volumes([tmp_path]))


def test_a_single_dicom_slice_is_no_volume(tmp_path: Path) -> None:
    phantoms.write_dicom(tmp_path, phantoms.mr()[:1])
    assert only_reason(find_volumes([tmp_path])).startswith("2D")


@pytest.mark.parametrize("flip", [False, True])
def test_a_volume_stored_in_sagittal_order_is_the_same_as_the_axial_one(tmp_path: Path, flip: bool) -> None:
    axial = sitk.GetImageFromArray(phantoms.mr())
    axial.SetSpacing((0.5, 1.0, 3.0))
    sagittal = sitk.PermuteAxes(axial, (1, 2, 0))
    if flip:
        sagittal = sitk.Flip(sagittal, (True, False, True))
    phantoms.write_image(tmp_path / "axial.nii.gz", axial)
    phantoms.write_image(tmp_path / "sagittal.nii.gz", sagittal)
    first, second = find_volumes([tmp_path]).volumes
    assert first.orientation != second.orientation
    assert (first.shape, second.shape) == (phantoms.DEFAULT_SHAPE, phantoms.DEFAULT_SHAPE)
    assert first.spacing == second.spacing == pytest.approx((3, 1, 0.5))
    np.testing.assert_array_equal(read_volume(first)[0], read_volume(second)[0])


def test_files_with_nnunets_channel_endings_are_one_volume(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        phantoms.write(tmp_path / f"{name}.nii.gz", phantoms.mr(len(name)))
    assert [volume.num_channels for volume in find_volumes([tmp_path]).volumes] == [2, 2]


def test_channels_can_be_kept_apart(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001"):
        phantoms.write(tmp_path / f"{name}.nii.gz", phantoms.mr())
    assert [volume.num_channels for volume in find_volumes([tmp_path], join_channels=False).volumes] == [1, 1]


def test_a_folder_of_single_channel_cases_gives_single_channel_volumes(tmp_path: Path) -> None:
    for name in ("hippocampus_004_0000", "hippocampus_006_0000"):
        phantoms.write(tmp_path / "imagesTr" / f"{name}.nii.gz", phantoms.mr())
    volumes = find_volumes([tmp_path]).volumes
    assert [volume.num_channels for volume in volumes] == [1, 1]
    assert [volume.case.rpartition("-")[0] for volume in volumes] == ["hippocampus_004", "hippocampus_006"]


def test_numbered_scans_are_not_taken_for_channels(tmp_path: Path) -> None:
    for number in range(3):
        phantoms.write(tmp_path / f"scan_{number:04d}.nii.gz", phantoms.mr(shape=(20, 24, 24 + number)))
    assert [volume.num_channels for volume in find_volumes([tmp_path]).volumes] == [1, 1, 1]


def test_many_numbered_scans_of_one_size_are_not_taken_for_channels(tmp_path: Path) -> None:
    for number in range(6):
        phantoms.write(tmp_path / f"scan_{number:04d}.nii.gz", phantoms.mr(number))
    assert [volume.num_channels for volume in find_volumes([tmp_path]).volumes] == [1] * 6


def test_a_case_that_lacks_a_channel_is_left_out(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c_0000"):
        phantoms.write(tmp_path / f"{name}.nii.gz", phantoms.mr())
    found = find_volumes([tmp_path])
    assert len(found.volumes) == 2
    assert [Path(one.source).name for one in found.left_out] == ["c_0000.nii.gz"]


def test_a_file_without_a_number_does_not_take_channels_apart(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "mean"):
        phantoms.write(tmp_path / f"{name}.nii.gz", phantoms.mr(len(name)))
    found = find_volumes([tmp_path])
    assert [volume.num_channels for volume in found.volumes] == [2, 2]
    (stray,) = found.left_out
    assert (
        Path(stray.source).name == "mean.nii.gz"
        and "no number of a channel, _0000, _0001 like the others'" in stray.reason
    )


@pytest.mark.parametrize("names", [("a_0000", "b_0000", "mean"), ("a", "b", "scan_0001"), ("a_0000", "a_0001", "mean")])
def test_files_that_are_no_channels_are_volumes_of_their_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        phantoms.write(tmp_path / f"{name}.nii.gz", phantoms.mr(number))
    found = find_volumes([tmp_path])
    assert [volume.num_channels for volume in found.volumes] == [1, 1, 1] and not found.left_out


def test_equal_file_names_in_different_folders_do_not_collide(tmp_path: Path) -> None:
    for folder in ("a", "b", "b/c"):
        phantoms.write(tmp_path / folder / "scan.nii.gz", phantoms.mr())
    assert len({volume.case for volume in find_volumes([tmp_path]).volumes}) == 3


def test_equal_input_folders_in_different_places_do_not_collide(tmp_path: Path) -> None:
    folders = [tmp_path / site / "images" for site in ("first", "second")]
    for folder in folders:
        phantoms.write(folder / "scan.nii.gz", phantoms.mr())
    assert len({volume.case for volume in find_volumes(folders).volumes}) == 2


def test_case_names_stay_when_files_are_added(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "m" / "scan.nii.gz", phantoms.mr())
    (before,) = find_volumes([tmp_path]).volumes
    phantoms.write(tmp_path / "a" / "scan.nii.gz", phantoms.mr())
    phantoms.write(tmp_path / "z" / "scan.nii.gz", phantoms.mr())
    assert before.case in {volume.case for volume in find_volumes([tmp_path]).volumes}


@pytest.mark.parametrize("name", ["mit Leerzeichen ü", "患者", "a.b.c", "scan_seg", "..weird -x-", "n" * 200])
def test_case_names_are_safe_file_names(tmp_path: Path, name: str) -> None:
    if not name.isascii() and sys.getfilesystemencoding() != "utf-8":
        pytest.skip("Python cannot name such a file in this locale")
    phantoms.write(tmp_path / f"x{name}" / f"x{name}.nii.gz", phantoms.mr())
    (volume,) = find_volumes([tmp_path]).volumes
    assert volume.case.replace("_", "").replace("-", "").isalnum() and volume.case.isascii()
    assert len(volume.case) < 100 and not volume.case.endswith("_seg")


def test_a_link_to_itself_leaves_the_other_files_of_its_folder(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "a.nii.gz", phantoms.mr())
    os.symlink("latest", tmp_path / "latest")
    assert len(find_volumes([tmp_path]).volumes) == 1


def test_a_loop_of_symbolic_links_ends(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "a" / "scan.nii.gz", phantoms.mr())
    os.symlink(tmp_path, tmp_path / "a" / "back")
    assert len(find_volumes([tmp_path]).volumes) == 1


def test_a_link_to_a_file_that_is_there_is_reported_not_used_twice(tmp_path: Path) -> None:
    path = phantoms.write(tmp_path / "a.nii.gz", phantoms.mr())
    os.symlink(path, tmp_path / "b.nii.gz")
    found = find_volumes([tmp_path])
    assert len(found.volumes) == 1
    assert found.left_out[0].reason.startswith("the same file as")


def test_overlapping_folders_give_each_volume_once(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "a" / "scan.nii.gz", phantoms.mr())
    assert len(find_volumes([tmp_path, tmp_path / "a"]).volumes) == 1


def test_hidden_files_and_companions_are_passed_over(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "scan.mhd", phantoms.mr())
    (tmp_path / "._scan.nii.gz").write_bytes(b"resource fork")
    (tmp_path / "scan.json").write_text("{}", encoding="utf-8")
    found = find_volumes([tmp_path])
    assert len(found.volumes) == 1
    assert not found.left_out
    assert found.passed_over == {".json": 1, ".raw": 1}


def test_folders_that_do_not_exist_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="first.*second"):
        find_volumes([tmp_path / "first", tmp_path / "second"])


@pytest.mark.real_data
def test_real_folders_give_the_volumes_they_hold(real_data_folder: Path) -> None:
    found = find_volumes([real_data_folder])
    formats = [volume.format for volume in found.volumes]
    assert formats.count("NIfTI") == len(list(real_data_folder.rglob("*.nii.gz")))
    assert formats.count("DICOM") == len(list((real_data_folder / "dicom").iterdir()))
    assert not found.left_out


def test_reading_many_headers_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        phantoms.write(tmp_path / f"{number}.nii.gz", phantoms.mr())
    find_volumes([tmp_path])
    assert "headers" not in capsys.readouterr().err
    monkeypatch.setattr("nnunetv2_misfm.pool.inspection.HEADERS_WORTH_A_PROCESS", 3)
    find_volumes([tmp_path])
    assert "Reading headers: 3 of 3 (100 %)" in capsys.readouterr().err
