"""The right data, and commands that run: copied and older plans, few cases, pools, cascades, kept configurations."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_dataset import CASES, NAME, plans
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, read_checkpoint, write_checkpoint
from nnunetv2_misfm.commands.checkpoints import inspect_main as misfm_inspect
from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.start_up import add_plugin_folder

CPU = torch.device("cpu")
SHORT = ["-num_epochs", "1", "-num_iterations_per_epoch", "1", "-num_val_iterations_per_epoch", "1"]
SMALL_PATCH = ["-patch_size", "16", "16", "16"]
TINY = [*SHORT, "-features_per_stage", "4", "4", "8", "16", "32"]
OTHER = "Dataset061_Other"


@pytest.fixture
def folder(nnunet: Path) -> Path:
    """The dataset in nnUNet_preprocessed."""
    add_plugin_folder()
    return nnunet / "nnUNet_preprocessed" / NAME


@pytest.fixture
def other(folder: Path) -> Path:
    """Another dataset, whose plans were copied from the first."""
    copied = folder.with_name(OTHER)
    shutil.copytree(folder, copied)
    shutil.copytree(folder.parents[1] / "nnUNet_raw" / NAME, folder.parents[1] / "nnUNet_raw" / OTHER)
    for root in (copied, folder.parents[1] / "nnUNet_raw" / OTHER):
        edit(root / "dataset.json", lambda content: content.update(description="the other one"))
    return copied


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def trainer(
    dataset: str, plans_name: str = "nnUNetMisFMPlans", configuration: str = "3d_fullres", fold: Any = 0
) -> Any:
    return get_trainer_from_args(dataset, configuration, fold, "MisFMTrainer", plans_name, False, CPU)


def refused(capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command([*arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def save_pctnet(path: Path, **preprocessing: Any) -> str:
    arguments = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 16, 32]}
    described = {"normalization_schemes": ["ZScoreNormalization"], "patch_size": [8, 32, 32], "spacing": [2, 2, 2]}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, {**described, **preprocessing}, {})
    weights = PCTNet(1, 5, **arguments).state_dict()  # type: ignore[arg-type]
    write_checkpoint({"network_weights": weights}, info, path)
    return str(path)


# ---------------------------------------------------------------- plans of another dataset


@pytest.mark.parametrize("target", [[], ["-gpu_memory_target", "4"]], ids=["plain", "memory target"])
def test_copied_plans_become_plans_of_the_dataset_that_was_asked_for(
    folder: Path, other: Path, capsys: pytest.CaptureFixture[str], target: list[str]
) -> None:
    misfm_plan(["-d", "61", *TINY, *target])
    assert f"names another dataset, {NAME}; {OTHER} is used" in capsys.readouterr().out
    assert read(other / "nnUNetMisFMPlans.json")["dataset_name"] == OTHER
    assert not (folder / "nnUNetMisFMPlans.json").exists()
    run = trainer("61")
    assert OTHER in run.output_folder and OTHER in run.preprocessed_dataset_folder


def test_copied_plans_are_named_when_pretraining_and_inspecting(
    folder: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    misfm_pretrain(["-d", "61", "-device", "cpu", "--only_prepare", *TINY])
    misfm_inspect([save_pctnet(tmp_path / "c.pth"), "-d", "61"])
    out = capsys.readouterr().out
    assert out.count("names another dataset") == 2 and f"Transfer to {OTHER}" in out
    assert read(other / "nnUNetMisFMPretrainPlans.json")["dataset_name"] == OTHER


@pytest.mark.parametrize("name", ["MisFMTrainer", "VolumeFusionTrainer"])
def test_a_trainer_does_not_train_on_the_dataset_that_copied_plans_name(folder: Path, other: Path, name: str) -> None:
    fold = "all" if name == "VolumeFusionTrainer" else 0
    with pytest.raises(PlanError, match=f"{OTHER}/nnUNetPlans.json names another dataset, {NAME}"):
        get_trainer_from_args("61", "3d_fullres", fold, name, "nnUNetPlans", False, CPU)
    assert not list((folder.parents[1] / "nnUNet_results").iterdir())
    get_trainer_from_args("4", "3d_fullres", fold, name, "nnUNetPlans", False, CPU)


def test_a_copy_of_a_dataset_does_not_keep_the_dataset_from_training(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnUNetv2_train's command line says which of the two was asked for."""
    shutil.copy(folder / "dataset.json", other)
    for asked_for in ("4", "004", NAME):
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", asked_for, "3d_fullres", "0"])
        get_trainer_from_args(asked_for, "3d_fullres", 0, "MisFMTrainer", "nnUNetPlans", False, CPU)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "61", "3d_fullres", "4"])
    with pytest.raises(PlanError, match="names another dataset"):
        get_trainer_from_args("61", "3d_fullres", 0, "MisFMTrainer", "nnUNetPlans", False, CPU)


