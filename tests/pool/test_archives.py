"""Large archives: who looks after which file, headers opened once, parts side by side, killed parts, earlier pools."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import blosc2
import dicom_files
import numpy as np
import phantoms
import pytest
from filelock import FileLock
from nnunet_dataset import use_folders

from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.pool import headers
from nnunetv2_misfm.pool import prepare as prepare_module
from nnunetv2_misfm.pool.bundle_files import BundleFiles
from nnunetv2_misfm.pool.folder import PoolFolder, pool_is_complete
from nnunetv2_misfm.pool.header_index import HeaderIndex
from nnunetv2_misfm.pool.inspection import find_volumes
from nnunetv2_misfm.pool.listing import ArchiveLister, list_archive
from nnunetv2_misfm.pool.share import BUNDLES, Share, bundle_of
from nnunetv2_misfm.pool.shared_listing import forget_share, list_share
from nnunetv2_misfm.start_up import add_plugin_folder

POOL = "Dataset900_Pool"
HU = phantoms.ct(0, (12, 24, 28))


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "nnunet"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir(parents=True)
    use_folders(root, monkeypatch)
    return root


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return tmp_path / "scans"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers are read."""
    names: list[str] = []
    read = headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda file: (names.append(Path(file.path).name), read(file))[1])
    return names


def write_scans(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        phantoms.write(folder / f"v{number}.nii.gz", phantoms.mr(number))


def prepare(scans: Path, *options: str, spacing: Sequence[str] = ("1", "1", "1")) -> None:
    sizes = ["-patch_size", "16", "16", "16", "-features_per_stage", "4", "4", "8", "16", "32"]
    data = ["-i", str(scans), "-d", "900", "-n", "Pool", "-modality", "mr", "-np", "1"]
    misfm_pretrain([*data, "-spacing", *spacing, *sizes, "--only_prepare", *options])


def prepare_parts(scans: Path, num_parts: int, *options: str, spacing: Sequence[str] = ("1", "1", "1")) -> None:
    for part in range(num_parts):
        prepare(scans, "-num_parts", str(num_parts), "-part_id", str(part), *options, spacing=spacing)


def pool(root: Path) -> dict[str, Any]:
    """What a finished pool holds, apart from dates and what a preparation keeps for itself."""
    folder = root / "nnUNet_preprocessed" / POOL
    held: dict[str, Any] = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}
    for path in sorted((folder / "nnUNetPlans_3d_fullres").iterdir()):
        held[path.name] = blosc2.open(str(path))[:].tobytes() if path.suffix == ".b2nd" else path.read_bytes()
    return held


def fresh(root: Path) -> Path:
    """The same folders without the pool."""
    shutil.rmtree(root / "nnUNet_preprocessed" / POOL)
    return root


def preparation(root: Path) -> Path:
    return root / "nnUNet_preprocessed" / POOL / "nnUNetPlans_3d_fullres_preparation"


def in_different_parts(names: Iterator[str], num_parts: int = 2) -> list[str]:
    """Two of the names whose folders different parts look after."""
    first = next(names)
    return [first, next(name for name in names if (bundle_of(name) - bundle_of(first)) % num_parts)]


def test_every_file_belongs_to_one_part(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"flat_{number}.nii.gz").touch()
        (tmp_path / f"patient{number}").mkdir()
        for slice_number in range(3):
            (tmp_path / f"patient{number}" / f"{slice_number}.dcm").touch()
    whole = list_archive([tmp_path], True)
    shares = [list_archive([tmp_path], True, bundles=Share(7, part).bundles) for part in range(7)]
    files = [[f.path for groups in one.groups.values() for g in groups for f in g.files] for one in [whole, *shares]]
    assert sorted(files[0]) == sorted(sum(files[1:], [])) and len(files[0]) == 160
    assert all(10 < len(share) < 45 for share in files[1:])  # the huge folder is shared as well
    assert {one.token for one in shares} == {whole.token} and {one.num_files for one in shares} == {160}
    for share in files[1:]:  # no folder of DICOM files is cut
        assert set(Counter(os.path.dirname(path) for path in share if path.endswith(".dcm")).values()) <= {3}


def test_shares_do_not_depend_on_what_else_there_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.nii.gz").touch()
    before = set(list_archive([tmp_path], True).groups)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "y.nii.gz").touch()
    assert before < set(list_archive([tmp_path], True).groups)
    assert max(before) < BUNDLES


