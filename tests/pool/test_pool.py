"""Pools: what nnU-Net sees, equality with nnU-Net's own preprocessing, bad files, resuming, parts, settings."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dicom_files
import numpy as np
import phantoms
import pytest
import SimpleITK as sitk
from faults.bad_files import VOLUMES, make_volumes
from filelock import FileLock
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.files import LockedError
from nnunetv2_misfm.plans.settings import SettingsError, read_settings
from nnunetv2_misfm.pool import cost, prepare, stored_image
from nnunetv2_misfm.pool.case import remove_temporary_files
from nnunetv2_misfm.pool.folder import PoolFolder
from nnunetv2_misfm.pool.inspection import PoolError, find_volumes
from nnunetv2_misfm.pool.merge import PoolReport
from nnunetv2_misfm.pool.plan import adopt_plans, check_pool_names, existing_plans, find_geometry, plan_pool
from nnunetv2_misfm.pool.prepare import check_usable, prepare_pool
from nnunetv2_misfm.pool.settings import PoolSettings, pool_block
from nnunetv2_misfm.pool.share import Share

DATASET, PLANS, CONFIGURATION = "Dataset100_Pool", "MisFMPlans", "3d_fullres"
ARCHITECTURE = {
    "network_class_name": "torch.nn.Identity",
    "arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2]]},
    "_kw_requires_import": [],
}


@pytest.fixture(autouse=True)
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def make_pool(
    folders: Sequence[Path],
    dataset: str = DATASET,
    parts: tuple[int, int] = (1, 0),
    processes: int = 1,
    **settings: Any,
) -> PoolReport:
    wanted = read_settings(PoolSettings, settings, "The pool's settings")
    inspection = find_volumes(folders, wanted.join_channels)
    names = (dataset, PLANS, CONFIGURATION)
    check_pool_names(*names)
    folder = PoolFolder(*names, Share(*parts))
    check_usable(folder, inspection)
    geometry = find_geometry(inspection, wanted, CONFIGURATION, existing_plans(dataset, PLANS) or {})
    plans = plan_pool(inspection, wanted, geometry, *names, (16, 16, 16), 2, ARCHITECTURE, {"seed": 1})
    return prepare_pool(folder, inspection, plans, processes)


def data_folder(report: Any, configuration: str = CONFIGURATION) -> Path:
    return report.folder / f"{PLANS}_{configuration}"


def arrays(report: Any, configuration: str = CONFIGURATION) -> dict[str, np.ndarray]:
    """Stored images by case name without its hash, loaded by nnU-Net."""
    folder = str(data_folder(report, configuration))
    dataset = infer_dataset_class(folder)(folder)
    return {case.rpartition("-")[0]: dataset.load_case(case)[0][:] for case in dataset.identifiers}


def rows(report: PoolReport) -> dict[str, dict[str, str]]:
    """Rows of the report by file name."""
    return {Path(row["source"]).name: row for row in every_row(report)}


def every_row(report: PoolReport) -> list[dict[str, str]]:
    with open(report.folder / "report.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(report: PoolReport) -> dict[str, Any]:
    """Everything a finished pool says and holds, apart from the dates and names that differ between equal pools."""
    files = {
        name: json.loads((report.folder / name).read_text(encoding="utf-8"))
        for name in ("dataset_fingerprint.json", f"{PLANS}.json")
    }
    files[f"{PLANS}.json"]["dataset_name"] = ""
    held = sorted(path.name for path in data_folder(report).iterdir())
    return {
        **files,
        "files": held,
        "report": rows(report),
        "arrays": {k: v.tolist() for k, v in arrays(report).items()},
    }


def preprocessed_by_nnunet(plans: dict[str, Any], path: Path) -> np.ndarray:
    manager = PlansManager(plans)
    preprocessor = DefaultPreprocessor(verbose=False)
    return preprocessor.run_case([str(path)], None, manager, manager.get_configuration(CONFIGURATION), {})[0]


def test_nnunet_sees_an_ordinary_dataset(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    phantoms.write(images / "b.nrrd", phantoms.mr(1))
    report = make_pool([images])
    plans = PlansManager(str(report.folder / f"{PLANS}.json"))
    dataset_json = json.loads((report.folder / "dataset.json").read_text(encoding="utf-8"))
    assert plans.get_configuration(CONFIGURATION).data_identifier == data_folder(report).name
    assert plans.get_label_manager(dataset_json).foreground_labels == []
    assert dataset_json["numTraining"] == 2
    fingerprint = json.loads((report.folder / "dataset_fingerprint.json").read_text(encoding="utf-8"))
    assert len(fingerprint["spacings"]) == len(fingerprint["shapes_after_crop"]) == 2
    dataset = infer_dataset_class(str(data_folder(report)))(str(data_folder(report)))
    for case in dataset.identifiers:
        data, seg, _, properties = dataset.load_case(case)
        assert data.shape == seg.shape == (1, *phantoms.DEFAULT_SHAPE)
        assert data.dtype == np.float32
        assert properties["misfm"]["orientation"] == "LPS"


def test_ct_is_clipped_to_the_window_and_scaled_to_one(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.ct())
    (array,) = arrays(make_pool([images], modality="ct", ct_window=(-200, 200), body_crop=False)).values()
    expected = np.clip(phantoms.ct()[:, ::-1, ::-1], -200, 200) / 200
    np.testing.assert_allclose(array[0], expected, atol=1e-6)


def test_mr_is_standardised(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.ct())
    (array,) = arrays(make_pool([images], modality="mr")).values()
    assert abs(array.mean()) < 1e-4 and abs(array.std() - 1) < 1e-4


@pytest.mark.parametrize(("modality", "make"), [("ct", phantoms.ct), ("mr", phantoms.mr), ("auto", phantoms.ct)])
@pytest.mark.parametrize("spacing", ["none", (1.0, 1.0, 1.5)])
def test_nnunet_makes_the_same_arrays_from_the_plans(images: Path, modality: str, make: Any, spacing: Any) -> None:
    path = phantoms.write(images / "a.nii.gz", make(), (3, 1, 0.5))
    report = make_pool([images], modality=modality, spacing=spacing, body_crop=False)
    plans = json.loads((report.folder / f"{PLANS}.json").read_text(encoding="utf-8"))
    (array,) = arrays(report).values()
    np.testing.assert_array_equal(array, preprocessed_by_nnunet(plans, path))


def test_in_a_mixed_pool_every_volume_is_normalised_as_what_it_is(images: Path, tmp_path: Path) -> None:
    for number in range(2):
        phantoms.write(images / f"ct{number}.nii.gz", phantoms.ct(number))
    phantoms.write(images / "mr.nii.gz", phantoms.mr())
    report = make_pool([images], body_crop=False)
    pure = arrays(make_pool([images / "mr.nii.gz"], "Dataset101_MR", modality="mr"))
    mixed = arrays(report)
    np.testing.assert_array_equal(mixed["mr"], pure["mr"])
    assert mixed["ct0"].min() == -1
    assert report.plans["misfm"]["pool"]["modalities"] == {"ct": 2, "mr": 1}
    assert report.plans["configurations"][CONFIGURATION]["normalization_schemes"] == ["CTNormalization"]
    assert "lowest value" in rows(report)["mr.nii.gz"]["modality_from"]


def test_the_spacing_is_the_median_with_the_largest_axis_first(images: Path) -> None:
    for number, spacing in enumerate([(1, 1, 3), (1, 1, 5), (1, 2, 5)]):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number, (18, 20, 22)), spacing)
    report = make_pool([images])
    assert report.plans["configurations"][CONFIGURATION]["spacing"] == pytest.approx([5, 1, 1])
    assert report.plans["transpose_forward"] == [2, 0, 1]
    assert report.plans["transpose_backward"] == [1, 2, 0]
    # (z, y, x) = 18 x 20 x 22 voxels of (1, 2, 5) mm, as (x, z, y) at (5, 1, 1) mm.
    assert arrays(report)["2"].shape == (1, 22, 18, 40)


def test_a_given_spacing_is_in_the_order_z_y_x(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(shape=(18, 20, 22)))
    assert arrays(make_pool([images], spacing=(2, 1, 0.5)))["a"].shape == (1, 9, 20, 44)


def test_without_resampling_every_volume_keeps_its_voxels(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0, (18, 20, 22)), (1, 1, 1))
    phantoms.write(images / "b.nii.gz", phantoms.mr(1, (20, 22, 24)), (2, 2, 2))
    held = arrays(make_pool([images], spacing="none"))
    assert (held["a"].shape, held["b"].shape) == ((1, 18, 20, 22), (1, 20, 22, 24))


def test_tiny_differences_of_spacing_do_not_turn_the_axes(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(), (1, 1.0000001, 1))
    assert make_pool([images]).plans["transpose_forward"] == [0, 1, 2]


def test_a_sagittal_volume_gives_the_array_of_the_axial_one(images: Path) -> None:
    axial = sitk.GetImageFromArray(phantoms.mr())
    axial.SetSpacing((0.5, 1.0, 3.0))
    phantoms.write_image(images / "axial" / "scan.nii.gz", axial)
    phantoms.write_image(images / "sagittal" / "scan.nii.gz", sitk.PermuteAxes(axial, (1, 2, 0)))
    (one,) = arrays(make_pool([images / "axial"])).values()
    (other,) = arrays(make_pool([images / "sagittal"], "Dataset101_Other")).values()
    np.testing.assert_array_equal(one, other)


def test_the_body_crop_is_recorded_and_can_be_switched_off(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", np.pad(phantoms.ct(), 25, constant_values=-1000))
    cropped = make_pool([images])
    assert np.prod(arrays(cropped)["a"].shape) < 70 * 74 * 78 / 2
    assert rows(cropped)["a.nii.gz"]["body_box"].count(":") == 3
    whole = make_pool([images], "Dataset101_Whole", body_crop=False)
    assert arrays(whole)["a"].shape == (1, 70, 74, 78)
    assert rows(whole)["a.nii.gz"]["body_box"] == ""


def test_channels_go_into_one_case(images: Path) -> None:
    for name in ("a", "b"):
        phantoms.write(images / f"{name}_0000.nii.gz", phantoms.mr(1))
        phantoms.write(images / f"{name}_0001.nii.gz", phantoms.mr(2) + len(name) + (name == "b"))
    report = make_pool([images])
    assert {array.shape for array in arrays(report).values()} == {(2, *phantoms.DEFAULT_SHAPE)}
    assert len(report.plans["configurations"][CONFIGURATION]["normalization_schemes"]) == 2


def test_volumes_with_other_channels_than_most_are_left_out(images: Path) -> None:
    for number in range(3):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number))
    for number in range(2):
        phantoms.write(images / "two" / f"a_{number:04d}.nii.gz", phantoms.mr(9 + number))
    report = make_pool([images])
    assert report.tally.statuses == {"prepared": 3, "left out": 1}
    assert "2 channels, but the pool's volumes have 1" in report.tally.reasons


def test_bad_files_are_left_out_with_their_reason_and_stop_nothing(images: Path) -> None:
    for number in range(3):
        phantoms.write(images / f"good{number}.nii.gz", phantoms.mr(number))
    make_volumes(images)
    phantoms.write(images / "thin.nrrd", phantoms.mr(3), (0.01, 1, 1))
    phantoms.write(images / "large.nrrd", phantoms.mr(4), (99, 99, 99))
    phantoms.write(images / "same.nrrd", phantoms.mr(0))
    report = make_pool([images])
    # One is a header whose file of voxels is cut short, which may be mended without a change of the header.
    assert report.tally.statuses == {"prepared": 3, "failed": 1, "left out": len(VOLUMES) + 2}
    assert set(arrays(report)) == {"good0", "good1", "good2"}
    with open(report.folder / "report.csv", newline="", encoding="utf-8") as file:
        left_out = [row for row in csv.DictReader(file) if row["status"] != "prepared"]
    # By the folder that bad_files.py made for a kind, and by name for those made here.
    reasons = {key: row["reason"] for row in left_out for key in Path(row["source"]).parts[-2:]}
    for kind, reason in {
        "empty file": "empty file",
        "text as MHA": "unreadable",
        "unknown format": "unsupported format",
        "cut short": "cut short",
        "cut short uncompressed": "cut short",
        "without its voxel file": "unread",
        "2D": "2D (10x9)",
        "NaN": "NaN or infinity",
        "infinite": "NaN or infinity",
        "constant": "constant: every voxel is 5",
        "labels": "looks like a label map",
        "too small": "too small: 5x24x28",
        "spacing of metres": "not plausible",
        "no directions": "its axes do not span space",
        "thin.nrrd": "too small: 0x24x28",
        "large.nrrd": "too large",
        "same.nrrd": "duplicate: the same voxels as",
    }.items():
        assert reason in reasons[kind]
    assert all(row["reason"] for row in left_out)


def test_a_ct_outside_the_window_is_left_out(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.ct())
    phantoms.write(images / "b.nii.gz", phantoms.mr() + 2000)
    assert (
        "constant after normalisation: its values are from 2001"
        in rows(make_pool([images], modality="ct"))["b.nii.gz"]["reason"]
    )


def test_what_was_found_is_told_before_the_work_starts(images: Path) -> None:
    for number in range(3):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number, (20, 24, 28 + number)), (2, 1, 1))
    (images / "x.nii.gz").write_bytes(b"")
    summary = find_volumes([images]).summary()
    assert "Found 3 volumes" in summary
    assert "median 20 x 24 x 29, from 20 x 24 x 28 to 20 x 24 x 30" in summary
    assert "median 2 x 1 x 1" in summary
    assert "x.nii.gz: empty file" in summary


def test_one_volume_is_enough(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    assert make_pool([images]).num_prepared == 1


def test_no_volume_at_all_is_an_error_with_the_reasons(images: Path) -> None:
    (images / "x.nii.gz").write_bytes(b"")
    with pytest.raises(PoolError, match=r"no usable volume[\s\S]*empty file") as error:
        make_pool([images])
    report = images.parent / "nnUNet_preprocessed" / DATASET / "report.csv"
    assert str(report) in str(error.value)
    assert "empty file (0 bytes)" in report.read_text(encoding="utf-8")
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    assert make_pool([images]).num_prepared == 1  # the report is in nobody's way


def test_no_volume_left_after_reading_is_an_error_with_the_reasons(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.labels())
    with pytest.raises(PoolError, match="1 x looks like a label map"):
        make_pool([images])


def test_running_again_does_nothing_twice_and_adds_what_is_new(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0), (2, 1, 1))
    first = make_pool([images])
    before = {path: path.stat().st_mtime_ns for path in data_folder(first).iterdir()}
    for number in (1, 2):
        phantoms.write(images / f"b{number}.nii.gz", phantoms.mr(number), (4, 1, 1))
    report = make_pool([images])
    assert report.num_prepared == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The median is now 4 mm, but the pool keeps the spacing its first volume was resampled to.
    assert report.plans["configurations"][CONFIGURATION]["spacing"] == [2, 1, 1]
    assert arrays(report)["b1"].shape == (1, 40, 24, 28)


def test_a_file_that_changed_is_prepared_again(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    make_pool([images], spacing="none")
    phantoms.write(images / "a.nii.gz", phantoms.mr(0, (30, 24, 28)))
    assert arrays(make_pool([images], spacing="none"))["a"].shape == (1, 30, 24, 28)


def test_a_file_with_a_new_date_only_keeps_its_case(images: Path) -> None:
    path = phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    first = make_pool([images])
    before = {file: file.stat().st_mtime_ns for file in data_folder(first).iterdir()}
    os.utime(path, ns=(1, 1))
    assert make_pool([images]).num_prepared == 1
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_corrected_spacing_with_the_same_voxels_is_used(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0), (2, 1, 1))
    make_pool([images], spacing=[2, 1, 1])
    phantoms.write(images / "a.nii.gz", phantoms.mr(0), (4, 1, 1))
    report = make_pool([images], spacing=[2, 1, 1])
    assert arrays(report)["a"].shape == (1, 40, 24, 28)
    assert rows(report)["a.nii.gz"]["original_spacing"] == "4 1 1"


def same_names(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one name, each with a scan of its own."""
    folders = tmp_path / "site 1; A" / "imagesTr", tmp_path / "site 1; B" / "imagesTr"
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        phantoms.write(folder / "scan.nii", phantoms.mr(number))
        os.utime(folder / "scan.nii", ns=(1, 1))  # as files from an archive have one date
    return folders


