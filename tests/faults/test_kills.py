"""SIGKILL, SIGTERM and Ctrl-C at random moments of every stage: each is continued to what an undisturbed run gives.

    pytest -m faults -s tests/faults/test_kills.py      prints what was done and how often

A fork server imports nnU-Net once, so that the moments fall into the work and not into imports.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunet_dataset import NAME, make_case, make_dataset
from program_end import ends_as_a_program

from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint
from nnunetv2_misfm.trainers.metrics_file import read_rows

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FEATURES = ["-features_per_stage", "4", "4", "8", "16", "32"]
SHORT = ["-num_epochs", "3", "-num_iterations_per_epoch", "4", "-num_val_iterations_per_epoch", "1"]
POOL = "Dataset900_Pool"
POOL_RUN = f"nnUNet_results/{POOL}/VolumeFusionTrainer__nnUNetPlans__3d_fullres/fold_all"
PRETRAINED = f"nnUNet_results/{NAME}/VolumeFusionTrainer__PretrainPlans__3d_fullres/fold_all/checkpoint_final.pth"
FINE_TUNED = f"nnUNet_results/{NAME}/MisFMTrainer__FineTunePlans__3d_fullres/fold_0"
PLANNED = f"nnUNet_preprocessed/{NAME}"


def pretrain_a_pool(root: Path) -> None:
    """Preparation and pretraining, with --c where there is something to continue; nothing where it was finished."""
    from nnunetv2_misfm.commands.pretrain import main

    if (root / POOL_RUN / "checkpoint_final.pth").exists():
        return  # the signal came between the last file and the end of the process
    continued = ["--c"] if (root / POOL_RUN / "checkpoint_latest.pth").exists() else []
    folder = ["-i", str(root / "images"), "-d", "900", "-n", "Pool", "-modality", "mr", "-np", "1"]
    main([*folder, "-patch_size", "16", "24", "16", "-device", "cpu", *FEATURES, *SHORT, *continued])


def plan(root: Path) -> None:
    """Fine-tuning plans with a spacing of their own, so that the data is preprocessed."""
    from nnunetv2_misfm.commands.plan import plan_main

    weights = ["-pretrained_weights", str(root / PRETRAINED), "-spacing", "1.2", "1.2", "1.2", "-np", "1"]
    plan_main(["-d", "4", "-overwrite_plans_name", "OtherPlans", *weights, *SHORT])


def fine_tune(root: Path) -> None:
    """Training and validation by nnU-Net's own command."""
    from nnunetv2.run.run_training import run_training_entry

    continued = ["--c"] if list((root / FINE_TUNED).glob("checkpoint_*.pth")) else []
    command = "nnUNetv2_train 4 3d_fullres 0 -tr MisFMTrainer -p FineTunePlans -device cpu"
    sys.argv = [*command.split(), *continued]
    run_training_entry()


def pool_and_weights(root: Path) -> dict[str, Any]:
    """All arrays of the pool, the weights that were trained on it and the number of epochs that took."""
    arrays = root / f"nnUNet_preprocessed/{POOL}/nnUNetPlans_3d_fullres"
    found: dict[str, Any] = {file.name: digest(blosc2.open(str(file))[:]) for file in arrays.glob("*.b2nd")}
    for name, weight in read_checkpoint(root / POOL_RUN / "checkpoint_final.pth")["network_weights"].items():
        found[name] = digest(weight.numpy())
    found["epochs"] = [row["epoch"] for row in read_rows(root / POOL_RUN / "metrics.csv")]
    return found


def plans_and_data(root: Path) -> dict[str, Any]:
    """The plans and the arrays preprocessed for them."""
    plans = json.loads((root / PLANNED / "OtherPlans.json").read_text(encoding="utf-8"))
    # Where the checkpoint lies is the one thing that differs between two folders.
    plans["pretrain_info"] = {key: value for key, value in plans["pretrain_info"].items() if "path" not in key}
    folder = root / PLANNED / plans["configurations"]["3d_fullres"]["data_identifier"]
    return {"plans": plans} | {file.name: digest(blosc2.open(str(file))[:]) for file in folder.glob("*.b2nd")}


def epochs_and_scores(root: Path) -> dict[str, Any]:
    """What is the same for every fine-tuning, whose augmentation nnU-Net does not seed."""
    summary = json.loads((root / FINE_TUNED / "validation" / "summary.json").read_text(encoding="utf-8"))
    trained = torch.load(root / FINE_TUNED / "checkpoint_final.pth", weights_only=True)
    losses = trained["logging"]["train_losses"]
    return {"epochs": len(losses), "finite": bool(np.isfinite(losses).all()), "cases": len(summary["metric_per_case"])}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


@dataclass(frozen=True)
class Stage:
    """A command, what it leaves, and the part of its time in which it is hit."""

    command: Callable[[Path], None]
    outcome: Callable[[Path], dict[str, Any]]
    begins: str | None = None  # a file, below the root, whose appearance begins the stage
    ends: str | None = None