def test_channels_of_one_folder_stay_together(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c_0000"):
        phantoms.write(tmp_path / f"{name}.nii.gz", phantoms.mr())
    phantoms.write(tmp_path / "lone" / "a_0000.nii.gz", phantoms.mr())
    phantoms.write(tmp_path / "lone" / "b_0000.nii.gz", phantoms.mr())
    shares = [find_volumes([tmp_path], bundles=Share(5, part).bundles) for part in range(5)]
    volumes = [volume for found in shares for volume in found.volumes]
    whole = find_volumes([tmp_path])
    assert sorted(volumes, key=lambda volume: volume.case) == list(whole.volumes)
    assert sorted(volume.num_channels for volume in volumes) == [1, 1, 2, 2]
    assert [one for found in shares for one in found.left_out] == list(whole.left_out)


def test_headers_are_kept_as_they_were_read(tmp_path: Path, opened: list[str]) -> None:
    folder = tmp_path / "scans"
    dicom_files.series(folder / "series", HU, PatientID="Jane Doe")
    phantoms.write(folder / "a.nii.gz", phantoms.mr(), (1, 1.5, 0.3))
    (folder / "broken.nrrd").write_bytes(b"NRRD0004\n")
    (tmp_path / "index").mkdir()
    first, second = (find_volumes([folder], index=HeaderIndex(tmp_path / "index", Share().bundles)) for _ in range(2))
    assert (first.volumes, first.left_out) == (second.volumes, second.left_out)
    assert len(second.volumes) == 2 and len(second.left_out) == 1
    assert Counter(opened) == dict.fromkeys(opened, 1) and len(opened) == 14
    assert not any("Jane" in path.read_text(encoding="utf-8") for path in (tmp_path / "index").iterdir())


def test_a_file_without_an_ending_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicom_files.series(tmp_path / "scans", HU, name="IM{:04d}".format)
    (tmp_path / "scans" / "notes").write_text("no DICOM file", encoding="utf-8")
    (tmp_path / "index").mkdir()
    opened: list[str] = []
    really = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *mode, **more: (opened.append(str(path)), really(path, *mode, **more))[1]
    )
    for _ in range(2):
        found = find_volumes([tmp_path / "scans"], index=HeaderIndex(tmp_path / "index", Share().bundles))
        assert [volume.num_channels for volume in found.volumes] == [1]
        assert "unsupported format" in found.left_out[0].reason
    of_scans = Counter(path for path in opened if path.startswith(str(tmp_path / "scans/")))
    assert len(of_scans) == 13 and set(of_scans.values()) == {1}


def test_only_new_and_changed_files_are_opened_again(nnunet: Path, scans: Path, opened: list[str]) -> None:
    write_scans(scans, range(4))
    prepare(scans)
    opened.clear()
    write_scans(scans, [4])
    phantoms.write(scans / "v1.nii.gz", phantoms.mr(9, (24, 24, 28)))
    prepare_parts(scans, 3)  # and as many parts as one likes
    assert sorted(opened) == ["v1.nii.gz", "v4.nii.gz"]
    assert pool(nnunet)["dataset.json"].count('"numTraining": 5') == 1


def test_a_part_reads_the_headers_of_its_share_alone(nnunet: Path, scans: Path, opened: list[str]) -> None:
    write_scans(scans, range(8))
    for part in range(3):
        before = len(opened)
        prepare(scans, "-num_parts", "3", "-part_id", str(part))
        assert len(opened) - before < 8
    assert Counter(opened) == {f"v{number}.nii.gz": 1 for number in range(8)}


@pytest.mark.parametrize("num_parts", [2, 8])
def test_parts_make_the_pool_of_one(nnunet: Path, scans: Path, num_parts: int) -> None:
    """More parts than volumes, too."""
    write_scans(scans, range(5))
    phantoms.write(scans / "other" / "copy.nii.gz", phantoms.mr(3))
    phantoms.write(scans / "other" / "labels.nii.gz", phantoms.labels())
    prepare(scans)
    one = pool(nnunet)
    prepare_parts(fresh(nnunet).parent / "scans", num_parts)
    assert pool(nnunet) == one