def sources(report: PoolReport, status: str = "prepared") -> list[str]:
    return sorted(row["source"] for row in every_row(report) if row["status"] == status)


@pytest.mark.parametrize("relative", [False, True])
def test_a_later_folder_of_the_same_name_takes_no_case_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    first, second = same_names(tmp_path)

    def pool_of(*folders: Path) -> PoolReport:
        monkeypatch.chdir(folders[0].parent)
        return make_pool([Path("imagesTr")] if relative else folders)

    pool_of(first)
    before = {path: path.read_bytes() for path in data_folder(pool_of(first)).iterdir()}
    for folder in (second, first, second):
        report = pool_of(folder)
        assert sources(report) == [f"{first}/scan.nii", f"{second}/scan.nii"] and len(every_row(report)) == 2
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(first)
    assert pool_of(second).num_prepared == 2  # what is gone since stays in the pool


def test_folders_of_the_same_name_are_told_apart_in_whatever_order(tmp_path: Path) -> None:
    first, second = same_names(tmp_path)
    make_pool([second])
    report = make_pool([first, second])
    assert sources(report) == [f"{first}/scan.nii", f"{second}/scan.nii"]
    assert make_pool([second, first]).num_prepared == 2


def test_what_cannot_be_used_takes_no_case_of_another_folder_away(tmp_path: Path) -> None:
    first, second = same_names(tmp_path)
    before = contents(make_pool([first]))["arrays"]
    phantoms.write(second / "scan.nii", phantoms.mr(1, (4, 4, 4)))
    report = make_pool([second])
    assert sources(report) == [f"{first}/scan.nii"] and sources(report, "left out") == [f"{second}/scan.nii"]
    assert contents(make_pool([first]))["arrays"] == before
    phantoms.write(second / "scan.nii", phantoms.mr(1))
    assert make_pool([second]).num_prepared == 2


