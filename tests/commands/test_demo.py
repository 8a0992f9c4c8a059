"""misfm_demo: nnU-Net's own planning, preprocessing, training, prediction and evaluation around ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nnunetv2_misfm.commands.demo.cli import main


@pytest.mark.end_to_end
def test_the_demo_does_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_def_n_proc", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the demo sets is undone afterwards
    monkeypatch.setenv("nnUNet_compile", "0")
    # As many commands, fewer iterations: how long the demo trains is no part of what is tested.
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.cli._PRETRAINING", (2, 4))
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.cli._FINETUNING", (3, 4))
    folder = tmp_path / "demo with spaces"
    main(["-o", str(folder), "-device", "cpu"])
    report = (folder / "report.md").read_text()
    assert "| pretrained |" in report and "| from scratch |" in report
    for picture in ("report.png", "fused_samples.png"):
        assert (folder / picture).stat().st_size > 10_000
    plans = "MisFMTrainer__nnUNetMisFMPlans__3d_fullres"
    fold = folder / "nnUNet_results" / "Dataset999_MisFMDemo" / plans / "fold_0"
    assert (fold / "transfer_report.json").is_file() and (fold / "validation" / "summary.json").is_file()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        main(["-o", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
