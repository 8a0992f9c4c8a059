"""misfm_plan as a user types it: what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, write_checkpoint
from nnunetv2_misfm.commands.checkpoints import export_main
from nnunetv2_misfm.commands.devices import usable_gpus
from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import locked
from nnunetv2_misfm.plans.network_entry import NETWORKS, PLAIN_UNET, UNET_ARGUMENTS, UNET_CLASSES, architecture_entry
from nnunetv2_misfm.transfer.arrays import changed_since, check_data_unchanged
from nnunetv2_misfm.transfer.images import change_spacing
from nnunetv2_misfm.transfer.memory_target import MemoryBudget, MisFMPlanner

DATASET = "Dataset004_Small"


def plans(nnunet: Path, name: str = "nnUNetMisFMPlans") -> dict:
    return json.loads((nnunet / "nnUNet_preprocessed" / DATASET / f"{name}.json").read_text(encoding="utf-8"))


def save_pctnet(path: Path, training: dict | None = None) -> None:
    arguments = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 16, 32]}
    preprocessing = {"normalization_schemes": ["ZScoreNormalization"], "patch_size": [8, 32, 32], "spacing": [2, 2, 2]}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, preprocessing, training or {})
    weights = PCTNet(1, 5, **arguments).state_dict()  # type: ignore[arg-type]
    write_checkpoint({"network_weights": weights}, info, path)


def save_unet(path: Path, conv: type = torch.nn.Conv3d, residual: bool = False) -> None:
    """A checkpoint of weights alone of a small U-Net of nnU-Net's."""
    kind = ResidualEncoderUNet if residual else PlainConvUNet
    strides = [[1] * 3, [2] * 3] if conv is torch.nn.Conv3d else [[1] * 2, [2] * 2]
    norm = torch.nn.InstanceNorm3d if conv is torch.nn.Conv3d else torch.nn.InstanceNorm2d
    network = kind(
        1, 2, [4, 8], conv, 3, strides, 1, 3, 1, True, norm, {"eps": 1e-5, "affine": True}, nonlin=torch.nn.LeakyReLU
    )
    torch.save({"state_dict": network.state_dict()}, path)


def network_of(architecture: dict) -> torch.nn.Module:
    names = ("network_class_name", "arch_kwargs", "_kw_requires_import")
    return get_network_from_plans(*(architecture[name] for name in names), 1, 3)


@pytest.mark.parametrize(("epochs", "few"), [(30, True), (200, False), ("?", False)])
def test_weights_of_a_pretraining_too_short_for_its_task_are_told(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int | str, few: bool
) -> None:
    save_pctnet(tmp_path / "c.pth", {"epochs_done": epochs, "num_iterations_per_epoch": 50})
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    assert ("Note: 1,500 iterations of volume_fusion are few" in capsys.readouterr().out) == few


def test_the_network_of_a_foreign_checkpoint_can_be_trained(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_unet(tmp_path / "c.pt", residual=True)
    command = ["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp"]
    with pytest.raises(SystemExit):
        plan_main(command)
    refused = capsys.readouterr().err
    assert "nnUNetv2_plan_experiment -d 4 -pl nnUNetPlannerResEncL" in refused and "-network pretrained" in refused
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "--no_pp", "-network", "pretrained"])
    assert "Name one with -pretrained_weights" in capsys.readouterr().err
    plan_main([*command, "-network", "pretrained"])
    entry = plans(nnunet)["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"].endswith("ResidualEncoderUNet")
    assert entry["arch_kwargs"]["features_per_stage"] == [4, 8]
    assert "the weights give 100 % of stem, encoder, decoder" in capsys.readouterr().out


