"""What happens in a long pretraining run: it is stopped, steps overflow, several stems take turns."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from nnunet_dataset import NAME
from nnunetv2.run.run_training import get_trainer_from_args
from torch import nn

from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint
from nnunetv2_misfm.checkpoints.shrunk_weights import shrunk_alarm
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.files import LockedError
from nnunetv2_misfm.pretrain.task import Scores
from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings, VolumeFusion
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.trainers.epoch_clock import EpochClock
from nnunetv2_misfm.trainers.interrupted_epoch import InterruptedEpoch
from nnunetv2_misfm.trainers.pretext_data import hold_out
from nnunetv2_misfm.trainers.step_guard import MOST_IN_A_ROW, StepGuard, TrainingDivergedError

SMALL = [
    "-patch_size",
    "16",
    "16",
    "16",
    "-batch_size",
    "2",
    "-features_per_stage",
    "4",
    "4",
    "8",
    "16",
    "32",
    "-device",
    "cpu",
]
FINE = {"predicted": [0.2] * 5, "dice": [0.5] * 5}
SHORT = ["-num_iterations_per_epoch", "3", "-num_val_iterations_per_epoch", "1", "-num_epochs", "2"]


def run_folder(plans: str) -> Path:
    return Path(os.environ["nnUNet_results"]) / NAME / f"VolumeFusionTrainer__{plans}__3d_fullres" / "fold_all"


def pretrain(plans: str, *more: str) -> Path:
    add_plugin_folder()
    misfm_pretrain(["-d", "4", *SMALL, *SHORT, "-overwrite_plans_name", plans, *more])
    return run_folder(plans) / "checkpoint_final.pth"


def made_trainer(plans: str) -> Any:
    add_plugin_folder()
    return get_trainer_from_args(NAME, "3d_fullres", "all", "VolumeFusionTrainer", plans, False, torch.device("cpu"))


def trainer_class() -> Any:
    from nnunetv2_misfm.trainers.volume_fusion_trainer import VolumeFusionTrainer

    return VolumeFusionTrainer


def stop_in_iteration(monkeypatch: pytest.MonkeyPatch, number: int, kind: signal.Signals) -> None:
    """Send this process a signal while the training step of this number runs."""
    optimise = trainer_class()._optimise
    calls = []

    def interrupted(self: Any, batch: Any) -> dict:
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), kind)
        return optimise(self, batch)

    monkeypatch.setattr(trainer_class(), "_optimise", interrupted)


@pytest.mark.parametrize("kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_goes_on_in_the_middle_of_its_epoch(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    whole = read_checkpoint(pretrain("Whole"))
    with monkeypatch.context() as patch:
        stop_in_iteration(patch, 5, kind)
        with pytest.raises(SystemExit) as stopped:
            pretrain("Stopped")
    assert stopped.value.code == 128 + kind
    saved = read_checkpoint(run_folder("Stopped") / "checkpoint_latest.pth")
    assert saved["current_epoch"] == 1 and len(saved["interrupted_epoch"]["losses"]) == 2
    continued = read_checkpoint(pretrain("Stopped", "--c"))
    for key, value in whole["network_weights"].items():
        assert torch.equal(value, continued["network_weights"][key]), key
    assert whole["logging"]["train_losses"] == continued["logging"]["train_losses"]
    assert "interrupted_epoch" not in continued


def test_steps_without_finite_gradients_change_nothing_and_are_counted(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain("Overflow", "--only_prepare")
    run = get_trainer_from_args(
        NAME, "3d_fullres", "all", "VolumeFusionTrainer", "Overflow", False, torch.device("cpu")
    )
    run.on_train_start()
    run.on_train_epoch_start()
    before = {key: value.clone() for key, value in run.bare_network.state_dict().items()}
    make = run.task.make

    def overflowing(batch: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        data, labels = make(batch, device)
        return torch.full_like(data, torch.inf), labels

    monkeypatch.setattr(run.task, "make", overflowing)
    outputs = [run.train_step(next(run.dataloader_train))]
    after = run.bare_network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "num_batches_tracked" not in k)
    monkeypatch.setattr(run.task, "make", make)
    outputs.append(run.train_step(next(run.dataloader_train)))
    run.on_train_epoch_end(outputs)
    assert run._guard.skipped == 1
    assert np.isfinite(run.logger.get_value("train_losses", step=-1))
    assert not torch.equal(before["encoder.stage2.conv.2.weight"], after["encoder.stage2.conv.2.weight"])


def test_persistent_overflow_ends_the_run_with_advice() -> None:
    guard = StepGuard(torch.nn.BatchNorm3d(2), lambda: "Take a lower -initial_lr.")
    for _ in range(MOST_IN_A_ROW):
        guard.before_step()
        assert not guard.accept(torch.tensor(torch.nan))
    with pytest.raises(TrainingDivergedError, match="21 steps in a row. Take a lower -initial_lr"):
        guard.accept(torch.tensor(torch.inf))


def test_the_checkpoint_to_go_on_from_is_named_if_there_is_one(nnunet: Path) -> None:
    pretrain("Diverging", "--only_prepare")
    run = made_trainer("Diverging")
    run.on_train_start()
    assert run._after_divergence() == "Nothing is saved yet: start again with a lower -initial_lr of misfm_pretrain."
    run.save_checkpoint(str(run_folder("Diverging") / "checkpoint_latest.pth"))
    assert run._after_divergence().startswith("The last checkpoint is good: continue from it with --c")


@pytest.mark.slow
def test_an_error_while_crops_are_read_ends_the_command(nnunet: Path) -> None:
    """Also its workers, which would otherwise be waited for: 15 minutes in which a GPU is taken."""
    pretrain("Damaged", "--only_prepare")
    for path in (nnunet / "nnUNet_preprocessed" / NAME / "nnUNetPlans_3d_fullres").glob("*.b2nd"):
        path.write_bytes(path.read_bytes()[:100])
    program = "import sys; from nnunetv2_misfm.commands.pretrain import main; main(sys.argv[1:])"
    words = ["-d", "4", "-p", "Damaged", "-device", "cpu"]
    environment = {**os.environ, "nnUNet_n_proc_DA": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2 and "cannot be used" in done.stderr, done.stderr


def test_an_interrupted_epoch_keeps_what_all_processes_have_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    of_two = {True: [[1.0, 2.0], [3.0, 6.0]], False: [[], []]}
    monkeypatch.setattr(
        "nnunetv2_misfm.trainers.interrupted_epoch.from_all_processes",
        lambda one: of_two[isinstance(one[0], float)],
    )
    assert InterruptedEpoch.now([1.0, 2.0], torch.device("cpu")).losses == [2.0, 4.0]


def test_a_score_that_is_no_number_counts_for_none(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the running mean, and with it the best checkpoint, would stay as they are for good."""
    scores, of_task = chain([0.1, float("nan")], repeat(0.9)), trainer_class().on_validation_epoch_end

    def on_validation_epoch_end(self: Any, outputs: list[dict]) -> None:
        monkeypatch.setattr(self.task, "scores", lambda _: Scores(next(scores), [0.0], dict(FINE), "as told"))
        of_task(self, outputs)

    monkeypatch.setattr(trainer_class(), "on_validation_epoch_end", on_validation_epoch_end)
    final = read_checkpoint(pretrain("Odd", "-num_epochs", "3"))
    assert final["logging"]["ema_fg_dice"] == pytest.approx([0.1, 0.1, 0.18])
    assert read_checkpoint(run_folder("Odd") / "checkpoint_best.pth")["current_epoch"] == 3


