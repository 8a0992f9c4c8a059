"""Both trainers through nnU-Net's own loop: what is trained and written, and that a resumed run is the same run."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_dataset import NAME, assert_predicted_as_validated
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from program_end import ends_as_a_program

from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError, read_checkpoint
from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.commands.report import main as misfm_report
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.settings import SettingsError
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.trainers.base import BaseTrainer
from nnunetv2_misfm.trainers.metrics_file import read_rows
from nnunetv2_misfm.trainers.step_guard import TrainingDivergedError
from nnunetv2_misfm.transfer.transfer import TransferError

CPU = torch.device("cpu")
PATCH = ["-patch_size", "16", "16", "16", "-batch_size", "2"]
NETWORK = [*PATCH, "-features_per_stage", "4", "4", "8", "16", "32"]
SHORT = ["-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1"]


def trainer(name: str, plans: str, fold: str | int = 0, continue_training: bool = False) -> BaseTrainer:
    """A trainer as nnUNetv2_train makes it, found by name."""
    add_plugin_folder()
    made = get_trainer_from_args(NAME, "3d_fullres", fold, name, plans, continue_training, CPU)
    maybe_load_checkpoint(made, continue_training, False)
    return made


def pretrain(num_epochs: int = 2, *more: str) -> Path:
    add_plugin_folder()
    misfm_pretrain(["-d", "4", "-device", "cpu", "-num_epochs", str(num_epochs), *NETWORK, *SHORT, *more])
    return run_folder("VolumeFusionTrainer", "nnUNetMisFMPretrainPlans") / "fold_all" / "checkpoint_final.pth"


_CHECKPOINT: list[bytes] = []


def pretrained() -> Path:
    """What a pretraining leaves, made once: every test has the same dataset and would train the same weights."""
    path = run_folder("VolumeFusionTrainer", "nnUNetMisFMPretrainPlans") / "fold_all" / "checkpoint_final.pth"
    if not _CHECKPOINT:
        _CHECKPOINT.append(pretrain(1).read_bytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_CHECKPOINT[0])
    return path


def plan(*more: str, num_epochs: int = 2) -> None:
    misfm_plan(["-d", "4", "-num_epochs", str(num_epochs), *SHORT, *PATCH, *more])


def begun_run() -> str:
    """The checkpoint of a fine-tuning of fold 0 that has begun."""
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.on_train_start()
    latest = str(Path(run.output_folder) / "checkpoint_latest.pth")
    run.save_checkpoint(latest)
    return latest


def run_folder(trainer_name: str, plans: str) -> Path:
    return Path(os.environ["nnUNet_results"]) / NAME / f"{trainer_name}__{plans}__3d_fullres"


def test_pretrain_plan_finetune_and_predict(nnunet: Path, tmp_path: Path) -> None:
    """The main job: what pretraining learnt arrives, and stock nnU-Net rebuilds the result from its folder."""
    checkpoint = pretrain()
    pretrained = read_checkpoint(checkpoint)
    assert pretrained["misfm"]["num_classes"] == 5
    assert (checkpoint.parent / "fused_samples.png").stat().st_size > 1000
    assert len((checkpoint.parent / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert len(json.loads((checkpoint.parent / "validation" / "summary.json").read_text(encoding="utf-8"))["dice"]) == 5

    plan("-pretrained_weights", str(checkpoint))
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.on_train_start()
    weights = run.bare_network.state_dict()
    for key, value in pretrained["network_weights"].items():
        assert ".seg_layers." in key or torch.equal(weights[key], value), key
    report = json.loads((Path(run.output_folder) / "transfer_report.json").read_text(encoding="utf-8"))
    assert report["coverage"]["decoder"] == 1 and report["coverage"]["segmentation layers"] == 0
    run.on_train_end()

    checkpoint.rename(tmp_path / "moved.pth")
    trained = trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=True)
    trained.run_training()
    trained.perform_actual_validation()
    page = (Path(run.output_folder) / "run.html").read_text(encoding="utf-8")
    assert "nnU-Net&#39;s validation" in page or "nnU-Net's validation" in page
    assert_predicted_as_validated(Path(run.output_folder), tmp_path / "out")

    for folder, said in ((checkpoint.parent, "Finished: all 2 epochs"), (Path(run.output_folder), "decoder")):
        page = folder / "run.html"
        assert said in page.read_text(encoding="utf-8"), "the run has written it by itself"
        page.unlink()
        misfm_report([str(folder.parent)])
        assert said in page.read_text(encoding="utf-8")


def test_progress_is_drawn_now_and_then_and_at_the_end(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, epochs in ((1e9, [1, 3]), (0.0, [1, 2, 3])):
        drawn: list[int] = []
        monkeypatch.setattr("nnunetv2_misfm.trainers.base._SECONDS_BETWEEN_DRAWINGS", seconds)
        monkeypatch.setattr(
            "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png",
            lambda logger, folder, drawn=drawn: drawn.append(len(logger.get_value("train_losses", step=None))),
        )
        pretrain(3, "--overwrite")
        assert drawn == epochs


def test_an_ordinary_plan_trains_pctnet_and_the_results_folder_rebuilds_it(nnunet: Path) -> None:
    run = trainer("MisFMTrainer", "nnUNetPlans")
    run.num_epochs, run.num_iterations_per_epoch, run.num_val_iterations_per_epoch = 1, 1, 1
    run.run_training()
    kept = json.loads((run_folder("MisFMTrainer", "nnUNetPlans") / "plans.json").read_text(encoding="utf-8"))
    entry = kept["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"] == "nnunetv2_misfm.architectures.PCTNet"
    stock = json.loads((nnunet / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json").read_text(encoding="utf-8"))
    assert "PlainConvUNet" in stock["configurations"]["3d_fullres"]["architecture"]["network_class_name"]
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(run_folder("MisFMTrainer", "nnUNetPlans")), (0,))
    assert type(predictor.network).__name__ == "PCTNet"


def test_a_run_on_the_cpu_takes_the_threads_it_is_given(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        torch.set_num_threads(2)  # nnUNetv2_train takes every core before it makes the trainer
        trainer("MisFMTrainer", "nnUNetPlans")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_all_four_outputs_are_trained(nnunet: Path) -> None:
    plan(*NETWORK)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.initialize()
    data = torch.randn(1, 1, 24, 32, 24)
    outputs = run.network(data)
    targets = [torch.zeros(1, 1, *output.shape[2:]) for output in outputs]
    assert len(outputs) == len(run._get_deep_supervision_scales()) == 4
    run.loss(outputs, targets).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in run.bare_network.decoder.seg_layers)


@pytest.mark.slow
def test_losses_fall_on_a_dataset_that_is_easy(nnunet: Path) -> None:
    plan(*NETWORK, "-num_iterations_per_epoch", "20", num_epochs=2)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.run_training()
    losses = run.logger.get_value("train_losses", step=None)
    assert losses[-1] < 0.9 * losses[0]


def test_a_resumed_pretraining_equals_an_uninterrupted_one(nnunet: Path) -> None:
    whole = read_checkpoint(pretrain(3))

    pretrain(3, "--overwrite", "-overwrite_plans_name", "Interrupted", "--only_prepare")
    first = trainer("VolumeFusionTrainer", "Interrupted", "all")
    first.on_train_start()
    _run_epochs(first, 2)
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    # nnU-Net counts the epoch up before a checkpoint is written at the end of a run.
    content = read_checkpoint(Path(first.output_folder) / "checkpoint_latest.pth")
    assert content["current_epoch"] == 3
    first.current_epoch -= 1
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))

    second = trainer("VolumeFusionTrainer", "Interrupted", "all", continue_training=True)
    assert second.current_epoch == 2
    second.run_training()
    resumed = read_checkpoint(Path(second.output_folder) / "checkpoint_final.pth")
    for key, value in whole["network_weights"].items():
        assert torch.equal(value, resumed["network_weights"][key]), key


def _run_epochs(run: Any, count: int) -> None:
    for _ in range(count):
        run.on_epoch_start()
        run.on_train_epoch_start()
        run.on_train_epoch_end(
            [run.train_step(next(run.dataloader_train)) for _ in range(run.num_iterations_per_epoch)]
        )
        with torch.no_grad():
            run.on_validation_epoch_start()
            steps = range(run.num_val_iterations_per_epoch)
            run.on_validation_epoch_end([run.validation_step(next(run.dataloader_val)) for _ in steps])
        run.on_epoch_end()


def test_a_missing_checkpoint_is_an_error_not_a_start_from_scratch(nnunet: Path) -> None:
    checkpoint = pretrained()
    plan("-pretrained_weights", str(checkpoint))
    checkpoint.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        trainer("MisFMTrainer", "nnUNetMisFMPlans").on_train_start()


def test_a_run_does_not_go_on_from_other_weights(nnunet: Path) -> None:
    checkpoint = pretrain(1)
    plan(*NETWORK, "-schedule", "sawtooth")
    latest = begun_run()
    plan("-pretrained_weights", str(checkpoint))
    goes_on = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    goes_on.load_checkpoint(latest)
    with pytest.raises(PlanError, match="pretrained weights: none then, .*checkpoint_final.pth now"):
        goes_on.on_train_start()


def test_an_optimiser_with_other_groups_is_no_obstacle_to_validation(nnunet: Path) -> None:
    plan(*NETWORK)
    latest = begun_run()
    plan(*NETWORK, "-layer_decay", "0.5")
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.load_checkpoint(latest)
    run.set_deep_supervision_enabled(False)
    with pytest.raises(PlanError, match="layer_decay: 1.0 then, 0.5 now"):
        run.on_train_start()


def test_folds_that_other_plans_trained_are_neither_validated_nor_mixed_with_new_ones(nnunet: Path) -> None:
    plan(*NETWORK)
    latest = begun_run()
    plan(*NETWORK, "-spacing", "1.1", "1.1", "1.1")
    changed = r"were trained with other plans.*\n  spacing: \[1.0, 1.0, 1.0\] then, \[1.1, 1.1, 1.1\] now"
    with pytest.raises(PlanError, match=changed):
        trainer("MisFMTrainer", "nnUNetMisFMPlans", fold=1).on_train_start()
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.load_checkpoint(latest)
    with pytest.raises(PlanError, match=r"(?s)spacing: \[1.0, 1.0, 1.0\] then.*nnUNetv2_predict"):
        run.perform_actual_validation()
    assert not (Path(run.output_folder) / "validation").exists()


def test_a_fold_from_other_weights_than_those_beside_it_says_so(nnunet: Path) -> None:
    plan(*NETWORK)
    begun_run()
    plan("-pretrained_weights", str(pretrained()))
    second = trainer("MisFMTrainer", "nnUNetMisFMPlans", fold=1)
    second.on_train_start()
    log = Path(second.log_file).read_text(encoding="utf-8")
    assert f"fold_0 in {second.output_folder_base} started from random weights; this fold does not." in log


def test_plans_of_a_pretraining_are_not_fine_tuned(nnunet: Path) -> None:
    pretrain(1)
    with pytest.raises(PlanError, match=r"plans of a pretraining \(volume_fusion\).*misfm_plan -d .* -c 3d_fullres"):
        trainer("MisFMTrainer", "nnUNetMisFMPretrainPlans")


def test_a_changed_checkpoint_is_noticed(nnunet: Path) -> None:
    checkpoint = pretrain(1)
    plan("-pretrained_weights", str(checkpoint))
    pretrain(1, "--overwrite", "-seed", "1")
    with pytest.raises(CheckpointError, match="not the file the plan was made with"):
        trainer("MisFMTrainer", "nnUNetMisFMPlans").on_train_start()


def starting_message(plans: str) -> str:
    """What a training with these plans says of its weights."""
    said: list[str] = []
    starting = trainer("MisFMTrainer", plans)
    starting.initialize()
    starting.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    starting._load_pretrained_weights()
    return said[-1]


def test_the_baseline_differs_in_nothing_but_weights_and_schedule(nnunet: Path) -> None:
    """And stands beside the plan of the fine-tuning, so that neither trains in the other's results folder."""
    checkpoint = pretrained()
    plan("-pretrained_weights", str(checkpoint))
    plan("-pretrained_weights", str(checkpoint), "--from_scratch")
    folder = nnunet / "nnUNet_preprocessed" / NAME
    names = ("nnUNetMisFMPlans", "nnUNetMisFMScratchPlans")
    ours, twin = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    assert (ours["misfm"].pop("schedule"), twin["misfm"].pop("schedule")) == ("sawtooth", "poly")
    assert "nnUNetMisFMPlans of this dataset name some" in starting_message("nnUNetPlans")  # without -p
    assert starting_message("nnUNetMisFMScratchPlans").endswith("name no pretrained weights.")
    assert ours.pop("pretrain_info")["checkpoint_path"] is not None
    assert twin.pop("pretrain_info")["checkpoint_path"] is None
    for plans in (ours, twin):
        plans["configurations"]["3d_fullres"].pop("data_identifier")
        plans.pop("plans_name")
    assert ours == twin