# ---------------------------------------------------------------- plans and arrays of earlier versions


def as_before_2_4(content: dict[str, Any]) -> None:
    """Describe the networks as nnU-Net 2.0 did, and name the intensities as its first release."""
    for configuration in content["configurations"].values():
        arguments = configuration.pop("architecture")["arch_kwargs"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 32,
            "unet_max_num_features": 320,
            "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
            "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
            "num_pool_per_axis": [3, 3, 3],
            "pool_op_kernel_sizes": arguments["strides"],
            "conv_kernel_sizes": arguments["kernel_sizes"],
        }
    intensities = content.pop("foreground_intensity_properties_per_channel")
    content["foreground_intensity_properties_by_modality"] = intensities


def test_plans_of_before_2_4_give_the_same_plans(folder: Path) -> None:
    misfm_plan(["-d", "4", "-network", "plan", "-overwrite_plans_name", "Now"])
    edit(folder / "nnUNetPlans.json", as_before_2_4)
    misfm_plan(["-d", "4", "-network", "plan", "-overwrite_plans_name", "Before"])
    now, before = (read(folder / f"{name}.json")["configurations"]["3d_fullres"] for name in ("Now", "Before"))
    assert before["architecture"] == now["architecture"]
    assert {path.name for path in (folder / "Before_3d_fullres").iterdir()} >= {f"{CASES[0]}.b2nd"}


def test_plans_of_before_2_4_are_trained_and_pretrained(folder: Path) -> None:
    edit(folder / "nnUNetPlans.json", as_before_2_4)
    misfm_pretrain(["-d", "4", "-device", "cpu", *TINY, *SMALL_PATCH])
    results = folder.parents[1] / "nnUNet_results" / NAME
    checkpoint = results / "VolumeFusionTrainer__nnUNetMisFMPretrainPlans__3d_fullres/fold_all/checkpoint_final.pth"
    assert checkpoint.is_file()
    misfm_plan(["-d", "4", *SHORT, *SMALL_PATCH, "-pretrained_weights", str(checkpoint)])
    trainer("4").run_training()
    run = trainer("4", "nnUNetPlans")  # trained as any ordinary plans are, once they can be initialised and described
    run.initialize()
    run.save_checkpoint(str(results / "checkpoint.pth"))
    assert isinstance(run.bare_network, PCTNet) and (results / "checkpoint.pth").is_file()


def test_plans_of_before_2_4_that_nnunet_cannot_translate_say_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "nnUNetPlans.json", as_before_2_4)
    edit(
        folder / "nnUNetPlans.json",
        lambda content: content["configurations"]["3d_fullres"].update(UNet_class_name="MyNet"),
    )
    assert "Unknown architecture MyNet" in refused(capsys, misfm_plan, "-d", "4")


def test_arrays_in_npz_files_are_shared_pretrained_and_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = folder / "nnUNetPlans_3d_fullres"
    for case in CASES:
        data, seg, _, properties = nnUNetDatasetBlosc2(str(stock), [case]).load_case(case)
        nnUNetDatasetNumpy.save_case(data[:], seg[:], properties, str(stock / case))
        (stock / f"{case}.b2nd").unlink()
        (stock / f"{case}_seg.b2nd").unlink()
    misfm_pretrain(["-d", "4", "-device", "cpu", *TINY, *SMALL_PATCH])
    misfm_plan(["-d", "4", *TINY, *SMALL_PATCH])
    assert "shares the arrays" in capsys.readouterr().out
    trainer("4").run_training()
    misfm_plan(["-d", "4", *TINY, *SMALL_PATCH])
    assert "is up to date" in capsys.readouterr().out


def test_a_configuration_that_is_not_used_may_be_incomplete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(
        folder / "nnUNetPlans.json", lambda content: content["configurations"]["2d"]["architecture"].pop("arch_kwargs")
    )
    misfm_plan(["-d", "4", "--no_pp"])
    misfm_pretrain(["-d", "4", "-device", "cpu", "--only_prepare", *TINY])
    edit(folder / "nnUNetPlans.json", lambda content: content["configurations"]["3d_fullres"].pop("spacing"))
    assert "configurations.3d_fullres.spacing" in refused(capsys, misfm_plan, "-d", "4", "--no_pp")