def test_a_run_that_goes_on_keeps_what_it_had_learnt(nnunet: Path) -> None:
    final = read_checkpoint(pretrain("Whole"))["misfm"]["training"]
    run = made_trainer("Whole")
    run.load_checkpoint(str(run_folder("Whole") / "checkpoint_final.pth"))
    run.save_checkpoint(str(run_folder("Whole") / "checkpoint_latest.pth"))
    again = read_checkpoint(run_folder("Whole") / "checkpoint_latest.pth")["misfm"]["training"]
    assert final["learnt"] and (again["learnt"], again["score"]) == (final["learnt"], final["score"])


def test_one_good_step_starts_the_count_again() -> None:
    guard = StepGuard(torch.nn.BatchNorm3d(2), str)
    guard.before_step()
    for _ in range(3):
        for _ in range(MOST_IN_A_ROW):
            assert not guard.accept(torch.tensor(torch.nan))
        assert guard.accept(torch.tensor(1.0))


def test_all_stems_are_trained_in_turn(nnunet: Path) -> None:
    content = read_checkpoint(pretrain("Universal", "-stems", "all"))
    assert content["misfm"]["arch_kwargs"]["stems"] == [0, 1, 2]
    add_plugin_folder()
    run = get_trainer_from_args(
        NAME, "3d_fullres", "all", "VolumeFusionTrainer", "Universal", False, torch.device("cpu")
    )
    run.initialize()
    initial = run.bare_network.state_dict()
    for degree in "012":
        for part in (f"encoder.stems.{degree}.project.weight", f"decoder.heads.{degree}.up0.merge.2.weight"):
            assert not torch.equal(content["network_weights"][part], initial[part]), part
    # The memory of a step is that of the stem with the largest maps.
    by_stem = {}
    for degree in (0, 1, 2):
        run._degrees = (degree,)
        by_stem[degree] = run._bytes_of_a_step(checkpointing=False)
    assert by_stem[0] < by_stem[1] < by_stem[2]
    run._degrees = (0, 1, 2)
    assert run._bytes_of_a_step(checkpointing=False) == by_stem[2]