def test_the_median_takes_two_steps(
    nnunet: Path, scans: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, mm in enumerate((1, 1, 2, 3, 3)):
        phantoms.write(scans / f"v{number}.nii.gz", phantoms.mr(number), (mm, 1, 1))
    prepare(scans, spacing=["median"])
    one = pool(nnunet)
    fresh(nnunet)
    opened.clear()
    prepare_parts(scans, 3, "--only_inspect", spacing=["median"])
    said = capsys.readouterr().out
    assert said.count("Other parts have still to look") == 2 and said.count("The pool is planned") == 1
    assert not list((nnunet / "nnUNet_preprocessed" / POOL).rglob("*.b2nd"))
    prepare_parts(scans, 3, spacing=["median"])
    assert pool(nnunet) == one
    assert Counter(opened) == {f"v{number}.nii.gz": 1 for number in range(5)}


def test_a_series_in_folders_of_different_parts_is_one_volume(nnunet: Path, scans: Path) -> None:
    """Each half alone would be a volume, too."""
    halves = in_different_parts(f"scans/half{number}" for number in range(9))
    for number in range(2):
        write_scans(scans / "others", [number])
    dicom_files.series(scans, HU, name=lambda n: f"{halves[n // 6].partition('/')[2]}/image{n}.dcm", modality="MR")
    prepare(scans)
    one = pool(nnunet)
    fresh(nnunet)
    for _ in range(2):
        prepare_parts(scans, 2)
        assert pool(nnunet) == one
    assert sum(name.endswith("_seg.b2nd") for name in one) == 3
    assert "12 files in 2 folders" in one["report.csv"]
    # What the parts know of it, nobody does again.
    before = len(list((preparation(nnunet) / "records").glob("*.jsonl")))
    prepare(scans)
    assert pool(nnunet) == one and len(list((preparation(nnunet) / "records").glob("*.jsonl"))) == before


def test_a_copy_of_an_archive_does_not_cut_the_series_of_the_first(nnunet: Path, tmp_path: Path) -> None:
    first, copy = tmp_path / "a" / "scans", tmp_path / "b" / "scans"
    dicom_files.series(first, HU, name=lambda n: f"half{n // 6}/image{n}.dcm", modality="MR")
    prepare(first)
    one = pool(nnunet)
    shutil.copytree(first, copy)
    prepare(copy)
    (case,) = (name for name in pool(nnunet) if name.endswith(".b2nd") and not name.endswith("_seg.b2nd"))
    assert pool(nnunet)[case] == one[case]
    shutil.rmtree(first)
    prepare(copy)
    assert pool(nnunet)[case] == one[case] and "left_out" not in pool(nnunet)["report.csv"]


def test_a_part_that_begins_while_another_merges_loses_nothing(
    nnunet: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a job array is submitted again, whose last parts start late: all have marked that they are done."""
    write_scans(scans, range(6))
    prepare_parts(scans, 2)
    one = pool(nnunet)
    share, merge = Share(2, 1), prepare_module.merge_pool
    other = PoolFolder(POOL, "nnUNetPlans", "3d_fullres", share)

    has_begun, has_merged = threading.Event(), threading.Event()

    def begin() -> None:
        with other.lock_part():
            assert has_merged.is_set()
            has_begun.set()

    def merge_beside_another(*arguments: Any) -> Any:
        part.start()
        assert not has_begun.wait(0.3)
        merged = merge(*arguments)
        has_merged.set()
        return merged

    part = threading.Thread(target=begin, daemon=True)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "merge_pool", merge_beside_another)
        prepare(scans, "-num_parts", "2", "-part_id", "0")
    assert has_begun.wait(30) and pool(nnunet) == one and not other.incomplete.exists()
    # It has not marked that it is done since, so it is waited for.
    capsys.readouterr()
    prepare(scans, "-num_parts", "2", "-part_id", "0")
    assert "still to be prepared (-part_id 1)" in capsys.readouterr().out and other.incomplete.exists()
    prepare(scans, "-num_parts", "2", "-part_id", "1")
    assert pool(nnunet) == one and not other.incomplete.exists() and not other.temporary.exists()


def test_a_pool_stays_complete_when_nothing_is_to_be_prepared(
    nnunet: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scans(scans, range(2))
    prepare(scans)
    for name in ("a_0000", "a_0001"):
        phantoms.write(tmp_path / "two_channels" / f"{name}.nii.gz", phantoms.mr())
    with pytest.raises(SystemExit):
        prepare(tmp_path / "two_channels")
    assert "number of channels: 1 there, 2 now" in capsys.readouterr().err
    for folder in (scans, tmp_path / "two_channels"):
        with pytest.raises(SystemExit) if folder != scans else nullcontext():
            prepare(folder, "--only_inspect")
        assert pool_is_complete(nnunet / "nnUNet_preprocessed" / POOL, "nnUNetPlans_3d_fullres")


def test_merging_again_changes_nothing(nnunet: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scans(scans, range(3))
    phantoms.write(scans / "copy.nii.gz", phantoms.mr(0))
    with monkeypatch.context() as patch:
        patch.setattr("nnunetv2_misfm.pool.prepare.merge_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            prepare(scans)
    assert "dataset_fingerprint.json" not in pool(nnunet)
    prepare(scans)
    once = pool(nnunet)
    prepare(scans)
    assert pool(nnunet) == once


def test_a_torn_line_counts_for_nothing(nnunet: Path, scans: Path, opened: list[str]) -> None:
    """As a part leaves it that is killed while it writes."""
    write_scans(scans, range(3))
    prepare(scans)
    one = pool(nnunet)
    bundle = min(path.name[:4] for path in (preparation(nnunet) / "records").glob("*.jsonl"))
    for torn in ("records/{}", "headers_1/{}", "headers_1/{}.groups"):
        path = preparation(nnunet) / f"{torn.format(bundle)}.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
    opened.clear()
    for _ in range(2):
        prepare(scans)
        assert pool(nnunet) == one
    assert len(opened) == 1


def test_a_job_array_prepares_the_archive_as_its_first_part_found_it(
    nnunet: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes meanwhile is left to the next run, and a part that has seen it waits for the others."""
    write_scans(scans, range(4))
    prepare(scans, "-num_parts", "2", "-part_id", "0")
    write_scans(scans, [4])
    prepare(scans, "-num_parts", "2", "-part_id", "1")
    assert '"numTraining": 4' in pool(nnunet)["dataset.json"]
    capsys.readouterr()
    prepare(scans, "-num_parts", "2", "-part_id", "1")
    said = capsys.readouterr().out
    assert "still to be prepared (-part_id 0)" in said and "Part 0 was prepared for other folders, or for" in said
    prepare(scans, "-num_parts", "2", "-part_id", "0")
    assert '"numTraining": 5' in pool(nnunet)["dataset.json"]


def test_the_archive_is_listed_once_for_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, files that are passed over and folders of one name included."""
    scans, kept = [tmp_path / "first" / "scans", tmp_path / "second" / "scans"], tmp_path / "kept"
    for number in range(9):
        for name in (
            f"p{number}/{number}.dcm",
            f"p{number}/notes.txt",
            f"v{number}.nii.gz",
            "a_0000.nrrd",
            "a_0001.nrrd",
        ):
            for folder in scans:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
    (scans[0] / "link.nii.gz").symlink_to(scans[0] / "v1.nii.gz")
    (scans[0] / "d\udce9.nii.gz").touch()
    kept.mkdir()
    shares = [Share(4, part) for part in range(4)]
    expected = [list_archive(scans, True, bundles=share.bundles) for share in shares]
    first = list_share(kept, shares[2], scans, True)
    monkeypatch.setattr(ArchiveLister, "run", lambda _: pytest.fail("the archive is listed again"))
    assert [list_share(kept, share, scans, True) for share in shares] == expected and first == expected[2]
    assert sum(len(one.left_out) for one in expected) == 1 and sum(one.passed_over.total() for one in expected) == 18
    monkeypatch.undo()
    for share in shares:
        forget_share(kept, share)
    (scans[0] / "new.nii.gz").touch()
    assert list_share(kept, shares[0], scans, True).num_files == first.num_files + 1
    assert list_share(kept, shares[1], scans[:1], True).num_files < first.num_files  # other folders


@pytest.mark.parametrize("held", ["part_0_of_1", "part_2_of_4"])
def test_parts_of_another_number_do_not_work_beside_each_other(
    nnunet: Path, scans: Path, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scans(scans, range(2))
    preparation(nnunet).mkdir(parents=True)
    with FileLock(preparation(nnunet) / f"{held}.lock"):
        with pytest.raises(SystemExit):
            prepare(scans, "-num_parts", "2", "-part_id", "0")
    assert f"{held.replace('_', ' ')} is being prepared" in capsys.readouterr().err
    prepare_parts(scans, 2)  # what the other left does not matter
    assert '"numTraining": 2' in pool(nnunet)["dataset.json"]


def test_parts_say_what_became_of_their_volumes(nnunet: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of those that an earlier run prepared."""
    write_scans(scans, range(6))
    phantoms.write(scans / "labels.nii.gz", phantoms.labels())
    (scans / "broken.nii.gz").write_bytes(b"")
    for _ in range(2):
        prepare(scans, "-num_parts", "2", "-part_id", "0")
        said = capsys.readouterr().out
        assert ": 4 volumes" in said and "1 left out, 0 failed" in said and "Not complete yet" in said


def test_parts_say_which_options_a_pool_keeps(nnunet: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scans(scans, range(2))
    prepare_parts(scans, 2, "-num_epochs", "7")
    prepare_parts(scans, 2, "-num_epochs", "7")
    assert "leave the plans" not in capsys.readouterr().out
    prepare(scans, "-num_parts", "2", "-part_id", "1", "-num_epochs", "9")
    assert "(num_epochs: 7, not 9)" in capsys.readouterr().out
    assert json.loads(pool(nnunet)["nnUNetPlans.json"])["misfm"]["num_epochs"] == 7


def test_what_other_parts_wrote_meanwhile_is_read(tmp_path: Path) -> None:
    """A part looks up once which files there are of its own bundles, never of those of others."""
    mine, theirs = (BundleFiles(tmp_path, Share(2, part).bundles) for part in range(2))
    assert [list(mine.read(bundle)) for bundle in (0, 1)] == [[], []]
    theirs.append(1, ["7"])
    mine.append(0, ["8"])
    assert [list(mine.read(bundle)) for bundle in (0, 1)] == [[8], [7]]


def test_a_pool_of_an_earlier_version_is_extended_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records have a file each; what they say of volumes that are gone stays."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "commands" / "earlier_version.zip") as archive:
        archive.extractall(tmp_path)
    use_folders(tmp_path, monkeypatch)
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset901_Before"
    records = folder / "nnUNetPlans_3d_fullres_preparation" / "records"
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "nnUNetPlans_3d_fullres").iterdir()}
    settings = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))["misfm"]["pool"]["settings"]
    write_scans(tmp_path / "scans", [7])
    spacing = settings["spacing"] if isinstance(settings["spacing"], str) else " ".join(map(str, settings["spacing"]))
    given = ["-modality", settings["modality"], "-spacing", *spacing.split()]
    misfm_pretrain(["-i", str(tmp_path / "scans"), "-d", "Dataset901_Before", *given, "-np", "1", "--only_prepare"])
    now = {path.name: path.stat().st_mtime_ns for path in (folder / "nnUNetPlans_3d_fullres").iterdir()}
    assert before.items() < now.items() and len(now) == len(before) + 3
    assert len(json.loads((folder / "dataset_fingerprint.json").read_text(encoding="utf-8"))["cases"]) == 4
    assert not list(records.glob("*.json"))
    add_plugin_folder()
    misfm_pretrain(["-d", "901", "-device", "cpu", "-num_epochs", "4", "--c"])
    (metrics,) = (tmp_path / "nnUNet_results" / "Dataset901_Before").rglob("metrics.csv")
    assert [row["epoch"] for row in csv.DictReader(metrics.open(encoding="utf-8"))] == ["0", "1", "2", "3"]


