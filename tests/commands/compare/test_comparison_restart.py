"""A comparison goes on where it was stopped, and leaves the user's own plans, splits and results alone."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunet_dataset import NAME

from nnunetv2_misfm.architectures.pct_net import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, write_checkpoint
from nnunetv2_misfm.commands.compare import figures, one_run
from nnunetv2_misfm.commands.compare.cli import compare
from nnunetv2_misfm.commands.compare.one_run import _is_whole, _use_onednn
from nnunetv2_misfm.commands.compare.options import read_options
from nnunetv2_misfm.commands.compare.planned_arms import made_of
from nnunetv2_misfm.commands.compare.records import RunIdentity, RunOrder, RunRecord
from nnunetv2_misfm.commands.compare.results import write_results
from nnunetv2_misfm.commands.compare.runner import Failure, Runner
from nnunetv2_misfm.commands.compare.study import Study, planned_study
from nnunetv2_misfm.commands.compare.timing import estimate_hours
from nnunetv2_misfm.commands.compare.workspace import Workspace
from nnunetv2_misfm.errors import PlanError, UserError
from nnunetv2_misfm.files import LockedError, locked
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.network_entry import NETWORKS, PLAIN_UNET

WORDS = ["-d", "4", "--from_scratch", "--nnunet", "-num_labelled", "1", "2", "-num_test", "2", "-num_validation", "1"]


class FakeRunner:
    """Does runs by writing their records, until it is stopped."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.orders: list[RunOrder] = []

    def perform(self, orders: Sequence[RunOrder], title: str, epochs: int) -> list[Any]:
        for order in orders:
            if len(self.orders) == self.stop_after:
                raise KeyboardInterrupt
            self.orders.append(order)
            record = RunRecord(
                **order.about.model_dump(),
                dice={case: {"inner": 0.5} for case in order.cases},
                curve=[0.5],
                training_seconds=1.0,
                prediction_seconds=1.0,
                seconds=3.0,
            )
            order.record.parent.mkdir(parents=True, exist_ok=True)
            order.record.write_text(record.model_dump_json(), encoding="utf-8")
        return []