def test_a_copy_that_comes_first_does_not_keep_a_pool_from_being_complete(tmp_path: Path, images: Path) -> None:
    """Both are there: nothing was moved, and each has its record."""
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    make_pool([images])
    copy = tmp_path / "copy" / "images"
    shutil.copytree(images, copy, copy_function=shutil.copyfile)
    report = make_pool([copy, images])
    assert report.complete and report.num_prepared == 1 and len(every_row(report)) == 2


def test_arrays_that_nobody_knows_of_are_removed(images: Path) -> None:
    """A preparation was killed before it wrote down what it had made, and the file was taken away since."""
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    folder = data_folder(make_pool([images]))
    before = sorted(path.name for path in folder.iterdir())
    for path in list(folder.iterdir()):
        shutil.copy(path, path.with_name(f"ghost-{path.name}"))
    make_pool([images])
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_pool_that_waits_for_no_part_names_none(images: Path) -> None:
    """All parts are done, and volumes have changed since."""
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    report = dataclasses.replace(make_pool([images]), complete=False)
    assert report.summary().endswith("Not complete yet: volumes are still to be prepared. Run this again")
    waiting = dataclasses.replace(report, waits_for=dict.fromkeys(range(12), False))
    assert waiting.summary().endswith("(-part_id 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more)")


