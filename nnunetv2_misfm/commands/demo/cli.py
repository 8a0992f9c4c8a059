"""misfm_demo: make volumes, pretrain, and compare what pretrained and random features say of few labels, in minutes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from time import perf_counter

from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.cpu_threads import keep_cores_free, usable_cores
from nnunetv2_misfm.errors import PlanError, exit_with_message
from nnunetv2_misfm.files import locked
from nnunetv2_misfm.units import format_duration

_NUM_UNLABELLED, _NUM_LABELLED = 48, 24
_PATCH = ("24", "24", "24")
_PRETRAINING = (12, 20)  # epochs, iterations of each
_PRETEXT_OPTIONS = ("-batch_size", "4", "-optimizer", "adamw", "-initial_lr", "0.001", "-schedule", "poly")
_MARK = ".misfm_demo"  # the lock of a folder that a demo has made, whose volumes and results a next one removes
_COMPARISON = ("--probe", "-num_labelled", "5", "-seeds", "3", "-num_test", "6", "-num_validation", "2")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_demo."""
    parser = CommandParser(
        prog="misfm_demo",
        description="Make volumes, pretrain on them without labels, and compare what the network's features say of "
        "organs with those of random weights, by a linear classifier and five labelled volumes. It takes minutes and "
        "ends with a page.",
    )
    parser.add_argument("-o", default="misfm_demo", metavar="FOLDER", help="folder to work in (default: ./misfm_demo)")
    parser.add_argument(
        "-device",
        choices=("cuda", "cpu"),
        help="where to train (default: cuda if there is a usable GPU, otherwise cpu)",
    )
    parser.add_argument(
        "-seed", type=int, default=0, metavar="N", help="seed of the volumes and of the training (default: 0)"
    )
    options = parser.parse_args(arguments)
    exit_with_message("misfm_demo", lambda: demo(Path(options.o).resolve(), options.device, options.seed))


def demo(folder: Path, device: str | None, seed: int) -> None:
    """The whole job in a folder of its own; the user's nnU-Net folders are not touched.

    Raises:
        PlanError: if the folder has something else in it.
        LockedError: if another demo works there.
    """
    if seed < 0:
        raise PlanError(f"-seed {seed} must be at least 0.")
    if folder.is_file():
        raise PlanError(f"{folder} is a file. Choose a folder with -o.")
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise PlanError(f"{folder} exists and is not an earlier demo. Choose an empty folder with -o.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _MARK, 0.0, "another misfm_demo works in this folder"):
        _demo(folder, device, seed)


def _demo(folder: Path, device: str | None, seed: int) -> None:
    started = perf_counter()
    _use_folders(folder)
    from nnunetv2_misfm.commands.demo.steps import Demo

    job = Demo(folder, device, seed)
    print(f"Working in {folder} on {job.device}; the full output goes to {job.log}.")
    job.make_volumes(_NUM_UNLABELLED, _NUM_LABELLED)
    job.plan_with_nnunet([int(n) for n in _PATCH], 2)
    sizes = ["-patch_size", *_PATCH, "-num_val_iterations_per_epoch", "2"]
    pretrained = job.pretrain(*_PRETRAINING, [*_PRETEXT_OPTIONS, *sizes])
    jobs = ["-jobs", str(min(2, usable_cores()))] if job.device == "cpu" else []
    written = job.compare(pretrained, [*_COMPARISON, *jobs], (perf_counter() - started) / 3600)
    took = format_duration((perf_counter() - started) / 3600)
    print(f"\n{written.verdict}\nIt took {took}. The page is {written.path}.")
    print(f"\nNext:\n{_next_commands(job.device)}")


def _use_folders(folder: Path) -> None:
    (folder / "demo.log").write_text("", encoding="utf-8")
    for name in ("volumes", "comparison"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        # Only what an earlier demo made: a user may have tried more in these folders.
        for earlier in (folder / name).glob("Dataset99[89]_MisFMDemo*"):
            shutil.rmtree(earlier)
        (folder / name).mkdir(exist_ok=True)
        os.environ[name] = str(folder / name)
    # Before nnU-Net is imported, which reads them once: each worker process would cost seconds of imports.
    os.environ["nnUNet_def_n_proc"] = "1"
    # In this process the run's seed reaches nnU-Net's augmentation: the same demo twice gives the same numbers.
    os.environ["nnUNet_n_proc_DA"] = "0"
    os.environ["nnUNet_compile"] = "0"
    keep_cores_free()
    os.environ.setdefault("MPLBACKEND", "Agg")


def _next_commands(device: str) -> str:
    without_gpu = " -device cpu" if device == "cpu" else ""
    return f"""export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
misfm_doctor
misfm_pretrain -i FOLDER_OF_VOLUMES -d 900 -n MyPool -modality ct{without_gpu}
nnUNetv2_plan_and_preprocess -d DATASET_ID -c 3d_fullres
misfm_compare -d DATASET_ID --from_scratch -num_labelled 10 -seeds 4 -num_epochs 40 -pretrained_weights \\
    $nnUNet_results/Dataset900_MyPool/VolumeFusionTrainer__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth"""
