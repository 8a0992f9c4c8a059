"""Every pretext task through the trainer: trained, stopped, continued, refused where it does not belong."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_dataset import NAME, assert_predicted_as_validated
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from torch import nn

from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint
from nnunetv2_misfm.checkpoints.source import read_source
from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS
from nnunetv2_misfm.pretrain.masked_autoencoder import MaskedAutoencoder
from nnunetv2_misfm.pretrain.tasks import task_class
from nnunetv2_misfm.start_up import add_plugin_folder

SMALL = ["-features_per_stage", "4", "4", "4", "8", "16", "-patch_size", "16", "16", "16", "-batch_size", "2"]
SHORT = ["-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1", "-num_epochs", "1", "-device", "cpu"]
# The trainer is the same for all tasks, and tests/pretrain/test_tasks.py looks at each: by default one task is enough,
# and for CI one with a head of its own besides.
every_task = pytest.mark.parametrize(
    "name",
    [
        "masked_autoencoder",
        pytest.param("vox2vec", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=pytest.mark.variants)
            for name in PRETEXT_TASKS
            if name not in ("masked_autoencoder", "vox2vec")
        ),
    ],
)
whole_jobs = pytest.mark.parametrize(
    ("name", "network"),
    [
        pytest.param("masked_autoencoder", "plan", marks=pytest.mark.end_to_end),
        pytest.param("vox2vec", "pctnet", marks=pytest.mark.end_to_end),
        *(
            pytest.param(name, network, marks=pytest.mark.variants)
            for name in PRETEXT_TASKS
            for network in ("pctnet", "plan")
            if (name, network) not in (("masked_autoencoder", "plan"), ("vox2vec", "pctnet"))
        ),
    ],
)


def run_folder(task: str, plans: str) -> Path:
    name = f"{task_class(task).trainer()}__{plans}__3d_fullres"
    return Path(os.environ["nnUNet_results"]) / NAME / name / "fold_all"


def pretrain(task: str, plans: str, *more: str) -> dict[str, Any]:
    """Train and read the checkpoint."""
    add_plugin_folder()
    misfm_pretrain(["-d", "4", "-pretext", task, *SMALL, *SHORT, "-overwrite_plans_name", plans, *more])
    return read_checkpoint(run_folder(task, plans) / "checkpoint_final.pth")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        misfm_pretrain(list(arguments))
    return capsys.readouterr().err


def made_trainer(name: str, plans: str) -> Any:
    add_plugin_folder()
    return get_trainer_from_args(NAME, "3d_fullres", "all", name, plans, False, torch.device("cpu"))


def stop_in_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_misfm.trainers.pretraining_trainer import PretrainingTrainer

    optimise, calls = PretrainingTrainer._optimise, []

    def interrupted(self: Any, batch: Any) -> dict:
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(self, batch)

    monkeypatch.setattr(PretrainingTrainer, "_optimise", interrupted)


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("network_weights", "pretext_head"):
        for key, value in one.get(part, {}).items():
            assert torch.equal(value, other[part][key]), key
    assert one["logging"]["val_losses"] == other["logging"]["val_losses"]


@every_task
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = pretrain(name, "Whole")
    assert whole["misfm"]["task"] == name and "score" in whole["misfm"]["training"]
    folder = run_folder(name, "Whole")
    learnt = read_source(folder / "checkpoint_final.pth").learnt
    assert learnt and f"pseudo Dice: {learnt}" in next(folder.glob("training_log*.txt")).read_text(encoding="utf-8")
    assert whole["trained_parts"] == list(task_class(name).trains)
    assert (folder / task_class(name).picture_name).is_file()
    assert (folder / "validation" / "summary.json").is_file()
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_second_step(patch)
        pretrain(name, "Stopped")
    assert_same_state(whole, pretrain(name, "Stopped", "--c"))


class WithHead(MaskedAutoencoder):
    """Trains a layer of its own on the network's output, and only the encoder is said to learn."""

    trains = ("stem", "encoder")

    def head(self, network: nn.Module, num_channels: int) -> nn.Module:
        """A convolution."""
        return nn.Conv3d(num_channels, num_channels, 1)

    def forward(self, network: nn.Module, head: nn.Module | None, x: torch.Tensor, target: Any) -> Any:
        """Through both."""
        assert head is not None
        return head(network(x))