def test_a_foreign_file_cannot_name_what_is_called(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_unet(tmp_path / "c.pt")
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    arguments = {"nonlin": "os.system", "nonlin_kwargs": {"command": "true"}}
    configuration = {"architecture": {"network_class_name": "x", "arch_kwargs": arguments}, "spacing": [1, 1, 1]}
    content["init_args"] = {"plans": {"configurations": {"c": configuration}}, "configuration": "c"}
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp", "-network", "pretrained"])
    assert "names 'os.system' as nonlin, which is no layer" in capsys.readouterr().err
    # To find out, no module is imported that a file from elsewhere names.
    arguments["nonlin"] = "this.s"
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp", "-network", "pretrained"])
    assert "names 'this.s' as nonlin, which is no layer" in capsys.readouterr().err and "this" not in sys.modules


def test_activations_other_than_those_of_the_weights_are_said(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = json.loads((nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json").read_text(encoding="utf-8"))
    network = network_of(own["configurations"]["3d_fullres"]["architecture"])
    arguments = own["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    made_by = {"plans": own, "configuration": "3d_fullres", "dataset_json": {"channel_names": {"0": "MRI"}}}
    for changed, said in (({}, False), ({"nonlin": "torch.nn.GELU", "nonlin_kwargs": {}, "nonlin_first": True}, True)):
        arguments |= changed
        torch.save({"network_weights": network.state_dict(), "init_args": made_by}, tmp_path / "c.pt")
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp"])
        trained = "was trained with nonlin torch.nn.GELU, nonlin_first True; this one has nonlin torch.nn.LeakyReLU"
        assert (trained in capsys.readouterr().out) is said


def test_numbers_of_numpy_in_a_foreign_file_are_plain_in_the_plans(nnunet: Path, tmp_path: Path) -> None:
    own = json.loads((nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json").read_text(encoding="utf-8"))
    entry = own["configurations"]["3d_fullres"]
    network = network_of(entry["architecture"])
    entry["patch_size"], entry["spacing"] = [np.int64(n) for n in entry["patch_size"]], list(np.float32([1, 1, 1]))
    made_by = {"plans": own, "configuration": "3d_fullres", "dataset_json": {"channel_names": {"0": "MRI"}}}
    torch.save({"network_weights": network.state_dict(), "init_args": made_by}, tmp_path / "c.pt")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp"])
    assert plans(nnunet)["pretrain_info"]["pt_used_patchsize"] == [24, 32, 24]
    export_main(["-i", str(tmp_path / "c.pt"), "-o", str(tmp_path / "card")])
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "-network pretrained" in card and "MIS-FM" not in card and "volume-fusion" not in card


def test_an_encoder_that_stays_random_is_refused(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pctnet(tmp_path / "c.pth")
    for words, said in (
        ([], "which is random without weights"),
        (["-pretrained_weights", str(tmp_path / "c.pth"), "--from_scratch"], "which is random without weights"),
        (
            ["-pretrained_weights", str(tmp_path / "c.pth"), "-features_per_stage", "8", "4", "8", "16", "32"]
            + ["-min_coverage", "0.1"],
            "of its parameters would be random, such as encoder.",
        ),
    ):
        with pytest.raises(SystemExit):
            plan_main(["-d", "4", "--no_pp", "-schedule", "decoder_only", *words])
        assert said in capsys.readouterr().err
    plan_main(["-d", "4", "--no_pp", "-schedule", "decoder_only", "-pretrained_weights", str(tmp_path / "c.pth")])
    assert plans(nnunet)["misfm"]["schedule"] == "decoder_only"


def test_a_configuration_that_stays_and_does_not_fit_other_weights_is_named(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pctnet(tmp_path / "c.pth")
    save_unet(tmp_path / "u.pt")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    path = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetMisFMPlans.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["configurations"]["3d_lowres"] = written["configurations"]["3d_fullres"]
    path.write_text(json.dumps(written), encoding="utf-8")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    assert "cannot start from these weights" not in capsys.readouterr().out
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "u.pt"), "--no_pp", "-network", "pretrained"])
    assert "3d_lowres, which stays, cannot start from these weights" in capsys.readouterr().out


def test_a_2d_checkpoint_is_refused(nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_unet(tmp_path / "c.pt", conv=torch.nn.Conv2d)
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp", "-min_coverage", "0"])
    assert "holds a 2D PlainConvUNet" in capsys.readouterr().err


def test_without_weights_the_plan_trains_from_scratch(nnunet: Path) -> None:
    plan_main(["-d", "4", "-num_epochs", "7", "-initial_lr", "0.01"])
    written = plans(nnunet)
    assert written["pretrain_info"]["checkpoint_path"] is None
    assert (written["misfm"]["num_epochs"], written["misfm"]["initial_lr"], written["misfm"]["schedule"]) == (
        7,
        0.01,
        "poly",
    )
    assert list(written["configurations"]) == ["3d_fullres"]
    entry = written["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"] == "nnunetv2_misfm.architectures.PCTNet"


def test_the_network_of_the_plan_can_be_kept(nnunet: Path) -> None:
    plan_main(["-d", "4", "-network", "plan", "--no_pp"])
    entry = plans(nnunet)["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"].endswith("PlainConvUNet")


@pytest.mark.parametrize(
    ("gigabytes", "median", "patch", "checkpointing"),
    [
        # The whole image, at a multiple of what the network divides, as nnU-Net plans it; 5 % of all voxels is one.
        ("100", None, [32, 32, 32], "auto"),
        ("0.75", None, [32, 32, 32], "on"),
        # A large image in thick slices.
        ("100", [40, 200, 180], [48, 224, 192], "auto"),
        ("2", [40, 200, 180], [32, 128, 128], "on"),
    ],
)
def test_a_memory_target_chooses_patch_and_checkpointing(
    nnunet: Path,
    gigabytes: str,
    median: list[int] | None,
    patch: list[int],
    checkpointing: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    base = json.loads(path.read_text(encoding="utf-8"))
    if median is not None:
        base["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = median
    path.write_text(json.dumps(base), encoding="utf-8")
    plan_main(["-d", "4", "-gpu_memory_target", gigabytes, "--no_pp"])
    written = plans(nnunet)
    entry = written["configurations"]["3d_fullres"]
    assert (entry["patch_size"], entry["batch_size"]) == (patch, 2)
    assert written["misfm"]["checkpointing"] == checkpointing
    assert f"of {gigabytes} GB" in capsys.readouterr().out


def test_a_memory_target_needs_what_nnunets_planner_reads(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nnunet / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json").unlink()
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-gpu_memory_target", "8", "--no_pp"])
    assert f"does not exist. Run nnUNetv2_extract_fingerprint -d {DATASET}" in capsys.readouterr().err


def test_a_memory_target_of_a_network_without_checkpointing(nnunet: Path) -> None:
    asked = ["-network", "plan", "-checkpointing", "on", "-gpu_memory_target", "8"]
    plan_main(["-d", "4", *asked, "--no_pp"])
    assert plans(nnunet)["misfm"]["checkpointing"] == "on"  # the trainer says that this network has none


def test_a_memory_target_leaves_what_the_augmentation_needs() -> None:
    """4 slices, which nnU-Net blurs, for a network that pools in plane only."""
    arguments = {
        **UNET_ARGUMENTS,
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3]] * 3,
        "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]],
        "n_conv_per_stage": [1] * 3,
        "n_conv_per_stage_decoder": [1] * 2,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    }
    network = {"network_class_name": PLAIN_UNET, "arch_kwargs": arguments, "_kw_requires_import": list(UNET_CLASSES)}
    budget = MemoryBudget(0.03, network, 1, 3, "auto")
    entry = {"patch_size": [4, 64, 64], "batch_size": 2, "median_image_size_in_voxels": [3, 200, 200]}
    budget.shrink_to_fit(entry)
    assert entry["patch_size"][0] == 4 and budget.needed(entry) <= 0.03


@pytest.mark.slow
def test_the_batch_grows_into_the_memory_and_is_limited_by_the_dataset(nnunet: Path) -> None:
    budget = MemoryBudget(4.0, architecture_entry("pctnet", 0, features_per_stage=[4, 8, 16, 32, 64]), 1, 3, "auto")
    planner = MisFMPlanner(DATASET, budget)
    planner.dataset_json["numTraining"] = 600
    entry = plans(nnunet, "nnUNetPlans")["configurations"]["3d_fullres"]
    limited = planner.sizes_for(entry)["batch_size"]
    assert limited == 17  # 5 % of 600 images of 24x30x26 voxels, in patches of 32x32x32
    budget.gigabytes = 0.2
    assert 2 <= planner.sizes_for(entry)["batch_size"] < limited
    assert budget.needed(planner.sizes_for(entry)) <= 0.2


def test_a_memory_target_leaves_fmunet_more_than_one_voxel(nnunet: Path) -> None:
    path = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    small = json.loads(path.read_text(encoding="utf-8"))
    small["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [12, 14, 16]
    path.write_text(json.dumps(small), encoding="utf-8")
    plan_main(["-d", "4", "-network", "fmunet", "-gpu_memory_target", "8", "--no_pp"])
    assert plans(nnunet)["configurations"]["3d_fullres"]["patch_size"] == [16, 16, 32]


def test_a_link_to_nothing_beside_the_plans_is_no_plans_file(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nnunet / "nnUNet_preprocessed" / DATASET / "gone.json").symlink_to("nowhere.json")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-p", "Nope"])
    assert "Choose others with -p (nnUNetPlans), or" in capsys.readouterr().err


def test_running_it_again_does_not_preprocess_again(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["-d", "4"])
    plan_main(["-d", "4", "-num_epochs", "3"])
    out = capsys.readouterr().out
    assert "shares the arrays" in out and "is up to date" in out
    assert ("add -device cpu" in out) is (usable_gpus() == 0)


def test_what_a_killed_run_left_is_removed_and_never_taken_for_the_data(nnunet: Path) -> None:
    folder = nnunet / "nnUNet_preprocessed" / DATASET
    left = folder / ".nnUNetMisFMPlans_3d_fullres.0123.tmp"
    left.mkdir()
    (left / "case_0.b2nd").write_bytes(b"half")
    left.with_name(f"{left.name}.json").write_text("{}", encoding="utf-8")
    plan_main(["-d", "4", "-spacing", "1.2", "1.2", "1.2", "-np", "1"])
    assert [path.name for path in folder.iterdir() if ".tmp" in path.name] == []
    made = {path.name for path in (folder / "nnUNetMisFMPlans_3d_fullres").iterdir()}
    assert made == {path.name for path in (folder / "nnUNetPlans_3d_fullres").iterdir()}


def test_data_that_another_process_provides_is_left_to_it(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nnunet / "nnUNet_preprocessed" / DATASET
    with locked(folder / ".nnUNetMisFMPlans_3d_fullres.lock", 0.0, ""), pytest.raises(SystemExit):
        plan_main(["-d", "4"])
    assert "another process provides this data" in capsys.readouterr().err
    assert not (folder / "nnUNetMisFMPlans_3d_fullres").exists()


def test_data_is_provided_again_when_its_source_has_changed(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["-d", "4"])
    folder = nnunet / "nnUNet_preprocessed" / DATASET
    stock, ours = folder / "nnUNetPlans_3d_fullres", folder / "nnUNetMisFMPlans_3d_fullres"
    changed = (stock / "case_0_seg.b2nd").read_bytes()
    (stock / "case_0_seg.b2nd").unlink()
    (stock / "case_0_seg.b2nd").write_bytes(changed)  # a new file, as when nnU-Net preprocesses again
    (ours / "case_1.b2nd").unlink()
    plan_main(["-d", "4"])
    assert "up to date" not in capsys.readouterr().out
    assert (ours / "case_1.b2nd").is_file()
    assert (ours / "case_0_seg.b2nd").stat().st_ino == (stock / "case_0_seg.b2nd").stat().st_ino


def test_arrays_of_labels_that_were_corrected_are_not_shared(nnunet: Path) -> None:
    plan_main(["-d", "4"])
    folder, label = nnunet / "nnUNet_preprocessed" / DATASET, "case_0.nii.gz"
    image = sitk.ReadImage(str(folder / "gt_segmentations" / label))
    corrected = sitk.GetArrayFromImage(image)
    corrected[corrected == 1] = 2
    new = sitk.GetImageFromArray(corrected)
    new.CopyInformation(image)
    for labels in (folder / "gt_segmentations", nnunet / "nnUNet_raw" / DATASET / "labelsTr"):
        sitk.WriteImage(new, str(labels / label))
    # nnU-Net's arrays are as they were: only another configuration was preprocessed again.
    ours = folder / "nnUNetMisFMPlans_3d_fullres"
    assert changed_since(ours).labels == [label]
    plan_main(["-d", "4", "-np", "1"])
    assert not changed_since(ours).labels
    assert set(np.unique(blosc2.open(str(ours / "case_0_seg.b2nd"))[:])) == {0, 2}


@pytest.mark.parametrize("own_arrays", [False, True])
def test_corrected_images_and_withdrawn_cases_are_not_trained_on(
    nnunet: Path, own_arrays: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which nnU-Net has preprocessed anew, or which are corrected in the raw dataset alone."""
    again = ["-d", "4", "-np", "1", *(["-spacing", "1.2", "1.2", "1.2"] if own_arrays else [])]
    plan_main(again)
    capsys.readouterr()
    folder = nnunet / "nnUNet_preprocessed" / DATASET
    ours, raw = folder / "nnUNetMisFMPlans_3d_fullres", nnunet / "nnUNet_raw" / DATASET / "imagesTr"
    check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    image, array = raw / "case_0_0000.nii.gz", folder / "nnUNetPlans_3d_fullres" / "case_0.b2nd"
    source = image if own_arrays else array
    place = raw.parent if own_arrays else array.parent
    content = source.read_bytes()
    source.unlink()
    source.write_bytes(content)  # a copy has another time
    check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    # nnU-Net compresses arrays, so that others have other sizes; corrected images may be as long as those before.
    source.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if own_arrays else content + b" ")
    with pytest.raises(PlanError, match=rf"other files than .*{place.name} holds now \(.*{source.name}\)"):
        check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    if own_arrays:
        # The first remedy helps: what has changed is preprocessed.
        source.write_bytes(content)
        brighter = sitk.ReadImage(str(source)) + 3
        sitk.WriteImage(brighter, str(source))
        plan_main(again)
        check_data_unchanged(ours, plans(nnunet), "3d_fullres")
        assert "was preprocessed" in capsys.readouterr().out
        plan_main(again)
        assert "is up to date" in capsys.readouterr().out
    source.unlink()
    with pytest.raises(PlanError, match=f"{source.name}.*Repeat the misfm_plan that made nnUNetMisFMPlans"):
        check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    with pytest.raises(PlanError, match="is not there.*nnUNetv2_preprocess -d .* -plans_name Others -c 3d_fullres"):
        check_data_unchanged(folder / "Others_3d_fullres", {"plans_name": "Others"}, "3d_fullres")


def test_arrays_of_another_preprocessing_are_not_trained_on(
    nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plans that were replaced and not preprocessed: by --no_pp, or because the raw dataset is away."""
    again = ["-d", "4", "-np", "1", "-spacing", "1.2", "1.2", "1.2"]
    plan_main(again)
    ours = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetMisFMPlans_3d_fullres"
    check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    other = ["-d", "4", "-np", "1", "-spacing", "1.4", "1.4", "1.4"]
    plan_main([*other, "--no_pp"])
    told = r"by other plans than nnUNetMisFMPlans are now \(spacing was \[1.2, 1.2, 1.2\], is \[1.4, 1.4, 1.4\]"
    with pytest.raises(PlanError, match=told):
        check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("nnUNet_raw", str(tmp_path))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            plan_main(other)
        assert "has to be preprocessed" in capsys.readouterr().err
    with pytest.raises(PlanError, match=told):
        check_data_unchanged(ours, plans(nnunet), "3d_fullres")
    plan_main(other)  # the remedy helps
    check_data_unchanged(ours, plans(nnunet), "3d_fullres")


def test_a_copy_of_the_preprocessed_data_is_up_to_date(
    nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cp -r` keeps no times, and makes two files of hard links."""
    options = (["-overwrite_plans_name", "Linked"], ["-overwrite_plans_name", "Own", "-spacing", "1.2", "1.2", "1.2"])
    for more in options:
        plan_main(["-d", "4", "-np", "1", *more])
    copied = tmp_path / "copied"
    for path in (nnunet / "nnUNet_preprocessed").rglob("*"):
        if path.is_file():
            target = copied / path.relative_to(nnunet / "nnUNet_preprocessed")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    monkeypatch.setenv("nnUNet_preprocessed", str(copied))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "elsewhere"))
    capsys.readouterr()
    for more in options:
        plan_main(["-d", "4", "-np", "1", *more])
    assert capsys.readouterr().out.count("is up to date") == 2


def test_without_preprocessing_the_command_that_does_it_is_named(
    nnunet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_main(["-d", "4", "--no_pp"])
    assert "nnUNetv2_preprocess -d 4 -plans_name nnUNetMisFMPlans -c 3d_fullres\n" in capsys.readouterr().out


def test_plans_for_other_channels_are_refused(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"] |= {"normalization_schemes": ["ZScoreNormalization"] * 2}
    path.write_text(json.dumps(plans), encoding="utf-8")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4"])
    assert "has 2 normalization_schemes, but" in capsys.readouterr().err
    assert not path.with_name("nnUNetMisFMPlans.json").exists()


def test_replacing_plans_says_what_changes(nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pctnet(tmp_path / "c.pth")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    path = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetMisFMPlans.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["pretrain_info"]["checkpoint_path"] = "somewhere/else.pth"
    path.write_text(json.dumps(written), encoding="utf-8")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    assert "weights: " not in capsys.readouterr().out  # the same file in another place
    written["pretrain_info"] |= {"checkpoint_path": "somewhere/else.pth", "sha256": 64 * "0"}
    written["configurations"]["3d_lowres"] = written["configurations"]["3d_fullres"]
    path.write_text(json.dumps(written), encoding="utf-8")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "-batch_size", "5", "--no_pp"])
    out = capsys.readouterr().out
    assert "weights: somewhere/else.pth becomes" in out and "also had 3d_lowres" in out
    assert "3d_fullres: batch_size 2 becomes 5" in out and "patch_size" not in out
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "-num_epochs", "7", "--no_pp"])
    assert "3d_fullres: num_epochs 1000 becomes 7" in capsys.readouterr().out


def test_a_configuration_planned_before_keeps_what_its_data_say(
    nnunet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The window of CT and the settings of the run are one for all configurations of a plans file."""
    path = nnunet / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    base = json.loads(path.read_text(encoding="utf-8"))
    configurations = base["configurations"]
    configurations["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    configurations["3d_lowres"] = {**configurations["3d_fullres"], "data_identifier": "nnUNetPlans_3d_lowres"}
    path.write_text(json.dumps(base), encoding="utf-8")
    plan_main(["-d", "4", "-c", "3d_lowres", "--no_pp"])
    plan_main(["-d", "4", "-c", "3d_fullres", "-num_epochs", "7", "--no_pp"])
    assert "3d_lowres: num_epochs 1000 becomes 7" in capsys.readouterr().out
    base["foreground_intensity_properties_per_channel"]["0"]["percentile_99_5"] = 300.0
    path.write_text(json.dumps(base), encoding="utf-8")
    before = plans(nnunet)
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-c", "3d_fullres", "--no_pp"])
    refused = capsys.readouterr().err
    assert "also has 3d_lowres, whose arrays would no longer be what the plans say: ct_intensities" in refused
    assert plans(nnunet) == before
    plan_main(["-d", "4", "-c", "3d_fullres", "3d_lowres", "--no_pp"])
    assert plans(nnunet)["configurations"].keys() == {"3d_fullres", "3d_lowres"}


@pytest.mark.parametrize("identifier", [None, "Mine_3d"])
def test_an_added_configuration_changes_with_the_one_that_it_inherits_from(
    nnunet: Path, capsys: pytest.CaptureFixture[str], identifier: str | None
) -> None:
    """But not if it has arrays of its own, which are not made anew."""
    plan_main(["-d", "4", "--no_pp"])
    folder = nnunet / "nnUNet_preprocessed" / DATASET
    own = {"inherits_from": "3d_fullres", "batch_size": 3} | ({"data_identifier": identifier} if identifier else {})
    made, base = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetMisFMPlans", "nnUNetPlans"))
    made["configurations"]["mine"] = own
    base["image_reader_writer"] = "NibabelIOWithReorient"
    for name, content in (("nnUNetMisFMPlans", made), ("nnUNetPlans", base)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    if identifier is None:
        plan_main(["-d", "4", "--no_pp"])
        assert "mine: image_reader_writer SimpleITKIO becomes NibabelIOWithReorient" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit):
            plan_main(["-d", "4", "--no_pp"])
        refused = capsys.readouterr().err
        assert "also has mine, whose arrays" in refused and "Choose another -overwrite_plans_name" in refused


def test_the_stages_of_a_planned_unet_cannot_be_chosen(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_unet(tmp_path / "c.pt")
    command = ["-d", "4", "-pretrained_weights", str(tmp_path / "c.pt"), "--no_pp"]
    with pytest.raises(SystemExit):
        plan_main([*command, "-features_per_stage", "4", "8", "16", "32", "64"])
    assert "PlainConvUNet, whose stages are as in the dataset's plans" in capsys.readouterr().err


def test_plans_with_weights_are_not_replaced_by_plans_without(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pctnet(tmp_path / "c.pth")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    before = plans(nnunet)
    names = ["-overwrite_plans_name", "nnUNetMisFMPlans"]
    for without in ([], ["-pretrained_weights", str(tmp_path / "c.pth"), "--from_scratch", *names]):
        with pytest.raises(SystemExit):
            plan_main(["-d", "4", "--no_pp", *without])
        assert "Give -pretrained_weights without --from_scratch, or another" in capsys.readouterr().err
        assert plans(nnunet) == before


@pytest.mark.parametrize("left_out", ["decoder.seg_layers.", "decoder."])
def test_features_of_a_pctnet_without_a_head_plan_a_pctnet(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left_out: str
) -> None:
    """Weights as people give them away: those that nobody else has a use for are left out."""
    arguments = {"strides": strides_of(0), "features_per_stage": [4, 8, 16, 32, 64]}
    weights = PCTNet(1, 5, **arguments).state_dict()  # type: ignore[arg-type]
    kept = {name: value for name, value in weights.items() if not name.startswith(left_out)}
    torch.save({"state_dict": kept}, tmp_path / "c.pth")
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "--no_pp"])
    parts = "stem, encoder, decoder" if left_out.endswith("layers.") else "stem, encoder"
    assert f"the weights give 100 % of {parts} (" in capsys.readouterr().out
    architecture = plans(nnunet)["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"] == NETWORKS["pctnet"]
    assert architecture["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 32, 64]


def test_a_network_of_this_package_is_not_taken_for_that_of_the_plans(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pctnet(tmp_path / "c.pth")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "-network", "plan", "--no_pp"])
    assert "the dataset's plans name a PlainConvUNet. Leave -network out" in capsys.readouterr().err


def test_a_checkpoint_that_names_no_network_asks_for_the_plans(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"network_weights": {"a": torch.zeros(1)}}, tmp_path / "stock.pth")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "stock.pth")])
    assert "-network plan" in capsys.readouterr().err


def test_the_spacing_can_be_the_checkpoints_or_any(nnunet: Path, tmp_path: Path) -> None:
    save_pctnet(tmp_path / "c.pth")
    stock = plans(nnunet, "nnUNetPlans")["configurations"]["3d_fullres"]
    plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "c.pth"), "-spacing", "pretrained", "--no_pp"])
    ours = plans(nnunet)["configurations"]["3d_fullres"]
    assert ours["spacing"] == [2, 2, 2] and ours["data_identifier"] != stock["data_identifier"]
    assert ours["median_image_size_in_voxels"] == [
        n * mm / 2 for n, mm in zip(stock["median_image_size_in_voxels"], stock["spacing"], strict=True)
    ]
    assert all(
        n <= -(-m // 8) * 8 for n, m in zip(ours["patch_size"], ours["median_image_size_in_voxels"], strict=True)
    )
    plan_main(["-d", "4", "-spacing", "8", "1", "1", "-overwrite_plans_name", "Thick", "--no_pp"])
    anisotropic = plans(nnunet, "Thick")["configurations"]["3d_fullres"]
    assert anisotropic["architecture"]["arch_kwargs"]["strides"] == strides_of(2)


@pytest.mark.parametrize(("spacing", "turned"), [([1.0, 1.0, 8.0], True), ([9.0, 2.0, 2.0], False), ([2.0] * 3, False)])
def test_thick_slices_along_another_axis_than_before_are_named(spacing: list[float], turned: bool) -> None:
    entry = {"spacing": [8.0, 1.0, 1.0], "patch_size": [8, 64, 64]}
    assert ("thick along axis 0, but 2 is the coarse one now" in change_spacing(entry, spacing)) == turned


def test_plans_with_the_same_preprocessing_share_its_arrays(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as those of the baseline; images that came later are in no arrays yet."""
    words = ["-d", "4", "-spacing", "2", "2", "2", "-np", "1"]
    plan_main([*words, "-overwrite_plans_name", "First"])
    assert "First_3d_fullres was preprocessed" in capsys.readouterr().out
    plan_main([*words, "-overwrite_plans_name", "Second", "-patch_size", "16", "16", "16"])
    assert "Second_3d_fullres shares the arrays of First_3d_fullres (hard links" in capsys.readouterr().out
    image, other = sorted((nnunet / "nnUNet_raw" / DATASET / "imagesTr").iterdir())[:2]
    os.utime(other, (1e9, 1e9))
    shutil.copy2(other, image)  # with its old date
    plan_main([*words, "-overwrite_plans_name", "Third"])
    assert "Third_3d_fullres was preprocessed" in capsys.readouterr().out
    plan_main([*words, "-overwrite_plans_name", "Fourth"])
    assert "Fourth_3d_fullres shares the arrays of Third_3d_fullres" in capsys.readouterr().out
    plan_main([*words[:2], "-spacing", "3", "3", "3", "-np", "1", "-overwrite_plans_name", "Other"])
    assert "Other_3d_fullres was preprocessed" in capsys.readouterr().out


def test_arrays_that_cannot_be_linked_are_called_copies(
    nnunet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second plans link those of the first, which are on their disk."""
    link, plans_folder = os.link, nnunet / "nnUNet_preprocessed" / DATASET

    def within_a_disk(source: Path, target: Path) -> None:
        if Path(source).parent.name == "nnUNetPlans_3d_fullres":
            raise OSError("another disk")
        link(source, target)

    monkeypatch.setattr("os.link", within_a_disk)
    plan_main(["-d", "4", "-overwrite_plans_name", "First"])
    assert "shares the arrays of nnUNetPlans_3d_fullres (copied: another disk" in capsys.readouterr().out
    plan_main(["-d", "4", "-overwrite_plans_name", "Second"])
    assert "shares the arrays of First_3d_fullres (hard links" in capsys.readouterr().out
    assert next((plans_folder / "Second_3d_fullres").glob("*.b2nd")).stat().st_nlink == 2


def test_changed_spacing_is_preprocessed_anew(nnunet: Path) -> None:
    plan_main(["-d", "4", "-spacing", "2", "2", "2", "-np", "1"])
    folder = nnunet / "nnUNet_preprocessed" / DATASET
    assert blosc2.open(str(folder / "nnUNetMisFMPlans_3d_fullres" / "case_0.b2nd")).shape == (1, 12, 15, 13)
    assert blosc2.open(str(folder / "nnUNetPlans_3d_fullres" / "case_0.b2nd")).shape == (1, 24, 30, 26)
