"""A pool, results folders and checkpoints that an early version wrote, before the package had its present rooms.

`earlier_version.zip` holds nnU-Net's folders as its commands left them: three volumes of 20^3 voxels prepared by
`misfm_pretrain -d 901 -i ...`, three epochs of Volume Fusion with PCT-Net, a dataset planned from that checkpoint by
`misfm_plan -d 5`, and two epochs of fine-tuning. The right values are those that it printed.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_dataset import use_folders
from nnunetv2.run.run_training import run_training

from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder

PRETRAINED = Path("nnUNet_results/Dataset901_Before/VolumeFusionTrainer__nnUNetPlans__3d_fullres/fold_all")
FINE_TUNED = Path("nnUNet_results/Dataset005_Target/MisFMTrainer__nnUNetMisFMPlans__3d_fullres/fold_0")


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds nnU-Net's three."""
    with zipfile.ZipFile(Path(__file__).with_name("earlier_version.zip")) as archive:
        archive.extractall(tmp_path)
    planned = tmp_path / "nnUNet_preprocessed" / "Dataset005_Target"
    record = json.loads((planned / "nnUNetMisFMPlans_3d_fullres.preprocessing.json").read_text(encoding="utf-8"))
    for name, (_, time) in record["files"].items():  # which the archive rounds
        os.utime(planned / "nnUNetMisFMPlans_3d_fullres" / name, ns=(time, time))
    use_folders(tmp_path, monkeypatch)
    add_plugin_folder()
    return tmp_path


def test_a_pretraining_of_an_earlier_version_goes_on_as_it_would_have_there(earlier: Path) -> None:
    misfm_pretrain(["-d", "901", "-device", "cpu", "-num_epochs", "4", "--c"])
    last = list(csv.DictReader((earlier / PRETRAINED / "metrics.csv").open(encoding="utf-8")))[-1]
    expected = {"epoch": 3, "train_loss": 0.734841, "val_loss": 0.710407, "dice_0": 0.169251, "dice_2": 0.1942}
    assert {name: float(last[name]) for name in expected} == pytest.approx(expected, rel=2e-3)


def test_planning_again_keeps_what_an_earlier_version_planned_and_preprocessed(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = earlier / "nnUNet_preprocessed" / "Dataset005_Target"
    before = configuration_of(folder / "nnUNetMisFMPlans.json")
    run = ["-num_epochs", "2", "-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1"]
    weights = str(earlier / PRETRAINED / "checkpoint_final.pth")
    # Its pool is of CT and MR, of which that version took no window over.
    run += ["-ct_intensities", "dataset"]
    misfm_plan(["-d", "5", "-pretrained_weights", weights, "-optimizer", "sgd", *run])
    assert configuration_of(folder / "nnUNetMisFMPlans.json") == before
    assert "nnUNetMisFMPlans_3d_fullres is up to date." in capsys.readouterr().out


def configuration_of(plans: Path) -> dict[str, Any]:
    """The configuration but for the remark in it that nnU-Net prints where the trainer is another."""
    entry: dict[str, Any] = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    del entry["architecture"]["_kw_requires_import"]
    return entry


def test_a_fine_tuning_of_an_earlier_version_predicts_what_it_did_there(earlier: Path) -> None:
    before = json.loads((earlier / FINE_TUNED / "validation" / "summary.json").read_text(encoding="utf-8"))["mean"]["1"]
    shutil.rmtree(earlier / FINE_TUNED / "validation")
    run_training(
        "5", "3d_fullres", 0, "MisFMTrainer", "nnUNetMisFMPlans", only_run_validation=True, device=torch.device("cpu")
    )
    now = json.loads((earlier / FINE_TUNED / "validation" / "summary.json").read_text(encoding="utf-8"))["mean"]["1"]
    assert now["n_ref"] == before["n_ref"] == 518
    assert now["n_pred"] == pytest.approx(before["n_pred"], abs=4) and now["Dice"] == pytest.approx(
        before["Dice"], abs=1e-3
    )