def study(tmp_path: Path, users: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Study:
    """A planned comparison of the user's dataset in a folder of its own."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(users / name))
    options = read_options([*WORDS, "-o", str(tmp_path / "comparison"), "-device", "cpu", *more])
    workspace = Workspace(options.folder, options.dataset, options.configuration, options.plans)
    workspace.prepare()
    return planned_study(options, workspace)


def order_in(folder: Path, weights_sha256: str | None = None) -> RunOrder:
    """A run of our trainer."""
    made_of = {"weights_sha256": weights_sha256, "plans_sha256": "p"}
    return RunOrder(
        about=RunIdentity(arm="a", labelled=1, seed=0, rate=1e-3, tuning=False, iterations_per_epoch=1, **made_of),
        dataset=NAME,
        configuration="3d_fullres",
        fold=0,
        trainer="MisFMTrainer",
        plans_file=folder / "run.json",
        stock={},
        results=folder / "results",
        cases={},
        labels=(),
        file_ending=".nii.gz",
        predictions=folder / "run" / "predictions",
        record=folder / "run" / "record.json",
        device="cpu",
        mirroring=False,
        keep_weights=False,
    )


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file, with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_finished_runs_are_kept_and_the_others_done(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(nnunet)
    first = FakeRunner(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, nnunet, monkeypatch, "-seeds", "2").perform(first)  # type: ignore[arg-type]
    second = FakeRunner()
    again = study(tmp_path, nnunet, monkeypatch, "-seeds", "2")
    assert len(again.left()) == 5
    again.perform(second)  # type: ignore[arg-type]
    done = [order.plans_file.stem for order in first.orders + second.orders]
    assert len(done) == len(set(done)) == 8  # two arms, two numbers of labelled cases, two seeds
    assert again.left() == []
    assert files_of(nnunet) == before

    more = FakeRunner()
    study(tmp_path, nnunet, monkeypatch, "-seeds", "3").perform(more)  # type: ignore[arg-type]
    assert len(more.orders) == 4


def test_both_arms_of_a_seed_have_the_same_cases(tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner()
    made = study(tmp_path, nnunet, monkeypatch, "-seeds", "3")
    made.perform(runner)  # type: ignore[arg-type]
    folds = json.loads((made.workspace.preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    by_seed: dict[tuple[int, int], list[Any]] = {}
    for order in runner.orders:
        about, fold = order.about, folds[order.fold]
        assert fold["train"] == made.split.labelled(about.labelled, about.seed)
        assert not set(fold["train"]) & set(order.cases) and not set(fold["val"]) & set(order.cases)
        by_seed.setdefault((about.labelled, about.seed), []).append((fold, list(order.cases)))
    assert all(len(of_seed) == 2 and of_seed[0] == of_seed[1] for of_seed in by_seed.values())
    own = next(order for order in runner.orders if order.trainer == "MisFMTrainer")
    plans = made.workspace.plans_of(own.plans_file.stem)
    assert plans["misfm"]["seed"] == own.about.seed and plans["misfm"]["schedule"] == "poly"


def test_fresh_draws_are_compared_by_themselves(tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path, nnunet, monkeypatch, "-seeds", "2").perform(FakeRunner())  # type: ignore[arg-type]
    fresh = study(tmp_path, nnunet, monkeypatch, "-first_seed", "2", "-seeds", "3")
    runner = FakeRunner()
    _, chosen = fresh.perform(runner)  # type: ignore[arg-type]
    assert {order.about.seed for order in runner.orders} == {2, 3, 4}
    written = write_results(fresh, chosen, [])
    (compared, _) = json.loads((written.path.parent / "summary.json").read_text(encoding="utf-8"))["comparisons"]
    assert compared["seeds"] == 3


def test_finished_runs_tell_how_long_the_others_take(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study(tmp_path, nnunet, monkeypatch, "-seeds", "1").perform(FakeRunner())  # type: ignore[arg-type]
    more = study(tmp_path, nnunet, monkeypatch, "-seeds", "3", "-jobs", "2")
    # Two arms, two numbers of labelled cases and two seeds at 3 seconds each; on one GPU they share it.
    assert estimate_hours(more, Runner("cpu", (), 2)) == pytest.approx(8 * 3 / 2 / 3600)
    assert estimate_hours(more, Runner("cuda", (), 2)) == pytest.approx(8 * 3 / 3600)
    # A run that chooses a rate predicts the one validation case, in half of the second that two test cases took.
    several = ("-initial_lr", "1e-3", "1e-2", "-nnunet_lr", "1e-2", "1e-3")
    rates = study(tmp_path, nnunet, monkeypatch, "-seeds", "1", *several)
    assert len(rates.left()) == 8 and all(run.tuning for run in rates.left())
    assert estimate_hours(rates, Runner("cpu", (), 1)) == pytest.approx(8 * (2 + 1 / 2) / 3600)
    crowded = study(tmp_path, nnunet, monkeypatch, "-seeds", "2", "-jobs", "9")
    assert estimate_hours(crowded, Runner("cpu", (), 9)) == pytest.approx(3 / 3600), "four runs of nine at once"


def test_a_dataset_that_is_planned_and_not_preprocessed_is_preprocessed(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessed = nnunet / "nnUNet_preprocessed" / NAME
    for name in ("gt_segmentations", "nnUNetPlans_3d_fullres"):
        shutil.rmtree(preprocessed / name)
    monkeypatch.setattr(sys.modules[__name__], "WORDS", [word for word in WORDS if word != "--nnunet"])
    arguments: dict[str, Any] = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 8, 16]}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, {}, {})
    write_checkpoint({"network_weights": PCTNet(1, 5, **arguments).state_dict()}, info, tmp_path / "VF.pth")
    for _ in range(2):
        made = study(tmp_path, nnunet, monkeypatch, "-pretrained_weights", str(tmp_path / "VF.pth"))
        assert len(list((made.workspace.preprocessed / "gt_segmentations").iterdir())) == len(made.workspace.cases)
    assert not (preprocessed / "gt_segmentations").exists(), "the user's own folder is as it was"


@pytest.mark.parametrize("name", ["gt_segmentations", "nnUNetPlans_3d_fullres"])
def test_links_to_other_data_are_refused(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = study(tmp_path, nnunet, monkeypatch)
    link = made.workspace.preprocessed / name
    link.unlink()
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(PlanError, match=f"{name} leads to {tmp_path}, not to .*Choose another folder with -o"):
        made.workspace.prepare()


def test_a_page_does_without_predictions_that_were_removed(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(tmp_path, nnunet, monkeypatch)
    _, chosen = made.perform(FakeRunner())  # type: ignore[arg-type]
    assert write_results(made, chosen, []).path.is_file()


def test_another_command_in_the_folder_changes_nothing(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(tmp_path, nnunet, monkeypatch)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(nnunet / name))
    words = [*WORDS, "-o", str(made.workspace.folder), "-device", "cpu"]
    (nnunet / "nnUNet_preprocessed" / NAME / "dataset.json").touch()
    before = files_of(made.workspace.folder)
    with locked(made.workspace.folder / ".lock", 0.0, ""), pytest.raises(LockedError, match="another misfm_compare"):
        compare(read_options(words), words)
    assert files_of(made.workspace.folder) == {**before, ".lock": (0, pytest.approx(0, abs=1e30))}


def test_labels_of_other_names_are_other_terms(tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path, nnunet, monkeypatch).perform(FakeRunner())  # type: ignore[arg-type]
    path = nnunet / "nnUNet_preprocessed" / NAME / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["labels"] = {f"{name}2" if value else name: value for name, value in content["labels"].items()}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PlanError, match="labels was"):
        study(tmp_path, nnunet, monkeypatch)


def test_a_folder_keeps_its_terms(tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, nnunet, monkeypatch, "-num_epochs", "3").perform(FakeRunner(stop_after=1))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"on other terms: settings was .*'num_epochs': 3.*another folder with -o"):
        study(tmp_path, nnunet, monkeypatch, "-num_epochs", "4")


def test_options_that_could_not_be_planned_are_not_the_terms_of_the_folder(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="-patch_size|patch size"):
        study(tmp_path, nnunet, monkeypatch, "-patch_size", "0", "16", "16")
    corrected = FakeRunner()
    study(tmp_path, nnunet, monkeypatch, "-patch_size", "16", "16", "16").perform(corrected)  # type: ignore[arg-type]
    assert corrected.orders


def test_a_dry_run_names_the_cases_that_would_be_tested_and_makes_nothing(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = study(tmp_path, nnunet, monkeypatch)
    before, folder = files_of(nnunet), tmp_path / "dry"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(nnunet / name))
    words = ["-d", "4", "-num_test", "2", "-num_validation", "1", "-o", str(folder)]
    compare(read_options([*words, "--dry_run"]), words)
    said = capsys.readouterr().out
    assert f"Tested (2): {' '.join(made.split.cases_of(made.split.test))}\n" in said
    assert f"To draw labelled cases from (3): {' '.join(made.split.cases_of(made.split.training))}\n" in said
    assert files_of(nnunet) == before and not folder.exists()
    with pytest.raises(PlanError, match="-num_labelled 40: 3 are left for training"):
        compare(read_options([*words, "--dry_run", "-num_labelled", "40"]), words)


def test_a_dry_run_says_that_names_look_like_scans_of_one_patient(
    nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"patient{number}_{frame}" for number in range(1, 7) for frame in ("end", "start")]
    monkeypatch.setattr(Workspace, "cases", dict.fromkeys(names))
    words = ["-d", "4", "-o", str(tmp_path / "dry"), "--dry_run"]
    compare(read_options(words), words)
    assert "patient1_end and patient1_start look like scans of one patient" in capsys.readouterr().out
    by_patient = [*words, "-patients", r"patient\d+"]
    compare(read_options(by_patient), by_patient)
    assert "look like scans" not in capsys.readouterr().out


def test_a_probe_of_regions_is_refused_before_anything_is_planned(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nnunet / "nnUNet_raw" / NAME / "dataset.json"
    dataset = json.loads(path.read_text(encoding="utf-8"))
    dataset |= {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    path.write_text(json.dumps(dataset), encoding="utf-8")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(nnunet / name))
    weights = tmp_path / "vf.pth"
    weights.touch()
    words = [word for word in WORDS if word != "--nnunet"]
    words += ["-pretrained_weights", str(weights), "--probe", "-o", str(tmp_path / "probe")]
    with pytest.raises(PlanError, match="has regions, which --probe cannot score. Leave --probe out."):
        compare(read_options(words), words)


def test_more_labelled_cases_than_there_are_is_told(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="-num_labelled 40: 3 are left for training beside 2 to test and 1 to validate"):
        study(tmp_path, nnunet, monkeypatch, "-num_labelled", "40")


def test_checkpoints_of_one_network_share_the_arm_from_scratch(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name, features in (("a", 4), ("b", 4), ("wide", 8)):
        arguments: dict[str, Any] = {"strides": strides_of(0), "features_per_stage": [features, 4, 8, 8, 16]}
        info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, {}, {})
        files.append(str(tmp_path / f"{name}.pth"))
        write_checkpoint({"network_weights": PCTNet(1, 5, **arguments).state_dict()}, info, Path(files[-1]))
    made = study(tmp_path, nnunet, monkeypatch, "-pretrained_weights", *files)
    assert [(arm.name, arm.baseline) for arm in made.arms] == [
        ("a", "scratch"),
        ("b", "scratch"),
        ("wide", "scratch_wide"),
        ("scratch", None),
        ("scratch_wide", None),
        ("nnunet", None),
    ]
    planned = made.workspace.plans_of("scratch_wide_arm")
    assert planned["pretrain_info"]["checkpoint_path"] is None
    arguments = planned["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert arguments["features_per_stage"] == [8, 4, 8, 8, 16]


def test_each_checkpoint_can_be_compared_in_its_own_network(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name, features in (("a", [4, 8]), ("b", [8, 8])):
        arguments = {"n_stages": 2, "features_per_stage": features, "kernel_sizes": 3, "strides": [[1] * 3, [2] * 3]}
        shape = {"conv_op": torch.nn.Conv3d, "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "conv_bias": True}
        norm = {"norm_op": torch.nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": torch.nn.LeakyReLU}
        network = PlainConvUNet(1, num_classes=3, **arguments, **shape, **norm)
        arguments |= {"conv_op": "torch.nn.modules.conv.Conv3d", "kernel_sizes": [[3] * 3] * 2}
        arguments |= {"n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True}
        arguments |= {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"affine": True}}
        arguments |= {"nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": None, "dropout_op": None}
        info = CheckpointInfo("patch_swap", PLAIN_UNET, arguments, 1, 3, {}, {})
        files.append(str(tmp_path / f"{name}.pth"))
        write_checkpoint({"network_weights": network.state_dict()}, info, Path(files[-1]))
    made = study(tmp_path, nnunet, monkeypatch, "-network", "pretrained", "-pretrained_weights", *files)
    features = {
        arm.name: made.workspace.plans_of(arm.plans)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][
            "features_per_stage"
        ]
        for arm in made.arms
        if arm.kind != "nnunet"
    }
    assert features == {"a": [4, 8], "scratch": [4, 8], "b": [8, 8], "scratch_b": [8, 8]}


def test_runs_of_a_version_with_a_setting_less_are_taken_over(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default is what they had."""
    made = study(tmp_path, nnunet, monkeypatch)
    arm = made.arm("scratch")
    before = made_of(made.workspace, arm)
    path = made.workspace.preprocessed / f"{arm.plans}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    del plans["misfm"]["seg_layers_lr_factor"]
    path.write_text(json.dumps(plans), encoding="utf-8")
    assert made_of(made.workspace, arm) == before
    plans["misfm"]["seg_layers_lr_factor"] = 3
    path.write_text(json.dumps(plans), encoding="utf-8")
    assert made_of(made.workspace, arm) != before


def test_with_own_schedules_weights_are_trained_as_misfm_plan_says(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 8, 16]}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, {}, {})
    file = tmp_path / "VF.pth"
    write_checkpoint({"network_weights": PCTNet(1, 5, **arguments).state_dict()}, info, file)
    made = study(tmp_path, nnunet, monkeypatch, "-pretrained_weights", str(file), "--own_schedules")
    assert {arm: made.workspace.plans_of(f"{arm}_arm")["misfm"]["schedule"] for arm in ("VF", "scratch")} == {
        "VF": "sawtooth",
        "scratch": "poly",
    }
    written = write_results(made, {}, [])
    assert written.verdict.endswith("With and without weights the schedule differs too.")
    page = written.path.read_text(encoding="utf-8")
    assert "schedule sawtooth." in page and "schedule poly." in page and "one of each arm, adamw" in page