STAGES = {
    "preparation": Stage(pretrain_a_pool, pool_and_weights, ends=POOL_RUN),
    "pretraining": Stage(pretrain_a_pool, pool_and_weights, begins=POOL_RUN),
    "planning": Stage(plan, plans_and_data),
    "fine-tuning": Stage(fine_tune, epochs_and_scores),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages start from: images, a dataset, a checkpoint, and plans to fine-tune it."""
    root = tmp_path_factory.mktemp("begun")
    make_dataset(root)
    (root / "images").mkdir()
    for index in range(8):
        image = make_case(index)[0].repeat(2, 0).repeat(2, 1).repeat(2, 2)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(root / "images" / f"{index}.nii.gz"))
    run_to_the_end(pretrain_the_dataset, root)
    run_to_the_end(plan_the_fine_tuning, root)
    return root


def pretrain_the_dataset(root: Path) -> None:
    from nnunetv2_misfm.commands.pretrain import main

    main(["-d", "4", "-overwrite_plans_name", "PretrainPlans", "-device", "cpu", *FEATURES, *SHORT])


def plan_the_fine_tuning(root: Path) -> None:
    from nnunetv2_misfm.commands.plan import plan_main

    plan_main(
        ["-d", "4", "-overwrite_plans_name", "FineTunePlans", "-pretrained_weights", str(root / PRETRAINED), *SHORT]
    )


@pytest.mark.parametrize(
    ("name", "times"),
    [
        pytest.param("pretraining", 1, marks=pytest.mark.slow),
        *(pytest.param(name, 13, marks=pytest.mark.faults) for name in STAGES),
    ],
)
def test_a_run_that_was_hit_is_continued_to_the_same_result(begun: Path, tmp_path: Path, name: str, times: int) -> None:
    stage = STAGES[name]
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(begun, undisturbed)
    start, end = run_to_the_end(stage.command, undisturbed, stage)
    expected = stage.outcome(undisturbed)

    generator = random.Random(f"{name} {times}")
    counts: Counter[str] = Counter()
    for number in range(times):
        root = tmp_path / str(number)
        shutil.copytree(begun, root)
        kind = generator.choice(SIGNALS)
        process = started(stage.command, root)
        process.join(generator.uniform(start, end))
        if process.is_alive():
            os.kill(process.pid, kind)
            counts[kind.name] += 1
        process.join(60)
        assert not process.is_alive(), f"{kind.name} did not end the run within a minute"
        nothing_half_written(root)
        # After SIGKILL the orphaned workers of nnU-Net's pools may complain; no program can prevent that.
        counts["tracebacks"] += kind != signal.SIGKILL and "Traceback" in (root / "log.txt").read_text(encoding="utf-8")
        run_to_the_end(stage.command, root)
        assert stage.outcome(root) == expected
        shutil.rmtree(root)
    assert sum(counts[kind.name] for kind in SIGNALS) >= times // 2, "most runs ended before they were hit"
    print(f"\n{name}: {dict(counts)} in {times} runs of {end:.1f} s; all continued to the undisturbed result")


def nothing_half_written(root: Path) -> None:
    """Every file under its final name is whole."""
    for file in (root / "nnUNet_results").rglob("*.pth"):
        read_checkpoint(file)
    for file in root.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    for folder in (root / "nnUNet_preprocessed").glob("*/nnUNetPlans_*"):
        for properties in folder.glob("*.pkl"):
            # The data appears last, and is what makes a case; what is there has to be readable.
            file = properties.with_suffix(".b2nd")
            assert not file.exists() or np.isfinite(blosc2.open(str(file))[:]).all()


def run_to_the_end(command: Callable[[Path], None], root: Path, stage: Stage | None = None) -> tuple[float, float]:
    """Run a command that must succeed.

    Returns:
        When a stage began and ended, in seconds after the command's start.
    """
    process, start = started(command, root), time.monotonic()
    begins, ends = 0.0, None
    while process.is_alive():
        process.join(0.02)
        now = time.monotonic() - start
        if stage is not None and stage.begins is not None and not begins and (root / stage.begins).exists():
            begins = now
        if stage is not None and stage.ends is not None and ends is None and (root / stage.ends).exists():
            ends = now
    assert process.exitcode == 0, (root / "log.txt").read_text(encoding="utf-8")[-3000:]
    return begins, ends or time.monotonic() - start


def started(command: Callable[[Path], None], root: Path) -> multiprocessing.process.BaseProcess:
    """A process that has begun to run a command, its output in log.txt."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nnunetv2.run.run_training", "nnunetv2_misfm.commands.pretrain", "nnunetv2_misfm.commands.plan"]
    )
    ready = context.Event()
    process = context.Process(target=run_in_child, args=(command, root, ready))
    process.start()
    assert ready.wait(120), "the process did not start"
    return process


def run_in_child(command: Callable[[Path], None], root: Path, ready: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for output in (1, 2):
        os.dup2(log, output)
    for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / folder).mkdir(exist_ok=True)
        os.environ[folder] = str(root / folder)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "0"}
    from nnunetv2_misfm.start_up import add_plugin_folder

    add_plugin_folder()
    ready.set()
    with ends_as_a_program():  # which multiprocessing does not see to
        command(root)
