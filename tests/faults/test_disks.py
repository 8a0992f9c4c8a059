"""A disk that is full or may not be written to: one clear error, and what was there before is intact."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nnunet_dataset import NAME

from nnunetv2_misfm.pretrain.cli import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.transfer.checkpoint import CheckpointError, CheckpointInfo, read_checkpoint, write_checkpoint
from nnunetv2_misfm.transfer.checkpoint_cli import export_main
from nnunetv2_misfm.transfer.cli import plan_main

INFO = CheckpointInfo("volume_fusion", "x", {}, 1, 5, {}, {})
SHORT = ["-features_per_stage", "4", "4", "8", "16", "32", "-num_epochs", "2", "-num_iterations_per_epoch", "1"]
SHORT += ["-num_val_iterations_per_epoch", "1", "-device", "cpu"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this system does not allow a small file system to be mounted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path) -> None:
    path = small_disk / "checkpoint_latest.pth"
    write_checkpoint({"network_weights": {"a": torch.ones(10)}}, INFO, path)
    with pytest.raises(CheckpointError, match="could not be written.*Make room"):
        write_checkpoint({"network_weights": {"a": torch.ones(10**6)}}, INFO, path, keep_as="checkpoint_previous.pth")
    assert torch.equal(read_checkpoint(path)["network_weights"]["a"], torch.ones(10))
    assert [file.name for file in small_disk.iterdir()] == [path.name]


@pytest.mark.slow
def test_pretraining_on_a_full_disk(
    nnunet: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_plugin_folder()
    monkeypatch.setenv("nnUNet_results", str(small_disk))
    with pytest.raises(SystemExit) as ended:
        misfm_pretrain(["-d", "4", *SHORT])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in message
    assert "No space left" in message or "could not be written" in message


def test_preparing_a_pool_on_a_full_disk(
    nnunet: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(small_disk))
    (small_disk / "filler").write_bytes(bytes(1000 * 1024))
    images = nnunet / "nnUNet_raw" / NAME / "imagesTr"
    arguments = ["-i", str(images), "-d", "900", "-n", "Pool", "-modality", "mr", "-np", "1", *SHORT]
    with pytest.raises(SystemExit) as ended:
        misfm_pretrain(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in message
    assert "is full" in message or "are free" in message or "No space left" in message


@pytest.mark.slow
def test_planning_and_exporting_on_a_full_disk(
    nnunet: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_plugin_folder()
    misfm_pretrain(["-d", "4", *SHORT])
    checkpoint = next(Path(os.environ["nnUNet_results"]).rglob("checkpoint_final.pth"))
    (small_disk / "filler").write_bytes(bytes(1020 * 1024))
    with pytest.raises(SystemExit) as ended:
        export_main(["-i", str(checkpoint), "-o", str(small_disk / "export")])
    assert ended.value.code == 2 and not (small_disk / "export").exists()
    assert "could not be written" in capsys.readouterr().err
    os.chmod(nnunet / "nnUNet_preprocessed" / NAME, 0o555)
    if os.geteuid() != 0:  # nothing is forbidden to root
        with pytest.raises(SystemExit):
            plan_main(["-d", "4", "-pretrained_weights", str(checkpoint), "--no_pp"])
        assert "Permission denied" in capsys.readouterr().err
    os.chmod(nnunet / "nnUNet_preprocessed" / NAME, 0o755)
