"""misfm_pretrain as a user types it: bare volumes, another dataset's plans, continuing, and mistakes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import blosc2
import numpy as np
import pytest
from phantoms import ct, labels, mr, write

from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint
from nnunetv2_misfm.commands.pretrain import describe_choices, main
from nnunetv2_misfm.commands.pretrain_options import read_options
from nnunetv2_misfm.files import training_lock
from nnunetv2_misfm.plans.network_entry import architecture_entry
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.trainers.pretraining_trainer import PretrainingTrainer

TINY = ["-features_per_stage", "4", "8", "16", "32", "64", "-batch_size", "2", "-device", "cpu", "-np", "1"]
SHORT = ["-num_epochs", "1", "-num_iterations_per_epoch", "1", "-num_val_iterations_per_epoch", "1"]


def run(*arguments: str) -> None:
    add_plugin_folder()
    main([*arguments, *TINY, *SHORT])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    device = [] if "-device" in arguments else ["-device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *device])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def run_folder(nnunet: Path, dataset: str, plans: str = "nnUNetPlans") -> Path:
    return nnunet / "nnUNet_results" / dataset / f"VolumeFusionTrainer__{plans}__3d_fullres" / "fold_all"


def test_one_bare_volume_is_enough(nnunet: Path, tmp_path: Path, progress_plot: None) -> None:
    write(tmp_path / "scans" / "a b" / "ü.nii.gz", ct(), spacing=(2.0, 1.5, 1.5))
    run("-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-modality", "ct", "-geometry", "blocks")
    folder = run_folder(nnunet, "Dataset900_Pool")
    checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
    assert checkpoint["misfm"]["training"]["fusion"]["geometry"] == "blocks"
    assert checkpoint["misfm"]["preprocessing"]["spacing"] == [2.0, 1.5, 1.5]
    window = checkpoint["misfm"]["preprocessing"]["foreground_intensity_properties_per_channel"]["0"]
    assert (window["percentile_00_5"], window["percentile_99_5"], window["mean"], window["std"]) == (
        -1000,
        1000,
        0,
        1000,
    )
    assert (folder / "fused_samples.png").is_file() and (folder / "progress.png").is_file()


def test_another_datasets_plans_decide_everything_but_the_volumes(nnunet: Path, tmp_path: Path) -> None:
    for index in range(2):
        write(tmp_path / "scans" / f"{index}.nii.gz", mr(index), spacing=(2.0, 1.0, 1.0))
    boxes = ["-num_boxes", "2", "6", "-box_size_max", "0.5", "0.5", "0.75"]
    run("-i", str(tmp_path / "scans"), "-d", "901", "-n", "For4", "-plans_from", "4", "-p", "nnUNetPlans", *boxes)
    pool = nnunet / "nnUNet_preprocessed" / "Dataset901_For4"
    plans = json.loads((pool / "nnUNetPlans.json").read_text(encoding="utf-8"))
    target = json.loads(
        (nnunet / "nnUNet_preprocessed" / "Dataset004_Small" / "nnUNetPlans.json").read_text(encoding="utf-8")
    )
    ours, theirs = plans["configurations"]["3d_fullres"], target["configurations"]["3d_fullres"]
    for key in ("spacing", "patch_size", "normalization_schemes"):
        assert ours[key] == theirs[key]
    assert ours["architecture"]["network_class_name"].endswith(".PCTNet")
    assert ours["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 32, 64]
    cases = sorted((pool / ours["data_identifier"]).glob("*.b2nd"))
    array = np.asarray(blosc2.open(str(next(c for c in cases if not c.stem.endswith("_seg"))))[:])
    assert array.shape[1:] == (40, 24, 28)  # 20 slices of 2 mm resampled to 1 mm
    checkpoint = read_checkpoint(run_folder(nnunet, "Dataset901_For4") / "checkpoint_final.pth")
    fusion = checkpoint["misfm"]["training"]["fusion"]
    assert (fusion["num_boxes"], fusion["box_size_max"]) == ([2, 6], [0.5, 0.5, 0.75])


def test_channels_of_our_networks_are_refused_for_others(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scans" / "a.nii.gz", ct())
    arguments = ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-network", "plan", *TINY, *SHORT]
    assert "PlainConvUNet is kept as it is. Leave -features_per_stage out" in refused(capsys, *arguments)


def test_an_interrupted_run_is_kept_until_the_user_decides(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scans" / "a.nii.gz", ct())
    arguments = ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-modality", "ct", *TINY, *SHORT]
    main([*arguments, "--only_prepare"])
    assert not (nnunet / "nnUNet_results" / "Dataset900_Pool").exists()
    add_plugin_folder()
    main(arguments)
    folder = run_folder(nnunet, "Dataset900_Pool")
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    assert "--c to continue it" in refused(capsys, *arguments)
    main([*arguments[:-6], "-num_epochs", "2", "-num_iterations_per_epoch", "1", "--c"])
    assert read_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 2


def test_parts_prepare_and_train_nothing(nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the last one, which runs on a machine for preparing."""
    for name in ("a", "b"):
        write(tmp_path / "scans" / f"{name}.nii.gz", ct())
    arguments = ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-modality", "ct", *TINY, "-num_parts", "2"]
    for part in ("0", "1"):
        main([*arguments, "-part_id", part])
        command = "Train with: misfm_pretrain -d Dataset900_Pool -p nnUNetPlans -c 3d_fullres -device cpu"
        assert (command in capsys.readouterr().out) is (part == "1")
    assert (nnunet / "nnUNet_preprocessed" / "Dataset900_Pool" / "dataset_fingerprint.json").is_file()
    assert not (nnunet / "nnUNet_results" / "Dataset900_Pool").exists()