def test_learning_rates_of_the_parts_are_those_of_the_plan(nnunet: Path) -> None:
    plan(*NETWORK, "-initial_lr", "1e-3", "-layer_decay", "0.5", "-seg_layers_lr_factor", "10")
    tuned = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    tuned.initialize()
    rates = {group["name"]: group["lr"] for group in tuned.optimizer.param_groups}
    assert rates["decoder"] == pytest.approx(1e-3) and rates["seg_layers"] == pytest.approx(1e-2)
    assert max(group["lr"] for group in tuned.optimizer.param_groups if group["name"] == "encoder") < 1e-3


def test_planning_leaves_the_stock_data_alone(nnunet: Path) -> None:
    stock = nnunet / "nnUNet_preprocessed" / NAME / "nnUNetPlans_3d_fullres"
    before = {path.name: path.read_bytes() for path in stock.iterdir()}
    plan(*NETWORK)
    assert {path.name: path.read_bytes() for path in stock.iterdir()} == before
    entry = json.loads((stock.parent / "nnUNetMisFMPlans.json").read_text(encoding="utf-8"))["configurations"][
        "3d_fullres"
    ]
    assert entry["data_identifier"] == "nnUNetMisFMPlans_3d_fullres"
    assert sorted(p.name for p in (stock.parent / "nnUNetMisFMPlans_3d_fullres").iterdir()) == sorted(before)