def test_a_configuration_that_inherits_is_compared(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nnunet / "nnUNet_preprocessed" / "Dataset004_Small" / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"]["3d_batch_3"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    path.write_text(json.dumps(plans), encoding="utf-8")
    made = study(tmp_path, nnunet, monkeypatch, "-c", "3d_batch_3", "-seeds", "1")
    runner = FakeRunner()
    made.perform(runner)  # type: ignore[arg-type]
    of_arms = [configuration_3d(made.workspace.plans_of(arm.plans), "3d_batch_3") for arm in made.arms]
    identifiers = {entry["data_identifier"] for entry in of_arms}
    assert all((made.workspace.preprocessed / name).is_dir() for name in identifiers)
    of_arms = [made.workspace.plans_of(arm.plans)["configurations"]["3d_batch_3"] for arm in made.arms]
    assert [(entry["batch_size"], len(entry["patch_size"])) for entry in of_arms] == [(3, 3), (3, 3)]


def test_no_rate_is_chosen_while_a_tuning_run_is_missing(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingRunner(FakeRunner):
        def perform(self, orders: Sequence[RunOrder], title: str, epochs: int) -> list[Any]:
            super().perform(orders[1:], title, epochs)
            return [Failure("first", tmp_path / "log.txt", "out of memory")]

    rates = ("-initial_lr", "1e-3", "1e-2", "-nnunet_lr", "1e-2", "1e-3")
    failing = FailingRunner()
    made = study(tmp_path, nnunet, monkeypatch, *rates)
    failures, chosen = made.perform(failing)  # type: ignore[arg-type]
    first = made.tuning()[0]
    assert failures and len(chosen) == 3 and (first.arm, first.labelled) not in chosen
    tested = [order.about for order in failing.orders if not order.about.tuning]
    assert tested and all((about.arm, about.labelled) in chosen for about in tested)
    monkeypatch.setattr("nnunetv2_misfm.commands.compare.results._pictures", lambda *_: ())  # nothing was predicted
    written = write_results(made, chosen, [])
    assert written.path.is_file() and "no two arms" not in written.verdict  # which the other number of cases has
    study(tmp_path, nnunet, monkeypatch, *rates).perform(FakeRunner())  # type: ignore[arg-type]


def test_runs_of_other_plans_or_cases_are_not_taken_over(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(tmp_path, nnunet, monkeypatch)
    made.perform(FakeRunner())  # type: ignore[arg-type]
    for name in ("scratch", "nnunet"):
        again = study(tmp_path, nnunet, monkeypatch)
        path = again.workspace.preprocessed / f"{name}_arm.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        plans["configurations"]["3d_fullres"]["patch_size"] = [16, 16, 16]
        path.write_text(json.dumps(plans), encoding="utf-8")
        with pytest.raises(UserError, match="another network or plans"):
            again.perform(FakeRunner())  # type: ignore[arg-type]
    terms = made.workspace.folder / "terms.json"
    before = json.loads(terms.read_text(encoding="utf-8"))
    terms.write_text(json.dumps(before | {"training": before["training"][1:]}), encoding="utf-8")
    with pytest.raises(PlanError, match="training was"):
        study(tmp_path, nnunet, monkeypatch)


def test_learning_rates_and_draws_to_choose_them_with_may_come_later(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what they add is run; runs with another rate are neither lost nor mixed with those that are asked for."""
    study(tmp_path, nnunet, monkeypatch, "-seeds", "1").perform(FakeRunner())  # type: ignore[arg-type]
    rates = ("-seeds", "1", "-initial_lr", "1e-3", "1e-2", "-nnunet_lr", "1e-2", "1e-3")
    more = FakeRunner()
    study(tmp_path, nnunet, monkeypatch, *rates).perform(more)  # type: ignore[arg-type]
    # All score alike, so that each arm gets the lower rate, which nnU-Net's did not have before.
    tested = [order.about for order in more.orders if not order.about.tuning]
    assert len(more.orders) == 8 + len(tested)
    assert {(about.arm, about.labelled, about.rate) for about in tested} == {
        ("nnunet", 1, 1e-3),
        ("nnunet", 2, 1e-3),
    }
    draws = FakeRunner()
    made = study(tmp_path, nnunet, monkeypatch, *rates, "-tuning_seeds", "2")
    _, chosen = made.perform(draws)  # type: ignore[arg-type]
    assert len(draws.orders) == 8 and all(order.about.tuning for order in draws.orders)
    assert made.left() == []
    monkeypatch.setattr("nnunetv2_misfm.commands.compare.results._pictures", lambda *_: ())  # nothing was predicted
    written = write_results(made, chosen, [])
    scores = json.loads((written.path.parent / "summary.json").read_text(encoding="utf-8"))["scores"]
    assert all(score["learning_rates"] == [1e-3] and len(score["dice_by_seed"]) == 1 for score in scores)
    before = FakeRunner()
    study(tmp_path, nnunet, monkeypatch, "-seeds", "1").perform(before)  # type: ignore[arg-type]
    assert not before.orders


def test_runs_that_were_tested_with_other_labels_are_not_taken_over(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study(tmp_path, nnunet, monkeypatch).perform(FakeRunner())  # type: ignore[arg-type]
    label = next((nnunet / "nnUNet_raw" / NAME / "labelsTr").iterdir())
    label.touch()
    assert study(tmp_path, nnunet, monkeypatch).left() == []
    copy = nnunet / "nnUNet_preprocessed" / NAME / "gt_segmentations" / label.name
    before = copy.read_bytes()
    copy.write_bytes(gzip.compress(gzip.decompress(before), 1))
    assert copy.read_bytes() != before
    assert study(tmp_path, nnunet, monkeypatch).left() == []  # the same labels in another file
    image = sitk.ReadImage(str(label))
    sitk.WriteImage(image == 1, str(label))
    preprocessed = nnunet / "nnUNet_preprocessed" / NAME / "gt_segmentations" / label.name
    with pytest.raises(PlanError, match=f"{label.name}: nnU-Net has preprocessed other labels.*nnUNetv2_preprocess -d"):
        study(tmp_path, nnunet, monkeypatch)
    preprocessed.write_bytes(label.read_bytes())  # as nnU-Net does then
    with pytest.raises(PlanError, match="label_files was .*a dataset with other cases or labels needs one"):
        study(tmp_path, nnunet, monkeypatch)


def test_the_page_says_in_what_arms_differ_and_what_misfm_plan_noted(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(tmp_path, nnunet, monkeypatch, "-seeds", "1", "-spacing", "2", "2", "2")
    _, chosen = made.perform(FakeRunner())  # type: ignore[arg-type]
    monkeypatch.setattr("nnunetv2_misfm.commands.compare.results._pictures", lambda *_: ())  # nothing was predicted
    page = write_results(made, chosen, []).path.read_text(encoding="utf-8")
    assert "spacing 2 x 2 x 2 mm" in page and "scratch: 3d_fullres: spacing [" in page
    assert "nnunet: nnU-Net&#39;s own trainer" in page and "spacing 1 x 1 x 1 mm" in page
    assert "which takes intensities within their labels" in page and "iterations are few" not in page


def test_the_truth_is_in_the_pictures_whatever_arms_are_called(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 8, 16]}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, {}, {})
    write_checkpoint({"network_weights": PCTNet(1, 5, **arguments).state_dict()}, info, tmp_path / "c.pth")
    made = study(tmp_path, nnunet, monkeypatch, "-seeds", "1", "-pretrained_weights", f"truth={tmp_path / 'c.pth'}")
    _, chosen = made.perform(FakeRunner())  # type: ignore[arg-type]
    for run in made.tested(chosen):
        predictions = made.workspace.run_folder(run) / "predictions"
        predictions.mkdir()
        for case in made.predicted(run):
            shutil.copy(made.workspace.cases[case][1], predictions)
    drawn: list[list[Path]] = []
    monkeypatch.setattr(figures, "case_picture", lambda image, segmentations, *_: drawn.append(segmentations) or "")
    page = write_results(made, chosen, []).path.read_text(encoding="utf-8")
    assert "Pictures of the first seed: truth, scratch, truth" in page
    labels = {Path(label) for _, label in made.workspace.cases.values()}
    assert drawn and all(len(files) == 3 and files[0] in labels for files in drawn)


def test_a_run_that_found_none_of_the_labels_does_not_keep_the_page_from_being_written(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(tmp_path, nnunet, monkeypatch, "-seeds", "3")
    _, chosen = made.perform(FakeRunner())  # type: ignore[arg-type]
    path = made.workspace.run_folder(made.tested(chosen)[0]) / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["dice"] = {case: {"inner": None} for case in record["dice"]}
    path.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr("nnunetv2_misfm.commands.compare.results._pictures", lambda *_: ())  # nothing was predicted
    assert write_results(made, chosen, []).path.is_file()


def test_what_is_missing_is_told_before_anything_is_made(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessed = nnunet / "nnUNet_preprocessed" / NAME
    arrays = preprocessed / "nnUNetPlans_3d_fullres"
    arrays.rename(preprocessed / "elsewhere")
    with pytest.raises(PlanError, match=r"which --nnunet trains with, is not there.*nnUNetv2_preprocess -d"):
        study(tmp_path, nnunet, monkeypatch)
    (preprocessed / "elsewhere").rename(arrays)
    for label in (nnunet / "nnUNet_raw" / NAME / "labelsTr").iterdir():
        label.rename(label.with_name(f"_{label.name}"))
    with pytest.raises(PlanError, match=r"\d files of .* are not there: .*labelsTr"):
        study(tmp_path, nnunet, monkeypatch)


def test_a_copy_of_a_plans_file_goes_by_the_name_of_the_file(
    tmp_path: Path, nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nnunet / "nnUNet_preprocessed" / NAME
    (folder / "MyPlans.json").write_bytes((folder / "nnUNetPlans.json").read_bytes())
    assert study(tmp_path, nnunet, monkeypatch, "-p", "MyPlans").left()


@pytest.mark.parametrize("size", [0, 100])
def test_a_checkpoint_that_nnunet_was_killed_in_is_not_used(tmp_path: Path, size: int) -> None:
    checkpoint = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"a": torch.zeros(100)}}, checkpoint)
    assert _is_whole(checkpoint, "nnUNetTrainer")
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    assert not _is_whole(checkpoint, "nnUNetTrainer") and not checkpoint.exists()
    assert not _is_whole(tmp_path / "missing.pth", "MisFMTrainer")


def test_what_a_run_of_other_weights_has_left_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    class Trainer:
        def __init__(self, order: RunOrder, device: Any, continues: bool):
            self.order = order

        def run_training(self) -> None:
            trained.append(self.order.about.weights_sha256 or "")
            fold = self.order.results / "fold_0"
            fold.mkdir()
            logged = {"mean_fg_dice": [0.5], "epoch_start_timestamps": [0.0], "epoch_end_timestamps": [1.0]}
            torch.save({"logging": logged}, fold / "checkpoint_final.pth")

    monkeypatch.setattr(one_run, "_trainer", Trainer)
    device, first, second = torch.device("cpu"), order_in(tmp_path, "a"), order_in(tmp_path, "b")
    one_run._train(first, device)
    one_run._train(first, device)
    assert trained == ["a"]
    one_run._train(second, device)
    assert trained == ["a", "b"] and "is of other weights or plans" in capsys.readouterr().out
    (second.results / "made_with.json").unlink()
    one_run._train(second, device)
    assert trained == ["a", "b", "b"]


@pytest.mark.parametrize(("patch_size", "at_once"), [([16, 16, 8], 2), ([80, 80, 8], 1)])
def test_small_networks_predict_a_patch_twice_at_once_and_the_same(patch_size: list[int], at_once: int) -> None:
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 2, 1)).eval()
    image = torch.randn(1, 1, *patch_size)
    with torch.inference_mode():
        expected = network(image)
        _use_onednn(SimpleNamespace(network=network, configuration_manager=SimpleNamespace(patch_size=patch_size)))
        seen: list[int] = []
        network[0].register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
        torch.testing.assert_close(network(image), expected)
    assert seen == [at_once]


def test_workers_of_a_run_that_was_killed_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "python"
    run.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/worker\nkill -9 $$\n", encoding="utf-8")
    run.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(run))
    (failure,) = Runner("cpu", (), 1).perform([order_in(tmp_path)], "runs", 1)
    assert failure.title == "run"
    status = Path("/proc", (tmp_path / "worker").read_text(encoding="utf-8").strip(), "status")

    def ended() -> bool:
        try:
            return "State:\tZ" in status.read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            return True

    # The kernel ends a process soon after the signal, not with it.
    assert any(ended() or time.sleep(0.1) for _ in range(100))
