"""A fine-tuning that was stopped and continued is the same one: stage, learning rates, frozen parts, weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_dataset import NAME
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.start_up import add_plugin_folder

EPOCHS = 20
STOPS = (1, 3, 7, 12)
PLANS = "nnUNetMisFMPlans"
Trace = list[tuple[str, list[float], list[str], float]]


def made_trainer(continue_training: bool) -> Any:
    add_plugin_folder()
    run = get_trainer_from_args(NAME, "3d_fullres", 0, "MisFMTrainer", PLANS, continue_training, torch.device("cpu"))
    maybe_load_checkpoint(run, continue_training, False)
    return run


def traced(run: Any, trace: Trace, folder: Path | None = None) -> None:
    """Train to the end; note the stage, the learning rates, frozen BatchNorm layers and the weights of each epoch.

    With a folder, keeps there what the results folder holds at the epochs of STOPS: what a run stopped then leaves.
    """
    run.on_train_start()
    run.save_every = 1  # after every epoch, so that the run can be stopped at any
    for _ in range(run.current_epoch, EPOCHS):
        run.on_epoch_start()
        run.on_train_epoch_start()
        run.on_train_epoch_end([run.train_step(next(run.dataloader_train))])
        frozen = [
            name
            for name, module in run.bare_network.named_modules()
            if isinstance(module, torch.nn.BatchNorm3d) and not module.training
        ]
        weights = sum(float(value.double().abs().sum()) for value in run.bare_network.state_dict().values())
        rates = [group["lr"] for group in run.optimizer.param_groups]
        trace.append((run.lr_scheduler.stage.name, rates, frozen, weights))
        with torch.no_grad():
            run.on_validation_epoch_start()
            run.on_validation_epoch_end([run.validation_step(next(run.dataloader_val))])
        run.on_epoch_end()
        if folder is not None and run.current_epoch in STOPS:
            shutil.copytree(run.output_folder, folder / str(run.current_epoch))


@pytest.mark.slow
def test_stopping_at_any_epoch_changes_nothing(nnunet: Path, tmp_path: Path) -> None:
    schedule = "sawtooth"
    plan_main(
        ["-d", "4", "-features_per_stage", "4", "4", "8", "16", "32", "-num_epochs", str(EPOCHS)]
        + ["-patch_size", "16", "16", "16", "-batch_size", "2"]
        + ["-num_iterations_per_epoch", "1", "-num_val_iterations_per_epoch", "1", "-schedule", schedule]
    )
    whole: Trace = []
    uninterrupted = made_trainer(False)
    traced(uninterrupted, whole, tmp_path)
    for epoch, (stage, rates, frozen, _) in enumerate(whole):
        print(f"{schedule} {epoch:>2} {stage:<20} {[f'{rate:.6f}' for rate in rates]} {len(frozen)} frozen BatchNorms")
    for stop in STOPS:
        shutil.rmtree(uninterrupted.output_folder)
        shutil.copytree(tmp_path / str(stop), uninterrupted.output_folder)
        trace = whole[:stop]
        traced(made_trainer(True), trace)
        assert trace == whole, f"stopped after epoch {stop}"
        print(f"stopped after epoch {stop} and continued: the same")