def test_finished_runs_are_not_overwritten(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = pretrain(1)
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit):
        pretrain(1)
    assert "holds a finished run" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_2d_configurations_get_a_clear_error(nnunet: Path) -> None:
    add_plugin_folder()
    with pytest.raises(PlanError, match="is 2D"):
        get_trainer_from_args(NAME, "2d", 0, "MisFMTrainer", "nnUNetPlans", False, CPU)
    assert not list((nnunet / "nnUNet_results").rglob("fold_0"))


def test_volume_fusion_takes_fold_all_only(nnunet: Path) -> None:
    with pytest.raises(PlanError, match="fold all"):
        trainer("VolumeFusionTrainer", "nnUNetPlans", 0)


def test_volume_fusion_pretrains_the_network_of_the_plan_too(nnunet: Path) -> None:
    misfm_pretrain(["-d", "4", "-device", "cpu", "-network", "plan", "-num_epochs", "1", *SHORT])
    folder = run_folder("VolumeFusionTrainer", "nnUNetMisFMPretrainPlans") / "fold_all"
    info = read_checkpoint(folder / "checkpoint_final.pth")["misfm"]
    assert "PlainConvUNet" in info["network_class_name"]


FINE_TUNE_AS_ONE_OF_SEVERAL = """
import sys
import torch
import torch.distributed as dist
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2_misfm.start_up import add_plugin_folder

dist.init_process_group("gloo")
add_plugin_folder()
plans = "nnUNetMisFMScratchPlans"
run = get_trainer_from_args("4", "3d_fullres", 0, "MisFMTrainer", plans, False, torch.device("cpu"))
run.run_training()
torch.save((run.batch_size, run.bare_network.state_dict()), f"{sys.argv[1]}/{dist.get_rank()}.pth")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_fine_tune_one_network(nnunet: Path, tmp_path: Path) -> None:
    """As with nnUNetv2_train -num_gpus 2, through the epochs in which the encoder stands still too."""
    network = ["-network", "fmunet", *NETWORK, "-patch_size", "32", "32", "32"]
    plan("--from_scratch", *network, "-schedule", "sawtooth", num_epochs=3)
    script = tmp_path / "fine_tune.py"
    script.write_text(FINE_TUNE_AS_ONE_OF_SEVERAL, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*start, str(script), str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (batch, one), (_, other) = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert batch == 1  # of the two that are planned
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    final = run_folder("MisFMTrainer", "nnUNetMisFMScratchPlans") / "fold_0" / "checkpoint_final.pth"
    assert read_checkpoint(final)["current_epoch"] == 3


def test_too_little_memory_names_the_remedy(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(*NETWORK)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.initialize()
    shape = (run.batch_size, 1, *run.configuration_manager.patch_size)
    needed = {on: estimate_training_memory(run._new_network, shape, checkpointing=on).total for on in (False, True)}
    assert needed[True] < needed[False]
    limit = "nnunetv2_misfm.trainers.base.available_memory"
    monkeypatch.setattr(limit, lambda device: needed[False])
    run._fit_into_memory()
    assert not run.bare_network.checkpointing
    monkeypatch.setattr(limit, lambda device: (needed[True] + needed[False]) // 2)
    run._fit_into_memory()
    assert run.bare_network.checkpointing
    monkeypatch.setattr(limit, lambda device: needed[True] // 2)
    with pytest.raises(PlanError, match="misfm_plan .* -gpu_memory_target"):
        run._fit_into_memory()


def test_checkpointing_that_a_network_cannot_do_is_told(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("-network", "plan", "-checkpointing", "on")
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.initialize()
    run._fit_into_memory()
    assert "checkpointing is on in the plans, but a PlainConvUNet has none" in capsys.readouterr().out


@pytest.mark.parametrize(("features", "narrow"), [(8, True), (16, False)])
def test_only_small_networks_are_laid_out_anew_on_a_cpu(nnunet: Path, features: int, narrow: bool) -> None:
    """And the layout changes neither what they compute nor their gradients."""
    plan("-network", "plan")
    file = Path(os.environ["nnUNet_preprocessed"]) / NAME / "nnUNetMisFMPlans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [features] * network["n_stages"]
    file.write_text(json.dumps(plans), encoding="utf-8")
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.initialize()
    kernels = [p for p in run.bare_network.parameters() if p.ndim == 5 and min(p.shape) > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) == narrow for p in kernels)
    plain = run._new_network()
    plain.load_state_dict(run.bare_network.state_dict())
    image = torch.randn(2, 1, 16, 16, 16)
    gradients = []
    for each in (plain, run.bare_network):
        output = each(image)[0]
        output.square().mean().backward()
        gradients.append([output, *(p.grad for p in each.parameters() if p.grad is not None)])
    for expected, value in zip(*gradients, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)


def test_new_runs_put_the_checkpoints_of_earlier_ones_aside(nnunet: Path) -> None:
    """Else --c would take the end of an earlier run, which nnU-Net looks for first, for one of the new run.

    Not before they save one themselves: a run that cannot start, or saves none, takes no finished model away.
    """
    plan(*NETWORK)
    folder = run_folder("MisFMTrainer", "nnUNetMisFMPlans") / "fold_0"
    folder.mkdir(parents=True)
    left = ("checkpoint_final.pth", "checkpoint_best.pth", ".checkpoint_latest.pth.123.tmp")
    for run in ("first", "second"):
        for name in left:
            (folder / name).write_text(run, encoding="utf-8")
        new = trainer("MisFMTrainer", "nnUNetMisFMPlans")
        new.disable_checkpointing = True
        new.on_train_start()
        new.save_checkpoint(str(folder / "checkpoint_best.pth"))
        assert {(folder / name).read_text(encoding="utf-8") for name in left[:2]} == {run}
        new.disable_checkpointing = False
        new.save_checkpoint(str(folder / "checkpoint_latest.pth"))
        new.save_checkpoint(str(folder / "checkpoint_best.pth"))
        assert not list(folder.glob(".checkpoint*")) and not (folder / left[0]).exists()
        assert Path(new.log_file).is_file()
        for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
            (folder / name).unlink()
    found = folder.rglob("*checkpoint*")
    assert {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found} == {
        "earlier_1/checkpoint_best.pth": "first",
        "earlier_1/checkpoint_final.pth": "first",
        "earlier_2/checkpoint_best.pth": "second",
        "earlier_2/checkpoint_final.pth": "second",
    }
    again = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    again.on_train_start()  # there is nothing to put aside, but --c without a checkpoint ends here as well
    assert "earlier_1/checkpoint_final.pth" in Path(again.log_file).read_text(encoding="utf-8")


def test_a_run_that_ends_in_its_first_epoch_leaves_the_plans_of_the_one_before(nnunet: Path) -> None:
    """By which nnU-Net predicts with the checkpoints that are still there."""
    plan(*NETWORK, num_epochs=1)
    trainer("MisFMTrainer", "nnUNetMisFMPlans").run_training()
    results = run_folder("MisFMTrainer", "nnUNetMisFMPlans")
    before = (results / "plans.json").read_bytes()
    plan(*NETWORK, "-spacing", "2", "2", "2", num_epochs=1)
    new = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    new.on_train_start()
    assert (results / "plans.json").read_bytes() == before
    new.save_checkpoint(str(results / "fold_0" / "checkpoint_latest.pth"))
    spacing = {
        path: json.loads(path.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]["spacing"]
        for path in (results / "plans.json", results / "fold_0" / "earlier_1" / "plans.json")
    }
    assert list(spacing.values()) == [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]


class Skipping:
    """A gradient scaler as on a GPU: it leaves a step out whose gradients are not finite."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if all(p.grad is None or p.grad.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
            optimizer.step()

    def update(self) -> None: ...