def test_the_parts_of_a_job_array_share_the_disk(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(16):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number))
    tight = SimpleNamespace(free=0)
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda _: tight)
    needed = "volumes and those of the 1 other parts that are not done need about .* kB"
    with pytest.raises(PoolError, match=needed) as told:
        make_pool([images], parts=(2, 0))
    tight.free = 0.75e3 * float(str(told.value).partition("about ")[2].partition(" kB")[0])  # enough for this part
    with pytest.raises(PoolError, match="those of the 1 other parts"):
        make_pool([images], parts=(2, 0))


def test_images_that_were_moved_keep_their_cases(tmp_path: Path, images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    phantoms.write(images / "b.nii.gz", phantoms.mr(1))
    report = make_pool([images])
    before = {path: path.stat().st_mtime_ns for path in data_folder(report).iterdir()}
    for name in ("link", "copied", "moved"):
        (tmp_path / name).mkdir()
    link, copied, moved = (tmp_path / name / "images" for name in ("link", "copied", "moved"))
    link.symlink_to(images)
    shutil.copytree(images, copied, copy_function=shutil.copyfile)  # with dates of their own

    def check(folder: Path) -> None:
        report = make_pool([folder])
        assert sources(report) == [f"{folder}/{name}.nii.gz" for name in "ab"] and len(every_row(report)) == 2
        assert {path: path.stat().st_mtime_ns for path in data_folder(report).iterdir()} == before

    check(link)
    check(copied)
    images.rename(moved)
    check(moved)


def test_a_bad_file_that_was_repaired_is_used(images: Path) -> None:
    path = phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    phantoms.write(images / "b.nii.gz", phantoms.mr(1))
    phantoms.cut_short(path, path)
    assert make_pool([images]).num_prepared == 1
    phantoms.write(path, phantoms.mr(0))
    assert make_pool([images]).num_prepared == 2


def test_a_duplicate_that_comes_later_takes_no_case_away(images: Path) -> None:
    phantoms.write(images / "m.nii.gz", phantoms.mr())
    assert set(arrays(make_pool([images]))) == {"m"}
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    report = make_pool([images])
    assert set(arrays(report)) == {"m"}
    assert "duplicate" in rows(report)["a.nii.gz"]["reason"]


@pytest.mark.parametrize(
    ("names", "added"),
    [
        (("scan_0001", "scan_0002", "scan_0003"), ("other",)),
        (("scan_0001",), ("scan_0002",)),
        (("p1_0000", "p2_0000", "p3_0000"), ("p4_0000", "p4_0001")),
        (("p1_0000", "p2_0000", "p3_0000"), ("other",)),
        (("a", "b"), ("c_0000", "c_0001")),
    ],
)
def test_new_names_beside_those_of_a_pool_take_nothing_away(
    images: Path, names: tuple[str, ...], added: tuple[str, ...]
) -> None:
    for number, name in enumerate(names):
        phantoms.write(images / f"{name}.nii.gz", phantoms.mr(number))
    before = contents(make_pool([images]))
    for number, name in enumerate(added):
        phantoms.write(images / f"{name}.nii.gz", phantoms.mr(10 + number))
    for _ in range(2):
        report = make_pool([images])
        assert before["arrays"].items() <= contents(report)["arrays"].items()
        assert report.num_prepared == len(list(data_folder(report).glob("*.pkl")))
        assert not any("duplicate" in row["reason"] for row in rows(report).values())


def test_what_the_system_could_not_read_is_tried_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        phantoms.write(images / f"{name}.nii.gz", phantoms.mr(len(name) + ord(name)))
    read = stored_image._bytes_of_file

    def fails(path: str, *more: int) -> bytes:
        if path.endswith("b.nii.gz"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(path, *more)

    with monkeypatch.context() as patched:
        patched.setattr(stored_image, "_bytes_of_file", fails)
        report = make_pool([images])
    assert report.tally.statuses == {"prepared": 1, "failed": 1}
    assert "Input/output error" in rows(report)["b.nii.gz"]["reason"]
    assert make_pool([images]).tally.statuses == {"prepared": 2}


def test_voxels_that_are_mended_beside_their_header_are_read_again(images: Path) -> None:
    phantoms.write(images / "a.mhd", phantoms.mr(0))
    phantoms.write(images / "b.nii.gz", phantoms.mr(1))
    voxels = images / "a.raw"
    whole = voxels.read_bytes()
    for damaged in (whole[:1000], None):
        voxels.unlink() if damaged is None else voxels.write_bytes(damaged)
        assert make_pool([images]).tally.statuses == {"prepared": 1, "failed": 1}
    voxels.write_bytes(whole)
    assert make_pool([images]).tally.statuses == {"prepared": 2}


def test_files_that_are_gone_before_they_are_published_are_no_case(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number))
    really = prepare.check_disk

    def interfere(folder: Path, measured: Any, tasks: Any, *counts: int) -> str:
        remove_temporary_files(tasks[0].temporary, measured[0].record.case)
        return really(folder, measured, tasks, *counts)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "check_disk", interfere)
        report = make_pool([images])
    assert report.num_prepared == len(arrays(report)) == 1
    assert make_pool([images]).num_prepared == 2


