"""misfm_demo: nnU-Net's own planning, preprocessing, training, prediction and evaluation around ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_misfm.commands.demo.cli import main
from nnunetv2_misfm.commands.demo.phantoms import make_phantom
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import locked


@pytest.mark.end_to_end
def test_the_demo_does_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_def_n_proc", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the demo sets is undone afterwards
    monkeypatch.setenv("nnUNet_compile", "0")
    # As many commands, fewer volumes, seeds and iterations: how long the demo trains is no part of what is tested.
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.cli._NUM_UNLABELLED", 4)
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.cli._PRETRAINING", (2, 2))
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.cli._NUM_LABELLED", 5)
    terms = ("--probe", "-num_labelled", "2", "-seeds", "1", "-num_test", "2", "-num_validation", "1")
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.cli._COMPARISON", terms)
    folder = tmp_path / "demo with spaces"
    main(["-o", str(folder), "-device", "cpu"])
    comparison = folder / "comparison"
    page = (comparison / "report.html").read_text(encoding="utf-8")
    assert "frozen features; nothing is fine-tuned" in page and "hours of training" not in page
    assert "The pretext task" in page and "vox2vec" in page
    summary = json.loads((comparison / "summary.json").read_text(encoding="utf-8"))
    assert [score["arm"] for score in summary["scores"]] == ["scratch", "vox2vec"]
    assert [(c["arm"], c["minus"]) for c in summary["comparisons"]] == [("vox2vec", "scratch")]


def test_brightness_does_not_tell_the_organs_of_a_phantom_apart() -> None:
    brightness: dict[int, list[float]] = {1: [], 2: []}
    for seed in range(12):
        image, labels = make_phantom(np.random.default_rng(seed))
        assert set(np.unique(labels)) == {0, 1, 2}
        for label, values in brightness.items():
            values.append(float(image[labels == label].mean()))
    (low, high), (other_low, other_high) = ((min(values), max(values)) for values in brightness.values())
    assert min(high, other_high) - max(low, other_low) > 0.5 * (high - low)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["-o", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_log_of_that_name_does_not_make_a_folder_a_demo(tmp_path: Path) -> None:
    (tmp_path / "demo.log").write_text("of another program", encoding="utf-8")
    scan = tmp_path / "volumes" / "scan.nii.gz"
    scan.parent.mkdir()
    scan.touch()
    with pytest.raises(SystemExit):
        main(["-o", str(tmp_path)])
    assert scan.is_file() and (tmp_path / "demo.log").read_text(encoding="utf-8") == "of another program"


def test_what_the_pretraining_says_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its messages go to a log file; an error must not end there."""

    def refuse(arguments: list[str]) -> None:
        raise PlanError("there is no room here")

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_def_n_proc", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("nnUNet_compile", "0")
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.steps.Demo.make_volumes", lambda *_: None)
    monkeypatch.setattr("nnunetv2_misfm.commands.demo.steps.Demo.plan_with_nnunet", lambda *_: None)
    monkeypatch.setattr("nnunetv2_misfm.commands.pretrain.plan_and_prepare", lambda *_: refuse([]))
    with pytest.raises(SystemExit) as ended:
        main(["-o", str(tmp_path), "-device", "cpu"])
    assert ended.value.code == 2 and "misfm_demo: error: there is no room here" in capsys.readouterr().err


def test_two_demos_do_not_work_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / ".misfm_demo", 0.0, ""), pytest.raises(SystemExit):
        main(["-o", str(tmp_path)])
    assert "another misfm_demo works in this folder" in capsys.readouterr().err