@pytest.mark.parametrize("scaled", [True, False])
def test_a_forward_pass_that_overflows_does_not_stay_in_the_statistics(nnunet: Path, scaled: bool) -> None:
    """Of BatchNorm, by which every later prediction would be NaN while the loss looks healthy."""
    plan(*NETWORK, num_epochs=1)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.on_train_start()
    run.on_train_epoch_start()
    run.grad_scaler = Skipping() if scaled else None
    batch = next(run.dataloader_train)
    damaged = {**batch, "data": batch["data"].clone()}
    damaged["data"][0, 0, 3, 3, 3] = torch.inf
    if not scaled:  # the weights are lost
        with pytest.raises(TrainingDivergedError, match="Nothing is saved yet: start again .* of misfm_plan"):
            run.train_step(damaged)
        return
    outputs = [run.train_step(one) for one in (batch, damaged, batch)]
    assert all(buffer.isfinite().all() for buffer in run.bare_network.buffers())
    run.on_train_epoch_end(outputs)
    assert np.isfinite(run.logger.get_value("train_losses", step=-1)) and run._guard.skipped == 1
    assert "1 steps skipped so far" in Path(run.log_file).read_text(encoding="utf-8")


def test_a_run_does_not_go_on_under_plans_that_make_it_another_one(nnunet: Path) -> None:
    plan(*NETWORK, num_epochs=1)
    trainer("MisFMTrainer", "nnUNetMisFMPlans").run_training()
    final = run_folder("MisFMTrainer", "nnUNetMisFMPlans") / "fold_0" / "checkpoint_final.pth"
    before = final.read_bytes()
    plan(*NETWORK, "-optimizer", "sgd", "-batch_size", "3")
    with pytest.raises(PlanError, match="(?s)batch_size: 2 then, 3 now.*optimizer: adamw then, sgd now.*Plan as then"):
        trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=True).run_training()
    assert final.read_bytes() == before
    plan("-features_per_stage", "4", "8", "8", "16", "32")
    with pytest.raises(CheckpointError, match="network.features_per_stage"):
        trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=True)
    plan(*NETWORK, num_epochs=2)
    trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=True).run_training()
    assert read_checkpoint(final)["current_epoch"] == 2