def test_what_a_task_trains_beside_the_network_is_saved_and_continued(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunetv2_misfm.pretrain.masked_autoencoder.MaskedAutoencoder", WithHead)
    whole = pretrain("masked_autoencoder", "Whole")
    assert set(whole["pretext_head"]) == {"weight", "bias"} and whole["trained_parts"] == ["stem", "encoder"]
    assert not any("head" in key.split(".")[0] for key in whole["network_weights"])
    run = made_trainer("PretrainingTrainer", "Whole")
    run.initialize()
    initial = run.bare_model.head.weight.detach()
    assert not torch.equal(initial, whole["pretext_head"]["weight"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_second_step(patch)
        pretrain("masked_autoencoder", "Stopped")
    assert_same_state(whole, pretrain("masked_autoencoder", "Stopped", "--c"))


@pytest.mark.variants
@pytest.mark.parametrize("name", [name for name in PRETEXT_TASKS if name != "volume_fusion"])
def test_two_processes_train_as_one_does(nnunet: Path, name: str) -> None:
    """nnU-Net's U-Net: it has no BatchNorm, which processes on CPUs cannot share, and no dropout."""
    arguments = [
        "-d",
        "4",
        "-pretext",
        name,
        *SHORT,
        "-network",
        "plan",
        "-batch_size",
        "2",
        "-patch_size",
        *3 * ["16"],
    ]
    arguments += ["-optimizer", "sgd", "-initial_lr", "0.001"]  # larger steps blow rounding up
    rows = []
    for plans, start in (
        ("One", []),
        ("Two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        command = [sys.executable, *start, "-m", "nnunetv2_misfm.pretrain", *arguments]
        done = subprocess.run([*command, "-overwrite_plans_name", plans], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        with open(run_folder(name, plans) / "metrics.csv", encoding="utf-8", newline="") as file:
            rows.append([float(row[key]) for row in csv.DictReader(file) for key in ("train_loss", "val_loss")])
    assert len(rows[0]) == 2 and rows[0] == pytest.approx(rows[1], rel=5e-5)


def test_options_of_another_task_are_refused(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "-d", "4", "-mask_ratio", "0.5", *SHORT)
    assert "-mask_ratio: for -pretext masked_autoencoder, not for volume_fusion" in message
    message = refused(capsys, "-d", "4", "-pretext", "masked_autoencoder", "-num_boxes", "1", "2", *SHORT)
    assert "-num_boxes: for -pretext volume_fusion, not for masked_autoencoder" in message


def test_a_task_has_its_own_plans_and_defaults_and_keeps_both(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["-d", "4", "-pretext", "masked_autoencoder", *SMALL, *SHORT, "--only_prepare"]
    misfm_pretrain([*asked, "-mask_ratio", "0.5"])
    plans = "nnUNetMisFMPretrainMaskedAutoencoderPlans"
    assert f"-p {plans}" in capsys.readouterr().out
    run = made_trainer("PretrainingTrainer", plans)
    assert run.task.settings.mask_ratio == 0.5 and run.settings.optimizer == "sgd"
    assert not run.enable_deep_supervision and run.label_manager.num_segmentation_heads == 1
    misfm_pretrain(["-d", "4", "-p", plans, *SHORT, "--only_prepare"])
    assert made_trainer("PretrainingTrainer", plans).task.settings.mask_ratio == 0.5
    message = refused(capsys, "-d", "4", "-pretext", "volume_fusion", "-overwrite_plans_name", plans, *SHORT)
    assert "is for the pretext task masked_autoencoder, not for volume_fusion" in message


def test_a_trainer_says_which_plans_it_cannot_use(nnunet: Path) -> None:
    misfm_pretrain(["-d", "4", "-pretext", "masked_autoencoder", *SHORT, "--only_prepare"])
    with pytest.raises(PlanError, match="are for the pretext task masked_autoencoder. Use -tr PretrainingTrainer"):
        made_trainer("VolumeFusionTrainer", "nnUNetMisFMPretrainMaskedAutoencoderPlans")
    with pytest.raises(PlanError, match="name no pretext task.*-pretext NAME"):
        made_trainer("PretrainingTrainer", "nnUNetPlans")


@whole_jobs
def test_from_volumes_to_a_segmentation(nnunet: Path, tmp_path: Path, name: str, network: str) -> None:
    sizes = SMALL if network == "pctnet" else ["-patch_size", "16", "16", "16"]
    add_plugin_folder()
    misfm_pretrain(["-d", "4", "-pretext", name, "-network", network, *sizes, *SHORT, "-overwrite_plans_name", "Task"])
    checkpoint = run_folder(name, "Task") / "checkpoint_final.pth"
    content = read_checkpoint(checkpoint)
    if network == "plan":
        assert content["nnssl_adaptation_plan"]["key_to_encoder"] == "encoder.stages"
        stock = get_trainer_from_args(NAME, "3d_fullres", 0, "nnUNetTrainer", "nnUNetPlans", False, torch.device("cpu"))
        stock.initialize()
        load_pretrained_weights(stock.network, str(checkpoint))
        key = "encoder.stages.1.0.convs.0.conv.weight"
        assert torch.equal(stock.network.state_dict()[key], content["network_weights"][key])
    misfm_plan(["-d", "4", *SHORT[:-2], "-pretrained_weights", str(checkpoint), "-overwrite_plans_name", "Tuned"])
    run = get_trainer_from_args(NAME, "3d_fullres", 0, "MisFMTrainer", "Tuned", False, torch.device("cpu"))
    run.run_training()
    run.perform_actual_validation()
    assert_predicted_as_validated(Path(run.output_folder), tmp_path / "out")