def test_other_modalities_are_left_out_of_a_pool_of_ct(images: Path) -> None:
    dicom_files.series(images / "ct", phantoms.ct()[:12], Modality="CT")
    dicom_files.series(images / "pet", phantoms.ct()[:12] + 7, Modality="PT")
    report = make_pool([images], modality="ct")
    (left_out,) = [row for row in every_row(report) if row["status"] == "left out"]
    assert "DICOM modality PT in a pool of CT (-modality auto" in left_out["reason"]
    assert report.num_prepared == 1


def test_volumes_that_headers_rule_out_do_not_count_in_the_spacing(images: Path) -> None:
    """Scans of PET-CT: the coarse PET volumes are as many, and no part of a pool of CT."""
    for number in range(2):
        dicom_files.series(images / f"{number}" / "ct", phantoms.ct(number)[:12], Modality="CT")
        dicom_files.series(images / f"{number}" / "pet", phantoms.mr()[:12], Modality="PT", PixelSpacing=[4, 4])
    plans = make_pool([images], modality="ct").plans
    assert plans["configurations"][CONFIGURATION]["spacing"] == [2.5, 0.8, 0.8]
    assert plans["original_median_spacing_after_transp"] == [2.5, 0.8, 0.8]


def test_labels_beside_images_of_several_channels_do_not_decide(images: Path) -> None:
    for name in ("a", "b"):
        for channel in range(2):
            phantoms.write(images / "imagesTr" / f"{name}_{channel:04d}.nii.gz", phantoms.mr(channel) + ord(name))
        phantoms.write(images / "labelsTr" / f"{name}.nii.gz", phantoms.labels())
    report = make_pool([images / "imagesTr", images / "labelsTr"])
    assert report.num_prepared == 2 and pool_block(report.plans)["num_channels"] == 2