class WandbConfig(dict):
    """W&B's settings of a run, which are kept and do not change unless told to."""

    def update(self, changes: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        for key, value in json.loads(json.dumps(changes, default=str)).items():
            if not allow_val_change and self.get(key, value) != value:
                raise ValueError(f"Attempted to change value of key {key}")
            self[key] = value


def test_a_longer_run_goes_on_under_wandb(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_run = SimpleNamespace(config=WandbConfig(), summary={}, step=0, log=lambda *_, **__: None)
    wandb = SimpleNamespace(init=lambda **_: wandb_run)
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", wandb)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    for epochs in (1, 2):
        plan(*NETWORK, num_epochs=epochs)
        trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=epochs > 1).run_training()
        assert wandb_run.config["hparas"]["num_epochs"] == wandb_run.config["plans"]["misfm"]["num_epochs"] == epochs


def test_tensorboard_gets_what_metrics_csv_gets(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: dict[str, dict[int, float]] = {}

    class SummaryWriter:
        def __init__(self, folder: str):
            self.folder = folder

        def add_scalar(self, key: str, value: float, step: int) -> None:
            scalars.setdefault(key, {})[step] = value

        def flush(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setenv("nnUNet_tensorboard_enabled", "1")
    folder = pretrain(2).parent
    rows = read_rows(folder / "metrics.csv")
    for column in ("train_loss", "iterations_per_s", "lr", "dice_0", "predicted_4"):
        assert [scalars[column][epoch] for epoch in (0, 1)] == pytest.approx([float(row[column]) for row in rows], 1e-5)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(nnunet: Path) -> None:
    """At once, so that a run that is killed before it saves again can be continued from it too."""
    plan(*NETWORK, num_epochs=1)
    trainer("MisFMTrainer", "nnUNetMisFMPlans").run_training()
    folder = run_folder("MisFMTrainer", "nnUNetMisFMPlans") / "fold_0"
    (folder / "checkpoint_best.pth").unlink()
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_previous.pth")
    (folder / "checkpoint_latest.pth").write_bytes((folder / "checkpoint_previous.pth").read_bytes()[:-1000])
    for _ in range(2):
        assert trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=True).current_epoch == 1
    assert sorted(path.name for path in folder.glob("*.pth")) == ["checkpoint_damaged.pth", "checkpoint_latest.pth"]


def test_weights_given_twice_are_an_error(nnunet: Path) -> None:
    checkpoint = pretrained()
    plan("-pretrained_weights", str(checkpoint))
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.initialize()
    with torch.no_grad():
        next(run.bare_network.parameters()).add_(1.0)  # what nnUNetv2_train -pretrained_weights does before training
    with pytest.raises(TransferError, match="given twice"):
        run.on_train_start()


def test_the_network_is_found_behind_the_wrapper_of_distributed_training(nnunet: Path, tmp_path: Path) -> None:
    plan(*NETWORK)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.initialize()
    network = run.network
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        run.is_ddp = True
        assert run.bare_network is network  # nnU-Net configures the optimiser before it wraps the network
        run.network = torch.nn.parallel.DistributedDataParallel(network)
        assert run.bare_network is network
    finally:
        torch.distributed.destroy_process_group()


def test_ctrl_c_ends_in_one_line(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(*NETWORK)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "set_deep_supervision_enabled", interrupted)  # both begin with it
    for work in (run.run_training, run.perform_actual_validation):
        with pytest.raises(SystemExit) as stop, ends_as_a_program():
            work()
        assert stop.value.code == 130
        assert "Interrupted. Continue" in capsys.readouterr().err


def test_a_misspelt_task_is_not_ignored(nnunet: Path) -> None:
    plan(*NETWORK)
    path = nnunet / "nnUNet_preprocessed" / NAME / "nnUNetMisFMPlans.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"task": "segmentation"', '"task": "segmentatoin"'), encoding="utf-8"
    )
    with pytest.raises(SettingsError, match="segmentatoin"):
        trainer("MisFMTrainer", "nnUNetMisFMPlans")


def test_a_frozen_encoder_keeps_weights_and_statistics(nnunet: Path) -> None:
    plan(*NETWORK)
    path = nnunet / "nnUNet_preprocessed" / NAME / "nnUNetMisFMPlans.json"
    text = path.read_text(encoding="utf-8").replace('"schedule": "poly"', '"schedule": "decoder_only"')
    path.write_text(text, encoding="utf-8")  # misfm_plan refuses it without weights
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.on_train_start()
    before = {name: value.clone() for name, value in run.bare_network.state_dict().items()}
    run.on_epoch_start()
    run.on_train_epoch_start()
    run.train_step(next(run.dataloader_train))
    after = run.bare_network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("encoder."))
    assert not torch.equal(after["decoder.up2.merge.2.weight"], before["decoder.up2.merge.2.weight"])
    # A derived trainer may have a train_step of its own.
    run.on_train_epoch_start()
    nnUNetTrainer.train_step(run, next(run.dataloader_train))
    after = run.bare_network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("encoder."))


