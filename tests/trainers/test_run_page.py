"""The page of a run: what it says of how far the run is, what went wrong, and how to go on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_plans import run_plans

from nnunetv2_misfm.commands.report import main as misfm_report
from nnunetv2_misfm.files import training_lock
from nnunetv2_misfm.pages.figures import curve
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS, SEGMENTATION
from nnunetv2_misfm.pretrain.tasks import task_class
from nnunetv2_misfm.trainers.metrics_file import append_row
from nnunetv2_misfm.trainers.run_page import _captions, update_run_page, write_run_page
from nnunetv2_misfm.transfer.report import ADAPTED, FRESH, Entry, TransferReport, Unused

PNG = bytes.fromhex("89504e470d0a1a0a")


def make_run(root: Path, block: dict[str, Any], epochs: int, **columns: Any) -> Path:
    folder = root / "Dataset001_A" / "VolumeFusionTrainer__P__3d_fullres" / "fold_all"
    folder.mkdir(parents=True)
    (folder.parent / "plans.json").write_text(json.dumps(run_plans(block)), encoding="utf-8")
    for epoch in range(epochs):
        row = {"train_loss": 1 / (epoch + 1), "lr": 1e-3, "seconds": 120, "ended": f"2026-01-01T10:{epoch:02d}:00"}
        append_row(folder / "metrics.csv", epoch, {**row, **columns})
    return folder


def text_of(page: Path) -> str:
    """What a reader sees, without figures and markup."""
    html = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_how_far_the_run_is_and_how_long_it_still_takes(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 400}, 10)
    text = text_of(write_run_page(folder))
    assert "10 of 400 epochs are done. The last one ended at 2026-01-01 10:09:00." in text
    assert "The rest takes about 13.0 hours" in text  # 390 epochs of 120 seconds
    assert "first epoch began 2026-01-01 09:58" in text
    assert "nnUNetv2_train Dataset001_A 3d_fullres all -tr VolumeFusionTrainer -p P --c" in text


def test_a_run_does_not_end_because_of_its_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 2}, 1)
    said: list[str] = []
    update_run_page(folder, said.append)
    assert not said and "No process" not in text_of(folder / "run.html"), "the run itself writes it, lock or no lock"
    (folder.parent / "plans.json").write_text("{", encoding="utf-8")
    update_run_page(folder, said.append)
    assert "plans.json" in said[0] and "The training goes on" in said[0]


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 2}, 2)
    text = text_of(write_run_page(folder))
    assert "Finished: all 2 epochs are done." in text
    assert "--c" not in text and "No process" not in text  # there is nothing to continue


def test_a_trainer_of_ones_own_may_have_its_own_number_of_epochs(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"num_epochs": 1000}, 5)  # the task is that of fine-tuning if none is named
    (folder / "debug.json").write_text(json.dumps({"num_epochs": "5"}), encoding="utf-8")
    assert "Finished: all 5 epochs are done." in text_of(write_run_page(folder))


def test_a_run_that_was_killed_does_not_look_alive(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 4}, 2)
    with training_lock(folder):
        assert "No process" not in text_of(write_run_page(folder))
    assert "No process seems to train in this folder now" in text_of(write_run_page(folder))
    with training_lock(folder):  # looking has not kept it
        pass


def test_the_command_that_continues_a_run_takes_its_device(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 4}, 2)
    for device, processes, words in (
        ("cuda:0", "1", "-p P --c"),
        ("cuda:0", "4", "-p P -num_gpus 4 --c"),
        ("cpu", "1", "-p P -device cpu --c"),
    ):
        started = {"device": device, "num_processes": processes}
        (folder / "debug.json").write_text(json.dumps(started), encoding="utf-8")
        assert words in text_of(write_run_page(folder))


@pytest.mark.parametrize(
    ("labels", "legend"),
    [
        ({"background": 0, "tumour": 2, "liver": 1}, ("Dice of liver", "Dice of tumour")),
        ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, ("Dice of whole", "Dice of core")),
    ],
)
def test_labels_have_their_names_in_nnunets_order(
    tmp_path: Path, labels: dict[str, Any], legend: tuple[str, str]
) -> None:
    folder = make_run(tmp_path, {"task": SEGMENTATION}, 1, dice_per_class_or_region=[0.25, 0.5])
    (folder.parent / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")
    text = text_of(write_run_page(folder))
    assert f"{legend[0]} 0.25" in text and f"{legend[1]} 0.5" in text


def test_the_score_of_nnunets_validation_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": SEGMENTATION}, 1, mean_fg_dice=0.5)
    (folder / "validation").mkdir()
    summary = {"foreground_mean": {"Dice": 0.22149}}
    (folder / "validation" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "mean Dice of nnU-Net's validation 0.2215" in text_of(write_run_page(folder)).replace("&#39;", "'")
    (folder / "validation" / "summary.json").write_text('{"dice": [0.5]}', encoding="utf-8")  # as pretraining writes it
    assert "nnU-Net's validation" not in text_of(write_run_page(folder)).replace("&#39;", "'")


def test_weights_change_what_the_default_schedule_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": SEGMENTATION, "schedule": "sawtooth"}, 1)
    assert "schedule sawtooth poly" in text_of(write_run_page(folder))
    plans = json.loads((folder.parent / "plans.json").read_text(encoding="utf-8"))
    plans["pretrain_info"] = {"checkpoint_path": "W.pth"}
    (folder.parent / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    assert "schedule sawtooth poly" not in text_of(write_run_page(folder))


def test_a_folder_above_runs_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1)
    with pytest.raises(SystemExit):
        misfm_report([str(tmp_path)])
    assert str(folder) in capsys.readouterr().err


def test_folds_without_an_epoch_do_not_keep_the_others_from_their_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1)
    cancelled = folder.with_name("fold_0")
    cancelled.mkdir()
    misfm_report([str(folder.parent)])
    said = capsys.readouterr().out
    assert f"Page: {folder / 'run.html'}" in said and f"No page: {cancelled} is not the results folder" in said
    (folder / "metrics.csv").unlink()
    with pytest.raises(SystemExit):
        misfm_report([str(folder.parent)])
    said = capsys.readouterr().err
    assert str(folder) in said and str(cancelled) in said


def test_a_run_that_was_copied_to_a_folder_of_another_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1)
    folder.parent.rename(tmp_path / "backup")
    with pytest.raises(SystemExit):
        misfm_report([str(tmp_path / "backup")])
    assert "has not the name that nnU-Net gave it" in capsys.readouterr().err


def test_results_folders_may_be_links_to_another_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1)
    folder.parent.rename(tmp_path / "scratch")
    folder.parent.symlink_to(tmp_path / "scratch", target_is_directory=True)
    for given in (folder, folder.parent):
        misfm_report([str(given)])
        assert f"Page: {folder / 'run.html'}" in capsys.readouterr().out


def test_a_run_that_was_asked_to_stop_says_so_until_it_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 4}, 2)
    log = folder / "training_log_1.txt"
    log.write_text(
        "Epoch 1\n2026: Asked to stop: saved after iteration 1 of epoch 2. Continue with --c.\n", encoding="utf-8"
    )
    assert "It was asked to stop and has saved" in text_of(write_run_page(folder))
    log.write_text(log.read_text(encoding="utf-8") + 100 * "2026: Iteration 1: loss 0.5\n", encoding="utf-8")
    assert "asked to stop" not in text_of(write_run_page(folder))


def test_what_differs_from_the_defaults_comes_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion", "num_epochs": 7, "fusion": {"geometry": "blocks"}}, 1)
    html = write_run_page(folder).read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(\S+)</td><td>(.*?)</td><td>(.*?)</td></tr>", html[html.index("Settings") :])
    assert {row[0] for row in rows[:2]} == {"num_epochs", "fusion.geometry"}
    assert ("num_epochs", "<strong>7</strong>", "400") in rows and ("initial_lr", "0.001", "") in rows


def test_an_alarm_is_listed_once_with_its_epochs(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1, skipped_steps=3)
    log = "2026: Epoch 4\n2026: ALARM: the loss does not fall (0.51). Try another -initial_lr.\n2026: Epoch 5\n"
    (folder / "training_log_1.txt").write_text(
        log + log.replace("Epoch 4", "Epoch 6").replace("(0.51)", "(0.50)"), encoding="utf-8"
    )
    text = text_of(write_run_page(folder))
    assert text.count("the loss does not fall (0.50). Try another -initial_lr.") == text.count("Try another") == 1
    assert "Given 2 times, in epochs 5 to 7." in text and "3 training steps were skipped" in text


def test_the_account_of_the_transfer_is_that_of_the_log(tmp_path: Path) -> None:
    entries = (
        Entry("encoder.a", "encoder", ADAPTED, "other input channels", 8, (2, 4)),
        Entry("decoder.seg", "segmentation layers", FRESH, "belongs to the labels", 4, (4,)),
    )
    report = TransferReport("W.pth", entries, ("encoder",), (Unused("x", "other", "no place", 1),), ("a note",))
    folder = make_run(tmp_path, {"task": "segmentation"}, 1, mean_fg_dice=0.5)
    (folder / "transfer_report.json").write_text(json.dumps(report.as_json()), encoding="utf-8")
    html = write_run_page(folder).read_text(encoding="utf-8")
    assert TransferReport.from_json(report.as_json()) == report
    assert report.table() in html.replace("&gt;", ">").replace("&#39;", "'")


def test_pictures_are_spread_over_the_run_and_lie_in_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1)
    (folder / "pictures").mkdir()
    for epoch in range(100):
        (folder / "pictures" / f"epoch_{epoch:04d}.png").write_bytes(PNG + bytes([epoch]))
    html = write_run_page(folder).read_text(encoding="utf-8")
    (listed,) = re.findall(r"const pictures = (.*?);\n", html)
    epochs = [epoch for epoch, _ in json.loads(listed)]
    assert epochs[0] == 1 and epochs[-1] == 100 and len(epochs) <= 25
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html), "the page needs nothing else"


def test_what_one_epoch_has_measured_is_told_and_not_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {"task": "volume_fusion"}, 1, dice=[0.25, 0.5])
    page = write_run_page(folder)
    assert "<svg" not in page.read_text(encoding="utf-8")
    assert "dice 1 0.5" in text_of(page) and "train loss 1" in text_of(page)
    make_run(tmp_path / "two", {"task": "volume_fusion"}, 2, dice=[0.25, 0.5])
    page = write_run_page(next((tmp_path / "two").glob("*/*/fold_all")))
    assert "<svg" in page.read_text(encoding="utf-8") and "Measured once" not in text_of(page)


@pytest.mark.parametrize("task", [SEGMENTATION, *PRETEXT_TASKS])
def test_scores_and_pictures_are_explained(tmp_path: Path, task: str) -> None:
    captions = _captions(task)
    folder = make_run(tmp_path, {"task": task}, 2, **dict.fromkeys(captions, 0.5))
    (folder / "pictures").mkdir()
    (folder / "pictures" / "epoch_0001.png").write_bytes(PNG)
    text = text_of(write_run_page(folder)).replace("&#39;", "'")
    assert captions and all(caption in text for caption in captions.values())
    if task != SEGMENTATION:
        assert f"After epoch 2 . {task_class(task).picture_caption}" in text


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SystemExit):
            misfm_report([str(folder)])
        assert str(folder) in capsys.readouterr().err


def test_epochs_on_an_axis_are_whole_numbers() -> None:
    svg = curve({"loss": [1.0] * 20}, "epoch", "loss")
    ticks = re.findall(r">([^<>]+)</text>", svg.partition(">epoch</text>")[0])
    assert len(ticks) > 3 and all(tick.isdigit() for tick in ticks)


def test_more_lines_than_can_be_told_apart_are_summed_up() -> None:
    lines = {f"organ {number}": [0.1, number / 200] for number in range(117)}
    drawn = curve(lines | {"empty": [float("nan")] * 2}, "epoch", "")
    assert "mean of 118" in drawn and "highest at the end: organ 116" in drawn and "organ 50" not in drawn
    few = curve({f"organ {number}": [0.1, 0.2] for number in range(8)}, "epoch", "")
    assert "organ 7" in few and "mean of" not in few


def test_a_label_may_hold_a_dollar_sign() -> None:
    assert "a$x_{$" in curve({"a$x_{$": [0.1, 0.2]}, "epoch", "")