def test_a_run_that_cannot_start_deletes_nothing(
    nnunet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("-d", "4")
    checkpoint = run_folder(nnunet, "Dataset004_Small", "nnUNetMisFMPretrainPlans") / "checkpoint_final.pth"
    before = checkpoint.read_bytes()
    refused(capsys, "-d", "4", "--overwrite", "-num_epochs", "0")
    refused(capsys, "-d", "4", "--overwrite", "-device", "cuda", "-num_gpus", "99")
    with monkeypatch.context() as patched:
        patched.setattr("nnunetv2_misfm.trainers.base.available_memory", lambda _: 2**20)
        assert "even with activation checkpointing" in refused(capsys, "-d", "4", "--overwrite")
    assert checkpoint.read_bytes() == before


def test_a_run_that_is_overwritten_is_kept_whole(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the new one ends: the weights of days are not lost to a Ctrl-C, and no page mixes two runs."""
    add_plugin_folder()
    main(["-d", "4", *TINY, *SHORT, "-num_epochs", "2"])
    folder = run_folder(nnunet, "Dataset004_Small", "nnUNetMisFMPretrainPlans")
    of_the_first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (log,) = folder.glob("training_log_*.txt")
    unpatched = PretrainingTrainer.train_step

    def ctrl_c(self: PretrainingTrainer, batch: object) -> dict:
        os.kill(os.getpid(), signal.SIGINT)
        return unpatched(self, batch)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(PretrainingTrainer, "train_step", ctrl_c)
        run("-d", "4", "--overwrite", "-seed", "1")
    kept = folder / "earlier_1"
    for name in ("checkpoint_final.pth", "metrics.csv", "run.html", "pictures/epoch_0001.png", log.name):
        assert (kept / name).read_bytes() == of_the_first[Path(name)], name
        assert not (folder / name).exists(), name
    main(["-d", "4", "--c", "-device", "cpu"])
    assert read_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 1
    assert [path.name for path in (folder / "pictures").iterdir()] == ["epoch_0000.png"]
    assert not (folder / "earlier_2").exists()


def test_a_second_command_leaves_the_folder_of_a_running_training_alone(
    nnunet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("-d", "4")
    folder = run_folder(nnunet, "Dataset004_Small", "nnUNetMisFMPretrainPlans")
    before = {path.name for path in folder.iterdir()}
    with training_lock(folder):
        for options in ([], ["--overwrite"], ["--c"]):
            assert "another process trains in this results folder" in refused(capsys, "-d", "4", *options)
    assert {path.name for path in folder.iterdir()} == before


def test_continuing_keeps_the_run_what_it_was(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_plugin_folder()
    main(["-d", "4", "-network", "plan", "-geometry", "blocks", "-batch_size", "2", "-device", "cpu", *SHORT])
    folder = run_folder(nnunet, "Dataset004_Small", "nnUNetMisFMPretrainPlans")
    before = (folder / "checkpoint_final.pth").read_bytes()
    ignored = refused(capsys, "-d", "4", "--c", "-num_boxes", "5", "9", "-box_size_min", "0.1", "0.1", "0.1")
    assert "-num_boxes and -box_size_min: not for -geometry blocks" in ignored  # which the earlier plans chose
    ignored = refused(capsys, "-d", "4", "--c", "-brightness", "-0.2", "0.2", "-gamma", "0.5", "2")
    assert "-brightness: without effect while -brightness_probability is 0; give that too" in ignored
    assert "-gamma" not in ignored
    message = refused(capsys, "-d", "4", "--c", "-geometry", "boxes", "-batch_size", "3")
    assert "fusion.geometry: blocks then, boxes now" in message and "batch_size: 2 then, 3 now" in message
    main(["-d", "4", "--c", "-device", "cpu"])
    assert "is finished" in capsys.readouterr().out
    assert (folder / "checkpoint_final.pth").read_bytes() == before
    main(["-d", "4", "--c", "-device", "cpu", "-num_epochs", "2"])
    assert read_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 2


@pytest.mark.parametrize("patch", [[32, 64, 64], [12, 64, 64]])
def test_a_patch_that_is_mostly_padding_is_told(patch: list[int]) -> None:
    entry = {
        "architecture": architecture_entry("pctnet", 0),
        "patch_size": patch,
        "batch_size": 4,
        "median_image_size_in_voxels": [10.0, 160.0, 160.0],
    }
    plans = {"plans_name": "P", "misfm": {"task": "volume_fusion"}, "configurations": {"3d_fullres": entry}}
    told = describe_choices(read_options(["-d", "4", "-device", "cpu"], under_torchrun=False), plans)
    is_told = "larger than the median volume, [10, 160, 160] voxels: 69% of such a patch is padding" in told
    assert is_told == (patch[0] == 32)


@pytest.mark.parametrize(
    ("task", "patch", "told"),
    [
        ("vox2vec", [48, 64, 48], "[36, 50, 35] voxels, along 3 axes, so vox2vec can tell its voxels by how far they"),
        ("vox2vec", [32, 50, 35], "along 2 axes"),
        ("vox2vec", [32, 48, 48], ""),  # along one axis alone
        ("patch_swap", [36, 50, 35], ""),
    ],
)
def test_a_patch_whose_border_tells_the_place_of_voxels_is_told(task: str, patch: list[int], told: str) -> None:
    entry = {
        "architecture": architecture_entry("pctnet", 0),
        "patch_size": patch,
        "batch_size": 4,
        "median_image_size_in_voxels": [36.0, 50.0, 35.0],
    }
    plans = {"plans_name": "P", "misfm": {"task": task}, "configurations": {"3d_fullres": entry}}
    said = describe_choices(read_options(["-d", "4", "-device", "cpu"], under_torchrun=False), plans)
    assert ("from the border. Give a smaller -patch_size" in said) == bool(told) and told in said


@pytest.mark.parametrize(
    ("task", "settings", "few"),
    [
        ("volume_fusion", {"num_epochs": 30, "num_iterations_per_epoch": 50}, True),
        ("volume_fusion", {"num_epochs": 40}, False),
        ("volume_fusion", {}, False),
        ("patch_swap", {"num_epochs": 30, "num_iterations_per_epoch": 50}, False),
    ],
)
def test_a_pretraining_too_short_for_its_task_is_told(task: str, settings: dict, few: bool) -> None:
    entry = {"architecture": architecture_entry("pctnet", 0), "patch_size": [32, 32, 32], "batch_size": 4}
    plans = {"plans_name": "P", "misfm": {"task": task, **settings}, "configurations": {"3d_fullres": entry}}
    told = describe_choices(read_options(["-d", "4", "-device", "cpu"], under_torchrun=False), plans)
    assert ("1,500 iterations of volume_fusion are few" in told) == few
    assert ("Give it 10,000 or more" in told) == few


def test_a_pool_that_is_not_complete_is_named(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As while other parts of it are being prepared: its plans are there, its fingerprint comes last."""
    pool = nnunet / "nnUNet_preprocessed" / "Dataset004_Small"
    dataset = json.loads((pool / "dataset.json").read_text(encoding="utf-8"))
    (pool / "dataset.json").write_text(json.dumps({**dataset, "misfm_pool": True}), encoding="utf-8")
    fingerprint = (pool / "dataset_fingerprint.json").read_bytes()
    (pool / "dataset_fingerprint.json").unlink()
    assert "is not complete: volumes are still to be prepared" in refused(capsys, "-d", "4")
    # That of other plans of the dataset, or of the volumes before, says nothing of those that are being prepared.
    (pool / "dataset_fingerprint.json").write_bytes(fingerprint)
    preparation = pool / "nnUNetPlans_3d_fullres_preparation"
    preparation.mkdir()
    (preparation / "incomplete").touch()
    assert "is not complete: volumes are still to be prepared" in refused(capsys, "-d", "4")


def test_a_dataset_that_is_not_preprocessed_is_named(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = nnunet / "nnUNet_preprocessed" / "Dataset004_Small" / "nnUNetPlans_3d_fullres"
    data.rename(data.with_name("elsewhere"))
    assert f"{data} holds no preprocessed cases. Run nnUNetv2_preprocess -d 4" in refused(capsys, "-d", "4")


def test_without_nnunets_folders_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    assert "nnUNet_results is not set" in refused(capsys, "-d", "4")


def test_a_name_that_would_be_ignored_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "-i", str(tmp_path), "-d", "Dataset900_A", "-n", "B")
    assert "-d Dataset900_A is the whole name of the dataset; leave -n B out" in message


def test_what_was_given_and_what_was_kept_is_said(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One rule for pools and datasets: what is left open stays as the plans of that name have it."""
    run("-d", "4", "-patch_size", "32", "32", "32", "-gamma", "0.9", "1.1")
    assert "Given: num_epochs 1" in capsys.readouterr().out
    run("-d", "4", "--overwrite")
    said = capsys.readouterr().out
    assert "patch size [32, 32, 32]" in said and "Kept from earlier plans: gamma [0.9, 1.1]" in said
    plans = json.loads(
        (nnunet / "nnUNet_preprocessed/Dataset004_Small/nnUNetMisFMPretrainPlans.json").read_text(encoding="utf-8")
    )
    assert plans["misfm"]["augmentation"]["gamma"] == [0.9, 1.1]


def test_a_configuration_that_inherits_is_planned_anew_with_what_it_had(nnunet: Path) -> None:
    """Users add such configurations to plans."""
    network = ["-network", "pctnet", *TINY[:6]]
    main(["-d", "4", "--only_prepare", "-device", "cpu", *network, "-patch_size", "32", "32", "32"])
    path = nnunet / "nnUNet_preprocessed/Dataset004_Small/nnUNetMisFMPretrainPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"]["of_three"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    path.write_text(json.dumps(plans), encoding="utf-8")
    stock = path.with_name("nnUNetPlans.json")
    base = json.loads(stock.read_text(encoding="utf-8"))
    base["configurations"]["of_three"] = {"inherits_from": "3d_fullres"}
    stock.write_text(json.dumps(base), encoding="utf-8")
    main(["-d", "4", "--only_prepare", "-device", "cpu", "-c", "of_three", "-network", "pctnet"])
    entry = json.loads(path.read_text(encoding="utf-8"))["configurations"]["of_three"]
    assert entry["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 32, 64]
    assert (entry["patch_size"], entry["batch_size"]) == ([32, 32, 32], 3)


FEATURES = ["-features_per_stage", "4", "8", "16", "32", "64"]


@pytest.mark.parametrize("of_a_pool", [False, True])
def test_a_network_stays_while_its_arguments_change(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], of_a_pool: bool
) -> None:
    data, path = ["-d", "4"], nnunet / "nnUNet_preprocessed/Dataset004_Small/nnUNetMisFMPretrainPlans.json"
    if of_a_pool:
        write(tmp_path / "scans" / "a.nii.gz", mr(1))
        data = ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-np", "1"]
        path = nnunet / "nnUNet_preprocessed/Dataset900_Pool/nnUNetPlans.json"

    def planned(*arguments: str) -> tuple[str, dict[str, object]]:
        main([*data, *arguments, "--only_prepare", "-device", "cpu"])
        entry = json.loads(path.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]["architecture"]
        return entry["network_class_name"].rpartition(".")[2], entry["arch_kwargs"]

    assert planned("-network", "fmunet", "-stems", "plan")[0] == "FMUNet"
    name, arguments = planned(*FEATURES, "-stems", "plan")
    assert name == "FMUNet" and arguments["features_per_stage"] == [4, 8, 16, 32, 64]
    assert "-stems all is for PCT-Net, not for -network fmunet" in refused(
        capsys, *data, "-stems", "all", "--overwrite"
    )
    assert planned("-network", "pctnet", *FEATURES)[0] == "PCTNet"
    assert planned("-stems", "all") == ("PCTNet", arguments | {"stems": [0, 1, 2]})
    assert planned("-stems", "plan")[1] == arguments | {"stems": None}
    assert planned("-network", "plan")[0] == "PlainConvUNet"
    assert "own PlainConvUNet is kept as it is" in refused(capsys, *data, *FEATURES, "--overwrite")


def test_what_training_refuses_is_refused_before_volumes_are_prepared(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "scans" / "a.nii.gz", ct())
    data = ("-i", str(tmp_path / "scans"), "-d", "901", "-n", "New", "-modality", "ct", "-patch_size", "16", "16", "16")
    message = refused(capsys, *data, "-network", "fmunet", "-batch_size", "1")
    assert "patch size [16, 16, 16] leaves a single voxel" in message
    monkeypatch.setattr("nnunetv2_misfm.commands.pretrain.check_device", lambda *_: None)
    message = refused(capsys, *data, "-device", "cuda", "-batch_size", "4", "-num_gpus", "8")
    assert "A batch of 4 samples cannot be shared by 8 processes" in message
    assert not (nnunet / "nnUNet_preprocessed" / "Dataset901_New" / "nnUNetPlans.json").exists()


def test_sizes_that_are_kept_have_to_fit_another_network(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-d", "4", "-patch_size", "16", "16", "16", "--only_prepare", "-device", "cpu"])
    message = refused(capsys, "-d", "4", "-network", "fmunet", "--overwrite")
    assert "patch size [16, 16, 16] leaves a single voxel" in message


def test_what_volumes_are_left_out_for_can_be_changed_by_options(tmp_path: Path, nnunet: Path) -> None:
    write(tmp_path / "scans" / "labels.nii.gz", labels())
    write(tmp_path / "scans" / "small.nii.gz", mr(1, (5, 24, 28)))
    data = ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "All", "-np", "1", "--only_prepare"]
    main([*data, "--no_skip_label_maps", "-min_size", "4"])
    assert "left out" not in (nnunet / "nnUNet_preprocessed/Dataset900_All/report.csv").read_text(encoding="utf-8")


def test_a_pool_serves_several_tasks_by_plans_of_their_own(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scans" / "a.nii.gz", ct())
    volumes = ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-modality", "ct", *TINY, "--only_prepare"]
    main(volumes)
    message = refused(capsys, *volumes, "-pretext", "masked_autoencoder")
    assert "nnUNetPlans of the pool Dataset900_Pool are for volume_fusion. Leave -i out" in message
    main(["-d", "900", "-pretext", "masked_autoencoder", "--only_prepare"])
    folder = nnunet / "nnUNet_preprocessed" / "Dataset900_Pool"
    first, second = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("nnUNetPlans", "nnUNetMisFMPretrainMaskedAutoencoderPlans")
    )
    assert (first["misfm"]["task"], second["misfm"]["task"]) == ("volume_fusion", "masked_autoencoder")
    assert second["misfm"]["pool"] == first["misfm"]["pool"] and "fusion" not in second["misfm"]
    ours, theirs = (plans["configurations"]["3d_fullres"] for plans in (first, second))
    assert ours["architecture"] == theirs["architecture"] and ours["data_identifier"] == theirs["data_identifier"]