def test_an_encoder_thaws_in_the_middle_of_an_epoch(nnunet: Path) -> None:
    plan(*NETWORK, "-schedule", "sawtooth", "-num_epochs", "1", "-num_iterations_per_epoch", "20")
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans")
    run.on_train_start()
    run.on_epoch_start()
    run.on_train_epoch_start()
    states = []
    for _ in range(3):
        states.append({name: value.clone() for name, value in run.bare_network.state_dict().items()})
        run.train_step(next(run.dataloader_train))
    states.append(run.bare_network.state_dict())
    encoder = [name for name in states[0] if name.startswith("encoder.")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in encoder)
    learnt = [name for name in encoder if name.endswith((".weight", "running_mean"))]
    assert {name.rpartition(".")[2] for name in learnt} == {"weight", "running_mean"}
    for before, after in itertools.pairwise(states[1:]):
        assert not any(torch.equal(before[name], after[name]) for name in learnt)
    assert [run.lr_scheduler.stage.name, run.optimizer.param_groups[1]["lr"]] == ["whole network", run.initial_lr]
    log = next(Path(run.output_folder).glob("training_log*.txt")).read_text(encoding="utf-8")
    assert [line.partition("Stage: ")[2].strip() for line in log.splitlines() if "Stage: " in line] == [
        "decoder ramp", "whole-network ramp", "whole network",
    ]  # fmt: skip


def test_a_finished_run_that_goes_on_without_checkpoints_keeps_its_own(nnunet: Path) -> None:
    plan(*NETWORK, num_epochs=1)
    trainer("MisFMTrainer", "nnUNetMisFMPlans").run_training()
    plan(*NETWORK, num_epochs=2)
    run = trainer("MisFMTrainer", "nnUNetMisFMPlans", continue_training=True)
    run.disable_checkpointing = True
    run.run_training()
    final = Path(run.output_folder, "checkpoint_final.pth")
    assert run.current_epoch == 2 and read_checkpoint(final)["current_epoch"] == 1
    # Nor does it take what a run has begun.
    final.unlink()
    begun = {name: f"{name} of another run" for name in ("checkpoint_latest.pth", "checkpoint_previous.pth")}
    for name, text in begun.items():
        final.with_name(name).write_text(text, encoding="utf-8")
    run.on_train_end()
    assert {path.name for path in final.parent.glob("*.pth")} == {*begun, "checkpoint_best.pth"}
    assert {name: final.with_name(name).read_text(encoding="utf-8") for name in begun} == begun