def test_what_an_archive_will_cost_is_said_and_nothing_is_written(
    nnunet: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scans(scans, range(3))
    prepare(scans, "--dry_run")
    said = capsys.readouterr().out
    assert "About 3 volumes in 3 files" in said and "about 1 minute" in said and "are free in" in said
    assert "left out" not in said
    phantoms.write(scans / "grey.nii.gz", np.clip(phantoms.ct(), 0, 255))
    prepare(scans, "-modality", "ct", "--dry_run")
    assert "Would be left out" in (said := capsys.readouterr().out) and "-modality mr" in said
    for number in range(2):
        phantoms.write(scans / "two" / f"b_{number:04d}.nii.gz", phantoms.mr(number))
    prepare(scans, "--dry_run")
    said = capsys.readouterr().out
    assert "about 1 by their headers, such as" in said and "2 channels, but the pool's volumes have 1" in said
    shutil.rmtree(scans / "two")
    phantoms.write(scans / "grey.nii.gz", phantoms.ct()[:3])  # too few slices
    prepare(scans, "-modality", "ct", "--dry_run")
    said = capsys.readouterr().out
    assert "About 3 volumes" in said and "judged by the headers of 4 and by preparing 3" in said
    assert "Would be left out: about 1 for their size" in said and "grey.nii.gz: too small: 3x" in said
    with pytest.raises(SystemExit):
        prepare(scans, "-min_size", "1000", "--dry_run")
    assert "no usable volume" in (said := capsys.readouterr().err) and "at least 1000 along each axis" in said
    assert not list((nnunet / "nnUNet_preprocessed").iterdir())
    (nnunet / "nnUNet_preprocessed").rmdir()
    prepare(scans, "--dry_run")
    assert "about 1 minute" in capsys.readouterr().out
    prepare(scans)
    write_scans(scans, [7])
    capsys.readouterr()
    prepare(scans, "--dry_run")
    assert "About 1 volumes in" in (said := capsys.readouterr().out) and "more are in the pool already" in said


def test_other_settings_than_the_pools_are_refused_before_headers_are_read(
    nnunet: Path, scans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scans(scans, range(2))
    prepare(scans)
    monkeypatch.setattr("nnunetv2_misfm.commands.pretrain_source.find_volumes", None)  # it would not get so far
    with pytest.raises(SystemExit):
        prepare(scans, spacing=("2", "2", "2"))
    said = capsys.readouterr().err
    assert "spacing: [1.0, 1.0, 1.0] there, [2.0, 2.0, 2.0] now" in said and "Use the same settings again" in said


def test_a_folder_that_does_not_exist_leaves_no_trace(nnunet: Path, scans: Path) -> None:
    with pytest.raises(SystemExit):
        prepare(scans)
    assert not list((nnunet / "nnUNet_preprocessed").iterdir())


def test_an_earlier_record_serves_a_volume_that_is_still_there(nnunet: Path, scans: Path) -> None:
    write_scans(scans, range(2))
    prepare(scans)
    one = pool(nnunet)
    records = preparation(nnunet) / "records"
    dates = {path: path.stat().st_mtime_ns for path in records.parents[1].rglob("*.b2nd")}
    for path in list(records.glob("*.jsonl")):
        for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
            record = json.loads(line)
            del record["bundle"], record["series"]
            (records / f"{record['case']}.json").write_text(json.dumps(record), encoding="utf-8")
        path.unlink()
    shutil.rmtree(preparation(nnunet) / "headers_1")
    prepare(scans)
    assert pool(nnunet) == one
    assert {path: path.stat().st_mtime_ns for path in dates} == dates


PART = """
import sys
sys.path[:] = {paths!r}
from pathlib import Path
from test_archives import prepare
prepare(Path({scans!r}), "-num_parts", "{num_parts}", "-part_id", "{part}")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_parts_that_start_together_and_are_killed_make_the_pool_of_one(nnunet: Path, scans: Path) -> None:
    write_scans(scans, range(12))
    prepare(scans)
    one = pool(nnunet)
    fresh(nnunet)

    def start(part: int) -> subprocess.Popen[bytes]:
        code = PART.format(paths=sys.path, scans=str(scans), num_parts=3, part=part)
        return subprocess.Popen([sys.executable, "-c", code])

    parts = {part: start(part) for part in range(3)}
    data = nnunet / "nnUNet_preprocessed" / POOL / "nnUNetPlans_3d_fullres"
    while len(list(data.glob("*.b2nd"))) < 3:
        assert any(process.poll() is None for process in parts.values())
        time.sleep(0.005)
    hit = next(part for part, process in parts.items() if process.poll() is None)
    parts[hit].send_signal(signal.SIGKILL)
    assert parts[hit].wait() == -signal.SIGKILL
    parts[hit] = start(hit)
    assert [process.wait() for process in parts.values()] == [0, 0, 0]
    assert pool(nnunet) == one