@pytest.mark.parametrize("spacing", ["1.5", (1, 1), (1.5,), (1, 1, "x")])
def test_what_a_spacing_can_be_is_said(spacing: Any) -> None:
    with pytest.raises(SettingsError, match="must be median, none, or three numbers in mm"):
        read_settings(PoolSettings, {"spacing": spacing}, "The pool's settings")


def test_a_channel_that_is_empty_within_the_body_is_named(images: Path) -> None:
    second = np.zeros_like(phantoms.ct())
    second[0, 0, 0] = 5
    phantoms.write(images / "a_0000.nii.gz", phantoms.ct())
    phantoms.write(images / "a_0001.nii.gz", second)
    with pytest.raises(PoolError, match="none of the volumes can be used"):
        make_pool([images], modality="ct", skip_label_maps=False)
    with open(next(images.parent.rglob("report.csv")), encoding="utf-8") as file:
        assert "after normalisation" in file.read()


def test_a_duplicate_is_prepared_once_its_original_has_other_voxels(images: Path) -> None:
    for name in ("a", "b"):
        phantoms.write(images / f"{name}.nii.gz", phantoms.mr(0))
    assert set(arrays(make_pool([images]))) == {"a"}
    phantoms.write(images / "a.nii.gz", phantoms.mr(1))
    report = make_pool([images])
    assert report.tally.statuses == {"prepared": 1, "failed": 1}
    assert "the same command prepares this one" in rows(report)["b.nii.gz"]["reason"]
    report = make_pool([images])
    assert set(arrays(report)) == {"a", "b"} and report.tally.statuses == {"prepared": 2}


def test_a_record_of_a_case_that_is_not_there_does_not_count(images: Path, tmp_path: Path) -> None:
    for number in range(2):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number))
    report = make_pool([images])
    removed = next(path for path in sorted(data_folder(report).glob("*.b2nd")) if not path.stem.endswith("_seg"))
    removed.unlink()
    other = tmp_path / "other"
    phantoms.write(other / "c.nii.gz", phantoms.mr(2))
    report = make_pool([other])
    assert report.num_prepared == 2 == len(contents(report)["dataset_fingerprint.json"]["cases"])


def test_a_case_without_its_last_file_is_prepared_again(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    report = make_pool([images])
    before = contents(report)
    (case,) = (path for path in data_folder(report).glob("*.b2nd") if not path.name.endswith("_seg.b2nd"))
    case.unlink()
    assert contents(make_pool([images])) == before


def test_other_settings_on_an_existing_pool_are_an_error_that_names_them(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    make_pool([images], spacing="none")
    with pytest.raises(PoolError) as error:
        make_pool([images], spacing=(1, 1, 1), min_size=4)
    assert "spacing: none there, [1.0, 1.0, 1.0] now" in str(error.value)
    assert "min_size: 8 there, 4 now" in str(error.value)
    assert "another dataset ID" in str(error.value)


def test_a_dataset_holds_one_pool(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dataset.json, fingerprint and report are those of one."""
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    before = contents(make_pool([images]))
    with monkeypatch.context() as others, pytest.raises(PoolError, match=f"holds the pool {PLANS}_{CONFIGURATION}"):
        others.setattr(sys.modules[__name__], "PLANS", "OtherPlans")
        make_pool([images])
    assert contents(make_pool([images])) == before


def test_what_is_known_of_volumes_is_kept_when_nothing_is_written(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that were copied, with other dates: their voxels are looked at once, also by a run that is stopped."""
    for number in range(4):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number))
    make_pool([images])
    for path in images.iterdir():
        os.utime(path, (1, 1))
    prepared = prepare.prepare_case

    def stopped_at_the_last(task: Any) -> Any:
        if task.volume.source.endswith("3.nii.gz"):
            raise KeyboardInterrupt
        return prepared(task)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(prepare, "prepare_case", stopped_at_the_last)
        stopped.setattr(prepare, "typical_first", lambda tasks: sorted(tasks, key=lambda task: task.volume.source))
        make_pool([images])
    capsys.readouterr()
    make_pool([images])
    said = capsys.readouterr().out
    assert "Preparing 1 volume with" in said and "Measured on" not in said


def test_a_volume_is_itself_whatever_folders_are_given_beside_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / "first" / "scans", tmp_path / "second" / "scans"]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        phantoms.write(folder / "x.nii.gz", phantoms.mr(number))
    alone = make_pool([folders[1]])
    before = set(data_folder(alone).iterdir())
    both = make_pool(folders)
    assert both.num_prepared == 2 and both.tally.statuses.total() == 2
    assert {row["status"] for row in every_row(both)} == {"prepared"}
    assert before < set(data_folder(both).iterdir())


def test_voxels_beside_a_header_are_seen_to_change(images: Path) -> None:
    for number in range(2):  # the header stays as it is
        phantoms.write(images / "a.mhd", phantoms.mr(number))
        os.utime(images / "a.mhd", (1, 1))
        report = make_pool([images])
    assert contents(report) == contents(make_pool([images], "Dataset101_Anew"))