def test_alarms_name_the_trouble_and_what_to_try() -> None:
    def alarms(losses: list[float], predicted: list[float], dice: list[float]) -> list[str]:
        scores = Scores(0.0, [0.0], {"predicted": predicted, "dice": dice}, "")
        return VolumeFusion(settings).alarms(losses, scores)

    settings = FusionSettings()

    fine = [0.2] * 5
    assert alarms([1.0, 0.9, 0.8], fine, fine) == []
    assert "class 2 only" in alarms([1.0, 0.9, 0.8], [0, 0, 1.0, 0, 0], [0.0] * 5)[0]
    assert "has not moved" in alarms([1.0] * 10, fine, [0.4, 0, 0, 0, 0])[0]
    assert "-geometry blocks" in alarms([1.0] * 10, fine, [0.0] * 5)[0]
    settings = FusionSettings(geometry="blocks")
    assert "-geometry boxes" in alarms([1.0] * 10, fine, [0.0] * 5)[0]
    assert alarms([0.1] * 10, fine, [0.9] * 5) == []


def test_an_alarm_names_weights_that_have_shrunk() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert shrunk_alarm(network) == []
    with torch.no_grad():
        network[1].weight.zero_()
    assert "shrunk weights to nothing in 1.weight (1 of 1); fine-tuning" in shrunk_alarm(network)[0]


def test_a_unet_checkpoint_says_where_its_encoder_is(nnunet: Path) -> None:
    misfm_pretrain(["-d", "4", "-device", "cpu", "-network", "plan", *SHORT, "-num_epochs", "1"])
    content = read_checkpoint(run_folder("nnUNetMisFMPretrainPlans") / "checkpoint_final.pth")
    block = content["nnssl_adaptation_plan"]
    assert block["key_to_encoder"] == "encoder.stages" and block["key_to_lpe"] is None
    assert all(f"{key}.weight" in content["network_weights"] for key in block["keys_to_in_proj"])
    json.dumps(block)


def test_a_damaged_latest_checkpoint_is_replaced_by_the_one_before(nnunet: Path) -> None:
    pretrain("Damaged", "--only_prepare")
    run = made_trainer("Damaged")
    run.initialize()
    latest = Path(run.output_folder) / "checkpoint_latest.pth"
    for epoch in (0, 1):
        run.current_epoch = epoch
        run.save_checkpoint(str(latest))
    latest.write_bytes(latest.read_bytes()[:1000])
    resumed = made_trainer("Damaged")
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 1


def test_a_second_run_in_the_same_folder_is_refused(nnunet: Path) -> None:
    pretrain("Twice", "--only_prepare")
    first = made_trainer("Twice")
    lock = FileLock(Path(first.output_folder) / ".training.lock")
    with lock, pytest.raises(LockedError, match="another process trains"):
        first.run_training()


