"""Whole runs on a GPU by the commands that users type: pretraining, its continuation, planning, training, prediction.

MISFM_TEST_DEVICE=cpu runs them on the CPU instead, see `test_networks_on_gpu.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_dataset import NAME, labels_in

from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS

pytestmark = pytest.mark.gpu

SIZES = ["-patch_size", "16", "16", "16", "-batch_size", "2"]
SHORT = ["-num_iterations_per_epoch", "4", "-num_val_iterations_per_epoch", "1", "-num_epochs", "2"]
NETWORK = ["-features_per_stage", "8", "8", "16", "32", "64"]
# The same numbers twice on one GPU, for runs that are compared.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "nnUNet_compile": "0", "MISFM_TEST_DETERMINISTIC": "1"}
PRETRAIN = """
import os, sys
if __name__ == "__main__":
    import torch
    if os.environ.get("MISFM_TEST_DETERMINISTIC"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    from nnunetv2_misfm.commands.pretrain import main
    main(sys.argv[1:])
"""


def results(trainer: str, plans: str) -> Path:
    return Path(os.environ["nnUNet_results"]) / NAME / f"{trainer}__{plans}__3d_fullres"


def command(*words: str) -> str:
    """Run one of the installed commands; its output."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / words[0]), *words[1:]], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def pretraining(tmp_path: Path, device: torch.device, *more: str, **variables: str) -> subprocess.Popen[str]:
    program = tmp_path / "pretrain.py"
    program.write_text(PRETRAIN, encoding="utf-8")
    words = ["-d", "4", "-device", device.type, *SIZES, *SHORT, *more]
    return subprocess.Popen(
        [sys.executable, str(program), *words],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]


def weights(plans: str, file: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(results("VolumeFusionTrainer", plans) / "fold_all" / file)[
        "network_weights"
    ]
    return found


def test_the_main_job(nnunet: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    """As nnU-Net trains there: mixed precision, and torch.compile on a GPU."""
    os.environ.pop("nnUNet_compile", None)
    on = ["-device", gpu_device.type]
    command("misfm_pretrain", "-d", "4", *on, *SIZES, *SHORT, *NETWORK)
    checkpoint = results("VolumeFusionTrainer", "nnUNetMisFMPretrainPlans") / "fold_all" / "checkpoint_final.pth"
    said = command("misfm_plan", "-d", "4", "-pretrained_weights", str(checkpoint), *SIZES[:4], *SHORT)
    assert "the weights give 100 % of stem, encoder, decoder" in said
    command("nnUNetv2_train", "4", "3d_fullres", "0", "-tr", "MisFMTrainer", "-p", "nnUNetMisFMPlans", *on)
    folder = results("MisFMTrainer", "nnUNetMisFMPlans") / "fold_0"
    trained, before = (read_checkpoint(path)["network_weights"] for path in (folder / checkpoint.name, checkpoint))
    changed = [name for name in before if name in trained and not torch.equal(trained[name], before[name])]
    assert len(changed) > 0.9 * len(before), "all of the network trains"
    images = tmp_path / "images"
    images.mkdir()
    validated = next((folder / "validation").glob("*.nii.gz"))
    image = validated.name.replace(".nii.gz", "_0000.nii.gz")
    (images / image).symlink_to(nnunet / "nnUNet_raw" / NAME / "imagesTr" / image)
    where = [
        "-i",
        str(images),
        "-d",
        "4",
        "-f",
        "0",
        "-tr",
        "MisFMTrainer",
        "-p",
        "nnUNetMisFMPlans",
        "-c",
        "3d_fullres",
    ]
    for device in (gpu_device.type, "cpu"):
        command("nnUNetv2_predict", *where, "-o", str(tmp_path / device), "-device", device, "-npp", "1", "-nps", "1")
    on_device, on_cpu = (labels_in(tmp_path / device / validated.name) for device in (gpu_device.type, "cpu"))
    assert np.mean(on_device == on_cpu) > 0.98
    assert np.mean(on_device == labels_in(validated)) > 0.98


@pytest.mark.parametrize("network", ["pctnet", "fmunet", "plan"])
@pytest.mark.parametrize("pretext", PRETEXT_TASKS)
def test_every_task_trains_every_network(
    nnunet: Path, tmp_path: Path, gpu_device: torch.device, pretext: str, network: str
) -> None:
    more = ["-pretext", pretext, "-network", network, "-overwrite_plans_name", "Task"]
    if network == "fmunet":  # whose deepest map of the usual patch would be a single voxel
        more += ["-patch_size", "32", "32", "32"]
    finished(pretraining(tmp_path, gpu_device, *more, *(NETWORK if network != "plan" else []), nnUNet_compile="0"))
    (final,) = (Path(os.environ["nnUNet_results"]) / NAME).glob("*__Task__3d_fullres/fold_all/checkpoint_final.pth")
    content = read_checkpoint(final)
    assert all(np.isfinite(content["logging"]["train_losses"])) and content["skipped_steps"] <= 2
    assert all(value.isfinite().all() for value in content["network_weights"].values())


def test_all_stems_are_trained_in_turn(nnunet: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    more = [*NETWORK, "-stems", "all", "-overwrite_plans_name", "Stems"]
    finished(pretraining(tmp_path, gpu_device, *more, "-num_epochs", "1", **DETERMINISTIC))
    finished(pretraining(tmp_path, gpu_device, *more, "-num_epochs", "2", "--c", **DETERMINISTIC))
    trained = weights("Stems")
    for degree in range(3):
        kernel = trained[f"encoder.stems.{degree}.project.weight"]
        assert kernel.isfinite().all() and kernel.abs().sum() > 0
    assert (results("VolumeFusionTrainer", "Stems") / "fold_all" / "fused_samples.png").is_file()


def test_the_same_seed_gives_the_same_run_and_a_stop_changes_nothing(
    nnunet: Path, tmp_path: Path, gpu_device: torch.device
) -> None:
    """Deterministic algorithms on one GPU: SIGTERM in an epoch and --c, and no stop at all."""
    plain = [*NETWORK, "-num_epochs", "40"]
    for plans in ("One", "Two"):
        finished(pretraining(tmp_path, gpu_device, *plain, "-overwrite_plans_name", plans, **DETERMINISTIC))
    process = pretraining(tmp_path, gpu_device, *plain, "-overwrite_plans_name", "Stopped", **DETERMINISTIC)
    metrics, until = results("VolumeFusionTrainer", "Stopped") / "fold_all" / "metrics.csv", time.monotonic() + 300
    while not metrics.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert metrics.exists(), "no epoch in five minutes"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM and "Asked to stop: saved" in output, output[-4000:]
    more = [*plain, "-overwrite_plans_name", "Stopped", "--c"]
    finished(pretraining(tmp_path, gpu_device, *more, **DETERMINISTIC))
    one, two, stopped = (weights(plans) for plans in ("One", "Two", "Stopped"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}: the same run twice")
        torch.testing.assert_close(stopped[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}: stopped and continued")


def test_a_run_that_was_killed_goes_on(nnunet: Path, tmp_path: Path, gpu_device: torch.device) -> None:
    more = [*NETWORK, "-overwrite_plans_name", "Killed"]
    process = pretraining(tmp_path, gpu_device, *more, "-num_epochs", "500", nnUNet_compile="0")
    latest, until = (
        results("VolumeFusionTrainer", "Killed") / "fold_all" / "checkpoint_latest.pth",
        time.monotonic() + 300,
    )
    while not latest.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert latest.exists(), "no checkpoint in five minutes"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = int(read_checkpoint(latest)["current_epoch"])
    finished(pretraining(tmp_path, gpu_device, *more, "-num_epochs", str(done + 2), "--c", nnUNet_compile="0"))
    final = latest.with_name("checkpoint_final.pth")
    assert read_checkpoint(final)["current_epoch"] == done + 2