def test_removing_plans_and_data_starts_anew(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    phantoms.write(images / "small.nii.gz", phantoms.mr(shape=(6, 20, 20)))
    report = make_pool([images], spacing="none")
    (report.folder / f"{PLANS}.json").unlink()
    shutil.rmtree(data_folder(report))
    assert set(arrays(make_pool([images], spacing="none", min_size=4))) == {"a", "small"}


def test_another_patch_or_network_is_no_other_pool(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    make_pool([images])
    settings = PoolSettings()
    inspection = find_volumes([images])
    names = (DATASET, PLANS, CONFIGURATION)
    geometry = find_geometry(inspection, settings, CONFIGURATION, existing_plans(DATASET, PLANS) or {})
    plans = plan_pool(inspection, settings, geometry, *names, (8, 8, 8), 7, ARCHITECTURE, {"seed": 2})
    prepare_pool(PoolFolder(*names), inspection, plans, 1)
    written = json.loads(
        (Path(os.environ["nnUNet_preprocessed"]) / DATASET / f"{PLANS}.json").read_text(encoding="utf-8")
    )
    assert written["configurations"][CONFIGURATION]["batch_size"] == 7
    assert written["misfm"]["seed"] == 2


def test_parts_together_equal_one_run(images: Path) -> None:
    for number in range(5):
        phantoms.write(images / f"v{number}.nii.gz", phantoms.mr(number) if number % 2 else phantoms.ct(number))
    phantoms.write(images / "copy.nii.gz", phantoms.ct(4))
    phantoms.write(images / "labels.nii.gz", phantoms.labels())
    whole = make_pool([images])
    assert not make_pool([images], "Dataset101_Parts", (3, 2)).complete
    assert not make_pool([images], "Dataset101_Parts", (3, 0)).complete
    parts = make_pool([images], "Dataset101_Parts", (3, 1))
    assert parts.complete
    assert contents(parts) == contents(whole)


PREPARE_IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path[:] = {paths!r}
from test_pool import make_pool
make_pool([Path({images!r})], spacing=(1, 1, 1))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_preparation_that_was_killed_is_continued_to_the_same_pool(images: Path, nnunet_folders: Path) -> None:
    for number in range(10):
        phantoms.write(images / f"{number}.nii.gz", phantoms.ct(number, (50, 60, 60)), (2, 1, 1))
    whole = make_pool([images], "Dataset101_Whole", spacing=(1, 1, 1))
    code = PREPARE_IN_A_PROCESS.format(paths=sys.path, images=str(images))
    process = subprocess.Popen([sys.executable, "-c", code])
    folder = nnunet_folders / "nnUNet_preprocessed" / DATASET / f"{PLANS}_{CONFIGURATION}"
    while process.poll() is None and len(list(folder.glob("*.b2nd"))) < 8:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What nnU-Net would find in the folder now is part of the whole: each case it lists is complete.
    interrupted = arrays(SimpleNamespace(folder=folder.parent))
    assert 3 < len(interrupted) < 10
    for case, array in arrays(whole).items():
        if case in interrupted:
            np.testing.assert_array_equal(interrupted[case], array)
    assert contents(make_pool([images], spacing=(1, 1, 1))) == contents(whole)


@pytest.mark.slow
def test_worker_processes_make_the_same_pool(images: Path) -> None:
    for number in range(4):
        phantoms.write(images / f"{number}.nii.gz", phantoms.ct(number))
    one = make_pool([images])
    assert contents(make_pool([images], "Dataset101_Two", processes=2)) == contents(one)


def test_a_volume_that_does_not_fit_the_disk_is_an_error_with_the_numbers(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        phantoms.write(images / f"{number}.nii.gz", phantoms.mr(number))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000))
    with pytest.raises(PoolError, match=r"remaining 3 volumes need about \d.* kB in .*, but only 2 kB"):
        make_pool([images])
    assert not list((Path(os.environ["nnUNet_preprocessed"]) / DATASET).rglob("*.b2nd"))


def test_an_id_that_belongs_to_another_dataset_is_refused(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    (Path(os.environ["nnUNet_raw"]) / "Dataset100_Heart").mkdir()
    with pytest.raises(PoolError, match="dataset ID 100 belongs to Dataset100_Heart"):
        make_pool([images])


@pytest.mark.parametrize("name", ["dataset.json", f"{PLANS}.json"])
def test_a_file_that_was_removed_because_it_was_damaged_is_written_anew(images: Path, name: str) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    folder = make_pool([images]).folder
    whole = json.loads((folder / name).read_text(encoding="utf-8"))
    case = next(folder.rglob("*.b2nd"))
    prepared = case.stat().st_mtime_ns
    (folder / name).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="Remove it and give the options that made the pool again"):
        make_pool([images])
    (folder / name).unlink()
    make_pool([images])
    assert json.loads((folder / name).read_text(encoding="utf-8")) == whole
    assert case.stat().st_mtime_ns == prepared


@pytest.mark.parametrize("where", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_a_labelled_dataset_is_never_written_into(images: Path, where: str) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    folder = Path(os.environ[where]) / DATASET
    folder.mkdir()
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "heart": 1}}', encoding="utf-8")
    with pytest.raises(PoolError, match=DATASET):
        make_pool([images])
    assert "heart" in (folder / "dataset.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("plans", [PLANS, "OtherPlans"])
def test_what_a_run_made_before_its_first_file_is_in_nobodys_way(
    images: Path, nnunet_folders: Path, plans: str
) -> None:
    """It was killed, or is another one that has just been started for the same pool."""
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    pool = nnunet_folders / "nnUNet_preprocessed" / DATASET
    preparation = pool / f"{plans}_{CONFIGURATION}_preparation"
    for folder in (pool / f"{plans}_{CONFIGURATION}", preparation / "records"):
        folder.mkdir(parents=True)
    (preparation / "part_0_of_1.lock").touch()
    assert make_pool([images]).complete


def test_names_nnunet_cannot_handle_are_refused(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    for name in ("Pool", "Dataset1_Pool", "Dataset100_My__Pool", "Dataset100_a/b"):
        with pytest.raises(PoolError, match="name|used"):
            make_pool([images], name)


def test_a_part_that_is_being_prepared_is_not_prepared_twice(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    report = make_pool([images])
    with FileLock(report.folder / f"{PLANS}_{CONFIGURATION}_preparation" / "part_0_of_1.lock"):
        with pytest.raises(LockedError, match="another process is preparing this part"):
            make_pool([images])


def test_all_bad_settings_are_named(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr())
    with pytest.raises(SettingsError) as error:
        make_pool([images], modality="pet", ct_window=(5, 5), spacing=(1, 0, 1), min_size=0, body_crop="no")
    for name in ("modality", "ct_window", "spacing", "min_size", "body_crop"):
        assert name in str(error.value)


def source_plans(**changes: Any) -> dict[str, Any]:
    """Plans as another dataset has them: own spacing and axis order, a reader without reorientation."""
    resampling = {"order_z": 0, "force_separate_z": None}
    plan = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [20.0, 20.0, 20.0],
        "spacing": [2.0, 1.5, 1.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resampling},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resampling},
        "architecture": ARCHITECTURE,
        "batch_dice": False,
    }
    properties = {"mean": 20.0, "std": 50.0, "median": 0.0, "min": -900.0, "max": 900.0}
    properties |= {"percentile_00_5": -300.0, "percentile_99_5": 400.0}
    return {
        "dataset_name": "Dataset005_Source",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.5, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "configurations": {"3d_fullres": plan, "3d_large": {"inherits_from": "3d_fullres", "spacing": [3.0, 3.0, 3.0]}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": properties},
        **changes,
    }


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_large"])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
def test_with_the_plans_of_another_dataset_cases_are_those_nnunet_makes(
    images: Path, configuration: str, reader: str
) -> None:
    stored = sitk.PermuteAxes(sitk.GetImageFromArray(np.pad(phantoms.ct(), 20, constant_values=-1000)), (1, 2, 0))
    stored.SetSpacing((1.0, 1.0, 2.0))
    path = phantoms.write_image(images / "a.nii.gz", stored)
    inspection = find_volumes([images])
    source = source_plans(image_reader_writer=reader)
    plans = adopt_plans(source, configuration, PoolSettings(), DATASET, PLANS)
    report = prepare_pool(PoolFolder(DATASET, PLANS, configuration), inspection, plans, 1)
    manager = PlansManager(source)
    expected, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(path)], None, manager, manager.get_configuration(configuration), {}
    )
    np.testing.assert_array_equal(arrays(report, configuration)["a"], expected)
    assert report.plans["foreground_intensity_properties_per_channel"]["0"]["mean"] == 20