@pytest.mark.slow
def test_a_run_stopped_in_the_last_iteration_of_an_epoch_goes_on(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_checkpoint(pretrain("Whole"))
    with monkeypatch.context() as patch:
        stop_in_iteration(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            pretrain("Stopped")
    continued = read_checkpoint(pretrain("Stopped", "--c"))
    assert continued["current_epoch"] == 2 and "interrupted_epoch" not in continued
    assert whole["logging"]["val_losses"] == continued["logging"]["val_losses"]
    for key, value in whole["network_weights"].items():
        assert torch.equal(value, continued["network_weights"][key]), key


@pytest.mark.slow
def test_a_run_stopped_in_its_validation_goes_on(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("-num_val_iterations_per_epoch", "3")
    whole = read_checkpoint(pretrain("Whole", *options))
    validated = []
    with monkeypatch.context() as patch:
        count = VolumeFusion.count

        def stopping(self: VolumeFusion, outputs: Any, target: Any) -> dict[str, Any]:
            validated.append(None)
            if len(validated) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return count(self, outputs, target)

        patch.setattr(VolumeFusion, "count", stopping)
        with pytest.raises(SystemExit) as stopped:
            pretrain("Stopped", *options)
    assert stopped.value.code == 128 + signal.SIGTERM and len(validated) <= 3
    saved = read_checkpoint(run_folder("Stopped") / "checkpoint_latest.pth")
    assert saved["current_epoch"] == 0 and len(saved["interrupted_epoch"]["losses"]) == 3
    continued = read_checkpoint(pretrain("Stopped", "--c", *options))
    assert whole["logging"]["val_losses"] == continued["logging"]["val_losses"]
    for key, value in whole["network_weights"].items():
        assert torch.equal(value, continued["network_weights"][key]), key


def test_an_epoch_of_which_nothing_is_left_has_no_speed() -> None:
    speed = EpochClock(torch.device("cpu")).speed(0, 0.0)
    assert speed.iterations_per_s is None and "left" not in speed.text(1000)
    assert "about" in EpochClock(torch.device("cpu")).speed(1, 0.0).text(1000)


def test_a_crash_between_two_checkpoints_does_not_let_a_worse_one_be_the_best(nnunet: Path) -> None:
    """nnU-Net saves the latest checkpoint of an epoch before it has looked whether the epoch is the best."""
    pretrain("Crashed", "--only_prepare")
    run = made_trainer("Crashed")
    run.initialize()
    for epoch, score in enumerate((0.1, 0.9)):
        run.logger.log("mean_fg_dice", score, epoch)
    run.current_epoch, run._best_ema = 1, 0.1
    latest = Path(run.output_folder) / "checkpoint_latest.pth"
    run.save_checkpoint(str(latest))
    resumed = made_trainer("Crashed")
    resumed.load_checkpoint(str(latest))
    assert resumed._best_ema == pytest.approx(0.9 * 0.1 + 0.1 * 0.9)


@pytest.mark.parametrize(("volumes", "held_out"), [(10, 2), (29, 2), (60, 3), (10_000, 50)])
def test_two_volumes_at_least_are_held_out(volumes: int, held_out: int) -> None:
    training, validation = hold_out([f"case_{i}" for i in range(volumes)])
    assert len(validation) == held_out and len(training) == volumes - held_out and not {*training} & {*validation}


@pytest.mark.slow
def test_an_extended_run_that_is_stopped_does_not_fall_back_to_its_old_end(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain("Extended", "-num_epochs", "1")
    with monkeypatch.context() as patch:
        stop_in_iteration(patch, 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            pretrain("Extended", "--c", "-num_epochs", "3")
    assert not (run_folder("Extended") / "checkpoint_final.pth").exists()
    saved = read_checkpoint(run_folder("Extended") / "checkpoint_latest.pth")
    assert saved["current_epoch"] == 2
    assert read_checkpoint(pretrain("Extended", "--c", "-num_epochs", "3"))["current_epoch"] == 3


@pytest.mark.slow
def test_the_learning_rate_may_change_when_a_run_goes_on(nnunet: Path) -> None:
    pretrain("Slower", "-num_epochs", "1")
    content = read_checkpoint(pretrain("Slower", "--c", "-num_epochs", "2", "-initial_lr", "0.0001"))
    assert content["optimizer_state"]["param_groups"][0]["lr"] < 0.0002


@pytest.mark.slow
def test_a_data_worker_that_is_killed_ends_the_run_with_its_reason(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the system does when memory runs out."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    optimise = trainer_class()._optimise

    def killing(self: Any, batch: Any) -> dict:
        if self.current_epoch == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
        return optimise(self, batch)

    with monkeypatch.context() as changed, pytest.raises(SystemExit):
        changed.setattr(trainer_class(), "_optimise", killing)
        pretrain("Killed")
    message = capsys.readouterr().err
    assert "killed by signal: Killed" in message and "nnUNet_n_proc_DA, now 2" in message
    assert "Traceback" not in message
    assert read_checkpoint(pretrain("Killed", "--c"))["current_epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_saves_and_ends_without_a_traceback(
    nnunet: Path, kind: signal.Signals
) -> None:
    """As clusters and terminals send it: to the data workers too."""
    arguments = ["-d", "4", *SMALL, *SHORT, "-num_epochs", "500", "-overwrite_plans_name", "Group"]
    environment = {**os.environ, "nnUNet_n_proc_DA": "2"}
    job = subprocess.Popen(
        [sys.executable, "-m", "nnunetv2_misfm.pretrain", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 240
    while not (run_folder("Group") / "metrics.csv").exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert (run_folder("Group") / "metrics.csv").exists(), "no epoch in four minutes"
    os.killpg(job.pid, kind)
    time.sleep(0.05)
    if kind == signal.SIGTERM:
        os.killpg(job.pid, kind)  # torchrun passes it on to processes that the cluster has signalled itself
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + kind and "Asked to stop: saved" in output and "Traceback" not in output
    assert "interrupted_epoch" in read_checkpoint(run_folder("Group") / "checkpoint_latest.pth")
