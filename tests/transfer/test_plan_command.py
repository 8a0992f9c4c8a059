"""misfm_plan as a user types it: what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnunetv2_misfm.transfer.cli import plan_main

DATASET = "Dataset004_Small"


def plans(nnunet: Path, name: str = "nnUNetMisFMPlans") -> dict:
    return json.loads((nnunet / "nnUNet_preprocessed" / DATASET / f"{name}.json").read_text())


def test_without_weights_the_plan_trains_from_scratch(nnunet: Path) -> None:
    plan_main(["-d", "4", "-num_epochs", "7", "-initial_lr", "0.01"])
    written = plans(nnunet)
    assert written["pretrain_info"]["checkpoint_path"] is None
    assert (written["misfm"]["num_epochs"], written["misfm"]["initial_lr"], written["misfm"]["schedule"]) == (
        7,
        0.01,
        "scratch",
    )
    assert list(written["configurations"]) == ["3d_fullres"]
    entry = written["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"] == "nnunetv2_misfm.architectures.PCTNet"


def test_the_network_of_the_plan_can_be_kept(nnunet: Path) -> None:
    plan_main(["-d", "4", "-network", "plan", "--no_pp"])
    entry = plans(nnunet)["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"].endswith("PlainConvUNet")


def test_a_memory_target_changes_patch_and_batch(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["-d", "4", "-gpu_memory_target", "100", "-batch_size", "6", "--no_pp"])
    roomy = plans(nnunet)["configurations"]["3d_fullres"]
    plan_main(["-d", "4", "-gpu_memory_target", "1", "-batch_size", "6", "--no_pp"])
    tight = plans(nnunet)
    assert roomy["batch_size"] == 6 and roomy["patch_size"] == [32, 32, 32]
    assert tight["configurations"]["3d_fullres"]["batch_size"] < 6
    assert "of 1 GB" in capsys.readouterr().out


def test_running_it_again_does_not_preprocess_again(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["-d", "4"])
    plan_main(["-d", "4", "-num_epochs", "3"])
    out = capsys.readouterr().out
    assert "shares the arrays" in out and "is up to date" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-d", "88"], "The dataset 88 is not there"),
        (["-d", "4", "-p", "Nope"], "There are: nnUNetPlans"),
        (["-d", "4", "-c", "2d"], "is not 3D"),
        (["-d", "4", "-c", "3d_lowres"], "they have: 2d, 3d_fullres"),
        (["-d", "4", "-overwrite_plans_name", "a__b"], "contains '__'"),
        (["-d", "4", "-pretrained_weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["-d", "4", "-pretrained_weights", "text.pth"], "text.pth is not a readable checkpoint"),
        (["-d", "4", "-num_epochs", "-3", "-min_coverage", "7"], "min_coverage = 7.0"),
        (["-d", "4", "-gpu_memory_target", "0.01"], "Not even patch size"),
    ],
)
def test_mistakes_get_one_clear_message(
    nnunet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in (nnunet / "nnUNet_preprocessed" / DATASET).iterdir())
    with pytest.raises(SystemExit) as stop:
        plan_main([*arguments, "--no_pp"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message
    assert sorted(path.name for path in (nnunet / "nnUNet_preprocessed" / DATASET).iterdir()) == before


def test_a_checkpoint_that_names_no_network_asks_for_the_plans(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"network_weights": {"a": torch.zeros(1)}}, tmp_path / "stock.pth")
    with pytest.raises(SystemExit):
        plan_main(["-d", "4", "-pretrained_weights", str(tmp_path / "stock.pth")])
    assert "-network plan" in capsys.readouterr().err
