"""A disk that is full or may not be written to, at every step that writes: one clear error, and nothing is lost."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from nnunet_dataset import NAME, use_folders
from nnunetv2.run.run_training import run_training_entry
from parity.reference import reference_folder
from program_end import ends_as_a_program

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError, CheckpointInfo, read_checkpoint, write_checkpoint
from nnunetv2_misfm.commands.checkpoints import export_main, import_main
from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder

INFO = CheckpointInfo("volume_fusion", "x", {}, 1, 5, {}, {})
SHORT = ["-num_epochs", "1", "-num_iterations_per_epoch", "1", "-num_val_iterations_per_epoch", "1"]
NETWORK = ["-features_per_stage", "4", "4", "8", "16", "32"]
CPU = ["-device", "cpu"]
PRETRAINED = f"nnUNet_results/{NAME}/VolumeFusionTrainer__nnUNetMisFMPretrainPlans__3d_fullres/fold_all"
FINE_TUNED = f"nnUNet_results/{NAME}/MisFMTrainer__nnUNetMisFMPlans__3d_fullres/fold_0"


@dataclass(frozen=True)
class Step:
    """A command that writes into a folder, and which of `EARLIER` was done before the disk of that folder fails."""

    folder: str
    command: Callable[[Path], None]
    after: str | None = None
    on_a_full_disk: str = "No space left on device. Make room"
    status: int = 2


def pretrain(root: Path, *options: str) -> None:
    misfm_pretrain(["-d", "4", *NETWORK, *SHORT, *CPU, *options])


def continue_pretraining(root: Path) -> None:
    pretrain(root, "-num_epochs", "2", "--c")


def prepare(root: Path) -> None:
    images = ["-i", str(root / "nnUNet_raw" / NAME / "imagesTr"), "-modality", "mr"]
    misfm_pretrain([*images, "-d", "900", "-n", "Pool", "-np", "1", *NETWORK, *SHORT, *CPU])


def plan(root: Path, *options: str) -> None:
    weights = root / PRETRAINED / "checkpoint_final.pth"
    plan_main(["-d", "4", "-pretrained_weights", str(weights), *SHORT, "-np", "1", *options])


def plan_other_data(root: Path) -> None:
    plan(root, "-spacing", "1.2", "1.2", "1.2")


def fine_tune(root: Path, *options: str) -> None:
    sys.argv = ["nnUNetv2_train", "4", "3d_fullres", "0", "-tr", "MisFMTrainer", "-p", "nnUNetMisFMPlans", *CPU]
    sys.argv += options
    with ends_as_a_program():
        run_training_entry()


def stop_before_the_end(root: Path) -> None:
    """As if the run had been stopped before its last epoch."""
    final = root / FINE_TUNED / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_latest.pth"))


def continue_fine_tuning(root: Path) -> None:
    fine_tune(root, "--c")


def export(root: Path) -> None:
    export_main(["-i", str(root / PRETRAINED / "checkpoint_final.pth"), "-o", str(root / "out" / "export")])


def import_weights(root: Path) -> None:
    import_main(["-i", str(reference_folder() / "pctnet_small_mode1.pt"), "-o", str(root / "out" / "imported.pth")])


EARLIER = {"pretraining": [pretrain], "planning": [plan], "fine-tuning": [fine_tune, stop_before_the_end]}
NO_CHECKPOINT = "fold_.*: its disk has only 0 bytes of space left, a checkpoint takes about [45].* MB. Make room"
POOL_KEPT = "the disk of .*Dataset900_Pool is full; make room and run this again to continue"
NOT_WRITTEN = "could not be written.*; 0 bytes are free there"
STEPS = {
    "preparing a pool": Step(
        "nnUNet_preprocessed", prepare, on_a_full_disk="the disk of .*Dataset900_Pool is full; make room"
    ),
    "planning the pretraining": Step("nnUNet_preprocessed", pretrain),
    "pretraining": Step("nnUNet_results", pretrain, on_a_full_disk=NO_CHECKPOINT),
    "continuing a pretraining": Step("nnUNet_results", continue_pretraining, "pretraining", NO_CHECKPOINT),
    "planning": Step("nnUNet_preprocessed", plan, "pretraining"),
    "preprocessing for a plan": Step("nnUNet_preprocessed", plan_other_data, "pretraining"),
    "fine-tuning": Step("nnUNet_results", fine_tune, "planning", NO_CHECKPOINT, 1),
    "continuing a fine-tuning": Step("nnUNet_results", continue_fine_tuning, "fine-tuning", NO_CHECKPOINT, 1),
    "exporting": Step("out", export, "pretraining", NOT_WRITTEN),
    "importing": Step("out", import_weights, on_a_full_disk=NOT_WRITTEN),
}


@pytest.fixture(scope="module")
def done_so_far(dataset_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """nnU-Net's folders with nothing done in them, and as they are after each of `EARLIER`."""
    done: dict[str | None, Path] = {None: dataset_template}
    root = dataset_template
    with pytest.MonkeyPatch.context() as patch:
        for name, commands in EARLIER.items():
            done[name] = tmp_path_factory.mktemp("disks") / "nnunet"
            root = Path(shutil.copytree(root, done[name]))
            use_folders(root, patch)
            add_plugin_folder()
            for command in commands:
                command(root)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["full", "read-only"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_failing_disk(
    done_so_far: dict[str | None, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mounted: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
    name: str,
    failure: str,
) -> None:
    step = STEPS[name]
    root = Path(shutil.copytree(done_so_far[step.after], tmp_path / "nnunet"))
    use_folders(root, monkeypatch)
    add_plugin_folder()
    folder = root / step.folder
    folder.mkdir(exist_ok=True)
    mounted(folder)
    if failure == "full":
        fill(folder)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        step.command(root)
    message = capsys.readouterr().err
    print(f"{name}, {failure}: {message[-600:]}")
    assert ended.value.code == step.status and "Traceback" not in message
    assert re.search(step.on_a_full_disk if failure == "full" else "Read-only file system", message)
    after = contents(folder)
    assert {file: after.get(file) for file in before} == before
    # Nothing unfinished bears a name under which it would be taken for finished.
    new = after.keys() - before.keys()
    assert not [file for file in new if file.suffix in (".pth", ".json", ".b2nd", ".safetensors")]
    assert not (root / "out" / "export").exists()


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path, mounted: Callable[[Path], None]) -> None:
    mounted(tmp_path)
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint({"network_weights": {"a": torch.ones(10)}}, INFO, path)
    with pytest.raises(CheckpointError, match="could not be written.*Make room"):
        write_checkpoint({"network_weights": {"a": torch.ones(10**8)}}, INFO, path, keep_as="checkpoint_previous.pth")
    assert torch.equal(read_checkpoint(path)["network_weights"]["a"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def mounted() -> Iterator[Callable[[Path], None]]:
    """Puts a folder's files on a file system of their own, of 100 MB."""
    mounts: list[Path] = []

    def mount(folder: Path) -> None:
        kept = folder.with_name(folder.name + "_kept")
        shutil.copytree(folder, kept)
        command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this system does not allow a small file system to be mounted")
        mounts.append(folder)
        shutil.copytree(kept, folder, dirs_exist_ok=True)

    yield mount
    for folder in mounts:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with pytest.raises(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def contents(folder: Path) -> dict[Path, str]:
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "filler"
    }
