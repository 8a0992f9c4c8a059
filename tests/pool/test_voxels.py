"""Judging voxels: damaged files, labels, modality, and the body in a CT."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import phantoms
import pytest

from nnunetv2_misfm.pool.inspection import find_volumes
from nnunetv2_misfm.pool.reading import read_volume
from nnunetv2_misfm.pool.volume_files import VolumeProblem
from nnunetv2_misfm.pool.volumes import Volume
from nnunetv2_misfm.pool.voxels import body_box, check_voxels, content_hash, guess_modality

SPACING = (2.0, 2.0, 2.0)


def volume_at(path: Path) -> Volume:
    (volume,) = find_volumes([path]).volumes
    return volume


def channels(volume: np.ndarray) -> np.ndarray:
    return volume[None].astype(np.float32)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"])
def test_a_file_that_is_cut_short_is_found_out(tmp_path: Path, ending: str) -> None:
    path = phantoms.write(tmp_path / f"scan{ending}", phantoms.mr())
    voxel_file = path.with_suffix(".raw") if ending == ".mhd" else path
    phantoms.cut_short(voxel_file, voxel_file)
    with pytest.raises(VolumeProblem, match="cut short|unreadable"):
        read_volume(volume_at(path))


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_a_file_with_a_damaged_part_is_found_out(tmp_path: Path, ending: str) -> None:
    path = phantoms.write(tmp_path / f"scan{ending}", phantoms.mr(shape=(40, 48, 56)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :][:50] = bytes(50)
    path.write_bytes(content[: len(content) // 2] + bytes(50) + content[len(content) // 2 + 50 :])
    with pytest.raises(VolumeProblem, match="damaged|unreadable"):
        read_volume(volume_at(path))


def test_a_plain_nifti_with_the_ending_of_a_compressed_one_is_read(tmp_path: Path) -> None:
    plain = phantoms.write(tmp_path / "scan.nii", phantoms.mr())
    voxels, _, _ = read_volume(volume_at(plain))
    misnamed = plain.rename(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_volume(volume_at(misnamed))[0], voxels)


def test_a_nifti_with_sheared_axes_is_straightened(tmp_path: Path) -> None:
    affine = np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    voxels = phantoms.mr()
    nibabel.save(nibabel.Nifti1Image(voxels.transpose(2, 1, 0), affine), tmp_path / "scan.nii.gz")
    read, spacing, mended = read_volume(volume_at(tmp_path / "scan.nii.gz"))
    assert mended == "straightened tilted axes: they were off by 16.7°"
    assert spacing == pytest.approx((2, 1, 1))
    assert read.shape[1:] == (20, 24, 28 + 7)  # the row at the far end lies 0.3 * 23 = 6.9 mm further along x
    np.testing.assert_allclose(read[0, :, 0, :28], voxels[:, 0], rtol=1e-4)
    np.testing.assert_allclose(read[0, :, 20, 6:34], voxels[:, 20], rtol=1e-4)  # 0.3 * 20 = 6 whole voxels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted(value: float) -> None:
    voxels = channels(phantoms.mr())
    voxels[0, 3, 4, 5] = value
    with pytest.raises(VolumeProblem, match="in 1 of 13440 voxels"):
        check_voxels(voxels, skip_label_maps=True)


def test_a_constant_channel_is_found(tmp_path: Path) -> None:
    voxels = np.stack([phantoms.mr(), np.full(phantoms.DEFAULT_SHAPE, 7)]).astype(np.float32)
    with pytest.raises(VolumeProblem, match="constant: every voxel in channel 1 is 7"):
        check_voxels(voxels, skip_label_maps=True)


@pytest.mark.parametrize("highest", [1, 3])
def test_label_maps_are_found(highest: int) -> None:
    with pytest.raises(VolumeProblem, match=f"label map: {highest + 1} different values"):
        check_voxels(channels(np.minimum(phantoms.labels(), highest)), skip_label_maps=True)


def test_label_maps_can_be_used_all_the_same() -> None:
    label_map = channels(phantoms.labels())
    with pytest.raises(VolumeProblem, match="label map"):
        check_voxels(label_map, skip_label_maps=True)
    check_voxels(label_map, skip_label_maps=False)


@pytest.mark.parametrize("grey_levels", [16, 64, 256])
def test_images_of_few_grey_levels_are_not_taken_for_labels(grey_levels: int) -> None:
    image = phantoms.mr().astype(float)
    coarse = np.rint(image / image.max() * (grey_levels - 1))
    assert 2 < len(np.unique(coarse)) <= grey_levels
    check_voxels(channels(coarse), skip_label_maps=True)


def test_ct_and_mr_are_told_apart_by_their_intensities() -> None:
    assert guess_modality(channels(phantoms.ct()), None)[0] == "ct"
    assert guess_modality(channels(phantoms.mr()), None)[0] == "mr"


def test_signed_mr_values_are_not_taken_for_hounsfield_units() -> None:
    phase = np.random.default_rng(0).integers(-4096, 4096, phantoms.DEFAULT_SHAPE)
    assert guess_modality(channels(phase), None)[0] == "mr"


def test_the_dicom_tag_decides_the_modality() -> None:
    assert guess_modality(channels(phantoms.ct()), "MR") == ("mr", "DICOM modality MR")
    assert guess_modality(channels(phantoms.mr()), "CT") == ("ct", "DICOM modality CT")


def in_air(body: np.ndarray, before: int, after: int) -> np.ndarray:
    return np.pad(body, (before, after), constant_values=-1000)


def test_the_body_box_cuts_air_and_keeps_the_body() -> None:
    voxels = in_air(phantoms.ct(), 30, 20)
    box = body_box(channels(voxels), SPACING, 8)
    assert box is not None
    kept = voxels[tuple(slice(first, last) for first, last in box)]
    assert np.count_nonzero(kept > -500) == np.count_nonzero(voxels > -500)
    assert kept.size < voxels.size / 3


def test_the_body_box_does_not_reach_for_a_distant_speck() -> None:
    voxels = in_air(phantoms.ct(), 30, 30)
    box = body_box(channels(voxels), SPACING, 8)
    voxels[0, 0, 0] = 2000
    assert body_box(channels(voxels), SPACING, 8) == box


def test_the_body_box_holds_both_legs() -> None:
    leg = in_air(phantoms.ct(shape=(20, 20, 20)), 10, 10)
    voxels = np.concatenate([leg, leg], axis=2)
    box = body_box(channels(voxels), SPACING, 8)
    assert box is not None
    assert np.count_nonzero(voxels[:, :, box[2][0] : box[2][1]] > -500) == np.count_nonzero(voxels > -500)


@pytest.mark.parametrize("value", [-1000, 40])
def test_nothing_is_cut_where_there_is_no_body_or_no_air(value: int) -> None:
    assert body_box(channels(np.full(phantoms.DEFAULT_SHAPE, value)), SPACING, 8) is None


def test_nothing_is_cut_where_scattered_structures_hold_much_of_the_content() -> None:
    voxels = np.full((60, 60, 60), -1000)
    voxels[25:35, 25:35, 25:35] = 40
    voxels[::6, ::6, ::6] = 40
    assert body_box(channels(voxels), SPACING, 8) is None


def test_the_content_hash_depends_on_voxels_and_shape_alone() -> None:
    voxels = channels(phantoms.mr())
    assert content_hash(voxels) == content_hash(np.asfortranarray(voxels))
    assert content_hash(voxels) != content_hash(voxels.reshape(1, 24, 20, 28))
    assert content_hash(voxels) != content_hash(voxels + 1)


@pytest.mark.real_data
def test_real_label_maps_are_told_from_real_images(real_data_folder: Path) -> None:
    seen = set()
    for volume in find_volumes([real_data_folder]).volumes:
        is_label_map = "labelsTr" in volume.source or ".organs." in volume.source
        seen.add(is_label_map)
        voxels, _, _ = read_volume(volume)
        try:
            check_voxels(voxels, skip_label_maps=True)
        except VolumeProblem as problem:
            assert is_label_map, f"{volume.source}: {problem}"
        else:
            assert not is_label_map, volume.source
    assert seen == {True, False}


@pytest.mark.real_data
def test_the_modality_of_real_volumes_is_found(real_data_folder: Path) -> None:
    seen = set()
    for path in sorted((real_data_folder / "volumes").glob("*_*.nii.gz")):
        if ".organs." not in path.name:
            voxels, _, _ = read_volume(volume_at(path))
            seen.add(guess_modality(voxels, None)[0])
            assert f"_{guess_modality(voxels, None)[0]}_" in path.name
    assert seen == {"ct", "mr"}