def test_other_plans_on_an_existing_pool_are_an_error(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.ct())
    inspection, folder, source = find_volumes([images]), PoolFolder(DATASET, PLANS, CONFIGURATION), source_plans()
    prepare_pool(folder, inspection, adopt_plans(source, CONFIGURATION, PoolSettings(), DATASET, PLANS), 1)
    source["configurations"][CONFIGURATION]["spacing"] = [3.0, 3.0, 3.0]
    with pytest.raises(PoolError, match=r"spacing: \[2.0, 1.5, 1.0\] there, \[3.0, 3.0, 3.0\] now"):
        prepare_pool(folder, inspection, adopt_plans(source, CONFIGURATION, PoolSettings(), DATASET, PLANS), 1)


def test_the_geometry_is_known_before_a_network_is_chosen(images: Path) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(shape=(18, 20, 22)), (1, 1, 4))
    settings = PoolSettings(spacing=(1, 2, 4))
    geometry = find_geometry(find_volumes([images]), settings, CONFIGURATION, {})
    assert geometry.spacing == (4, 1, 2)
    assert geometry.median_shape == (22, 18, 10)


def test_a_volume_whose_preparation_breaks_off_is_reported_and_tried_again(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phantoms.write(images / "a.nii.gz", phantoms.mr(0))
    phantoms.write(images / "b.nii.gz", phantoms.mr(1))
    run_case = DefaultPreprocessor.run_case_npy

    def fail_for_b(self: DefaultPreprocessor, data: np.ndarray, *others: Any) -> Any:
        if np.array_equal(np.sort(data.ravel()), np.sort(phantoms.mr(1).ravel())):
            raise MemoryError
        return run_case(self, data, *others)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", fail_for_b)
    report = make_pool([images])
    assert report.tally.statuses == {"prepared": 1, "failed": 1}
    assert "out of memory" in rows(report)["b.nii.gz"]["reason"]
    monkeypatch.undo()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(images.parent / name))
    assert make_pool([images]).num_prepared == 2


@pytest.mark.real_data
def test_real_volumes_of_all_kinds_make_a_pool(real_data_folder: Path) -> None:
    report = make_pool([real_data_folder / "volumes", real_data_folder / "dicom"], spacing=(3, 3, 3))
    assert report.plans["misfm"]["pool"]["modalities"] == {"ct": 3, "mr": 3}
    assert report.tally.reasons == {"looks like a label map": 1}