# ---------------------------------------------------------------- the commands that are printed


def printed_folds(out: str, configuration: str = "3d_fullres") -> list[str]:
    return re.findall(rf"nnUNetv2_train 4 {configuration} (\w+) -tr MisFMTrainer", out)


def test_the_fold_that_is_printed_can_be_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    misfm_plan(["-d", "4", *TINY])
    assert printed_folds(capsys.readouterr().out) == ["0"]
    for path in folder.glob("*/case_[3-9]*"):
        path.unlink()
    edit(folder / "dataset.json", lambda content: content.update(numTraining=3))
    misfm_plan(["-d", "4", *TINY])
    (fold,) = printed_folds(capsys.readouterr().out)
    trainer("4", fold=fold).run_training()
    (folder / "splits_final.json").write_text(json.dumps([{"train": CASES[:2], "val": CASES[2:3]}]), encoding="utf-8")
    misfm_plan(["-d", "4", *TINY])
    assert (fold, printed_folds(capsys.readouterr().out)) == ("all", ["0"])


def add_cascade(path: Path) -> None:
    content = plans()
    lowres = {
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [1.5, 1.5, 1.5],
        "next_stage": "3d_cascade_fullres",
    }
    content["configurations"] |= {
        "3d_lowres": {**content["configurations"]["3d_fullres"], **lowres},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def test_all_folds_of_a_first_stage_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_cascade(folder / "nnUNetPlans.json")
    misfm_plan(["-d", "4", "-c", "3d_lowres", "3d_cascade_fullres", "--no_pp"])
    out = capsys.readouterr().out
    assert printed_folds(out, "3d_lowres") == list("01234") and printed_folds(out, "3d_cascade_fullres") == ["0"]


def test_the_command_for_the_second_stage_of_a_cascade_plans_both(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_cascade(folder / "nnUNetPlans.json")
    misfm_inspect([save_pctnet(tmp_path / "c.pth"), "-d", "4", "-c", "3d_cascade_fullres"])
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:5] == ["misfm_plan", "-d", "4", "-c", "3d_lowres"]
    misfm_plan([*command[1:], "--no_pp"])
    assert read(folder / "nnUNetMisFMPlans.json")["configurations"].keys() >= {"3d_lowres", "3d_cascade_fullres"}


def test_stages_with_spacings_of_their_own_are_planned_one_after_the_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_cascade(folder / "nnUNetPlans.json")
    both = ["-d", "4", "-c", "3d_lowres", "3d_cascade_fullres", "-spacing", "1", "1", "1", "--no_pp"]
    assert "the same spacing" in refused(capsys, misfm_plan, *both)
    misfm_plan(["-d", "4", "-c", "3d_lowres", "-spacing", "2", "2", "2", "--no_pp"])
    misfm_plan(["-d", "4", "-c", "3d_cascade_fullres", "-spacing", "1", "1", "1", "--no_pp"])
    planned = read(folder / "nnUNetMisFMPlans.json")["configurations"]
    assert (planned["3d_lowres"]["spacing"], planned["3d_cascade_fullres"]["spacing"]) == ([2, 2, 2], [1, 1, 1])
    assert planned["3d_lowres"]["next_stage"] == ["3d_cascade_fullres"]


def test_a_first_stage_names_those_later_stages_alone_that_are_planned(folder: Path) -> None:
    add_cascade(folder / "nnUNetPlans.json")

    def another_stage(content: dict) -> None:
        content["configurations"]["3d_lowres"]["next_stage"] = ["3d_cascade_fullres", "3d_other"]

    edit(folder / "nnUNetPlans.json", another_stage)
    misfm_plan(["-d", "4", "-c", "3d_lowres", "3d_cascade_fullres", "--no_pp"])
    planned = read(folder / "nnUNetMisFMPlans.json")["configurations"]
    assert planned["3d_lowres"]["next_stage"] == ["3d_cascade_fullres"]
    misfm_plan(["-d", "4", "-c", "3d_lowres", "--no_pp", "-overwrite_plans_name", "FirstAlone"])
    assert "next_stage" not in read(folder / "FirstAlone.json")["configurations"]["3d_lowres"]


def test_a_cascade_is_refused_for_pretraining_before_there_is_a_results_folder(folder: Path) -> None:
    add_cascade(folder / "nnUNetPlans.json")
    with pytest.raises(PlanError, match="takes label channels"):
        get_trainer_from_args("4", "3d_cascade_fullres", "all", "VolumeFusionTrainer", "nnUNetPlans", False, CPU)
    assert not list((folder.parents[1] / "nnUNet_results").iterdir())


# ---------------------------------------------------------------- configurations added by hand


def test_configurations_that_were_added_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    misfm_plan(["-d", "4", *TINY])
    own = {"inherits_from": "3d_fullres", "batch_size": 3}
    edit(folder / "nnUNetMisFMPlans.json", lambda content: content["configurations"].update({"3d_batch_3": own}))
    misfm_plan(["-d", "4", *TINY, "-initial_lr", "0.002"])
    assert "also had 3d_batch_3, which stay as they are" in capsys.readouterr().out
    assert read(folder / "nnUNetMisFMPlans.json")["configurations"]["3d_batch_3"] == own
    run = trainer("4", configuration="3d_batch_3")
    assert (run.configuration_manager.batch_size, run.initial_lr) == (3, 0.002)
    message = refused(capsys, misfm_plan, "-d", "4", "-c", "3d_batch_3")
    assert "leave it out of -c" in message


def test_a_pretraining_by_a_configuration_that_inherits_is_saved(folder: Path, tmp_path: Path) -> None:
    misfm_pretrain(["-d", "4", "-device", "cpu", "--only_prepare", *SMALL_PATCH, *TINY])
    own = {"inherits_from": "3d_fullres", "batch_size": 3}
    plans = "nnUNetMisFMPretrainPlans"
    edit(folder / f"{plans}.json", lambda content: content["configurations"].update({"3d_batch_3": own}))
    run = get_trainer_from_args("4", "3d_batch_3", "all", "VolumeFusionTrainer", plans, False, CPU)
    run.initialize()
    run.save_checkpoint(str(tmp_path / "c.pth"))
    told = read_checkpoint(tmp_path / "c.pth")["nnssl_adaptation_plan"]
    planned = told["pretrain_plan"]["configurations"]["3d_batch_3"]
    assert planned["batch_size"] == 3 and planned["patch_size"] == told["recommended_downstream_patchsize"]


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0}, "no label besides the background"),
        ({"background": 0, "inner": 1, "outer": 3}, r"labels \[0, 1, 3\] are not consecutive.*Number them 0 to 2"),
        ({"background": 0, "inner": "one"}, "must be whole numbers"),
    ],
)
def test_labels_that_cannot_be_trained_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], labels: dict[str, Any], message: str
) -> None:
    edit(folder / "dataset.json", lambda content: content.update(labels=labels))
    assert re.search(message, refused(capsys, misfm_plan, "-d", "4"))
    with pytest.raises(PlanError, match=message):
        trainer("4", "nnUNetPlans")
    misfm_pretrain(["-d", "4", "-device", "cpu", "--only_prepare", *TINY])  # which never reads them


def test_regions_may_have_any_numbers(folder: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 4], "core": [4]}
    edit(folder / "dataset.json", lambda content: content.update(labels=labels, regions_class_order=[1, 4]))
    misfm_plan(["-d", "4", "--no_pp"])
    assert trainer("4").label_manager.foreground_regions == [(1, 2, 4), (4,)]


def test_a_pool_is_not_taken_for_a_labelled_dataset(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = nnunet / "nnUNet_raw" / NAME / "imagesTr" / "case_0_0000.nii.gz"
    pool = ["-i", str(scan.parent), "-d", "900", "-n", "Pool", "-np", "1", "-device", "cpu", "--only_prepare"]
    misfm_pretrain([*pool, *TINY])
    assert "volumes without labels are for misfm_pretrain" in refused(capsys, misfm_plan, "-d", "900")


def test_arrays_with_labels_that_were_corrected_since_are_not_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    misfm_plan(["-d", "4", *TINY, "-spacing", "1.2", "1.2", "1.2", "-np", "1"])
    label = folder / "gt_segmentations" / f"{CASES[0]}.nii.gz"
    label.touch()  # a copy of the dataset, say
    run = trainer("4")
    run.on_train_start()
    raw = folder.parents[1] / "nnUNet_raw" / NAME / "labelsTr"
    label.write_bytes((raw / f"{CASES[1]}.nii.gz").read_bytes())
    with pytest.raises(PlanError, match=rf"other labels.*{CASES[0]}.*nnUNetv2_preprocess"):
        trainer("4").on_train_start()
    run._was_loaded = True  # a run that goes on keeps its data, and says so
    run.my_init_kwargs = {"plans": run.plans_manager.plans}
    run._check_data()
    assert "goes on with the data it began with" in Path(run.log_file).read_text(encoding="utf-8")
    (raw / label.name).write_bytes(label.read_bytes())
    misfm_plan(["-d", "4", *TINY, "-spacing", "1.2", "1.2", "1.2", "-np", "1"])
    assert "was preprocessed" in capsys.readouterr().out
    trainer("4").on_train_start()


# ---------------------------------------------------------------- what used to pass in silence


def test_our_plans_are_not_trained_by_nnunets_own_trainer(folder: Path, tmp_path: Path) -> None:
    """It would leave out weights and settings without a word; the baseline's too."""
    checkpoint = save_pctnet(tmp_path / "c.pth")
    misfm_plan(["-d", "4", *SHORT, "-pretrained_weights", checkpoint])
    misfm_plan(["-d", "4", *SHORT, "-pretrained_weights", checkpoint, "--from_scratch"])
    # Plans are made from them as from any others.
    misfm_plan(["-d", "4", *SHORT, "-p", "nnUNetMisFMPlans", "-overwrite_plans_name", "Again"])
    for name in ("nnUNetMisFMPlans", "nnUNetMisFMScratchPlans", "Again"):
        forgotten = get_trainer_from_args("4", "3d_fullres", 0, "nnUNetTrainer", name, False, CPU)
        with pytest.raises(KeyError, match="-tr MisFMTrainer"):
            forgotten.initialize()
    run = trainer("4")
    run.run_training()
    kept = read(Path(run.output_folder).parent / "plans.json")
    assert kept["configurations"]["3d_fullres"]["architecture"]["_kw_requires_import"] == []


def test_another_order_of_the_axes_in_pretraining_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for order in ([2, 0, 1], [0, 1, 2]):
        checkpoint = save_pctnet(tmp_path / f"{order[0]}.pth", transpose_forward=order)
        misfm_plan(["-d", "4", "-pretrained_weights", checkpoint, "--no_pp"])
        assert ("in pretraining [2, 0, 1]" in capsys.readouterr().out) == (order == [2, 0, 1])


def test_three_slices_are_padded_to_what_the_augmentation_can_blur(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = {"patch_size": [3, 32, 24], "spacing": [8.0, 1.0, 1.0]}
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]]

    def as_planned_for_three_slices(content: dict[str, Any]) -> None:
        entry = content["configurations"]["3d_fullres"]
        entry.update(three)
        entry["architecture"]["arch_kwargs"]["strides"] = strides

    edit(folder / "nnUNetPlans.json", as_planned_for_three_slices)
    assert "Use -patch_size 4 32 24" in refused(capsys, misfm_plan, "-d", "4", "-patch_size", "3", "32", "24")
    misfm_plan(["-d", "4", *TINY, "--no_pp"])
    assert "cannot blur or scale fewer" in capsys.readouterr().out
    assert read(folder / "nnUNetMisFMPlans.json")["configurations"]["3d_fullres"]["patch_size"] == [4, 32, 24]
    run = trainer("4", "nnUNetPlans")
    assert run.configuration_manager.patch_size == [4, 32, 24]
    run.initialize()
    loader, _ = run.get_dataloaders()
    blur = next(t for t in _transforms(loader.data_loader.transforms) if type(t).__name__ == "GaussianBlurTransform")
    for _ in range(20):
        assert torch.isfinite(blur(image=torch.rand(1, 4, 32, 24))["image"]).all()


def _transforms(composed: Any) -> list[Any]:
    return [getattr(transform, "transform", transform) for transform in composed.transforms]


def test_a_patch_that_leaves_nothing_of_an_output_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = ["-patch_size", "4", "32", "24"]
    for command, device in ((misfm_plan, []), (misfm_pretrain, ["-device", "cpu"])):
        assert "Use -patch_size 8 32 24" in refused(capsys, command, "-d", "4", *patch, *TINY, *device)


def test_memory_remedies_name_the_plans(folder: Path) -> None:
    run = trainer("4", "nnUNetPlans")
    assert f"misfm_plan -d {NAME} -c 3d_fullres -p nnUNetPlans -gpu_memory_target 8" in run._memory_remedy(8.0)
