"""misfm_demo: prepare, pretrain, plan, fine-tune against the scratch baseline, predict and evaluate, in minutes."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from time import perf_counter

from nnunetv2_misfm.cpu_threads import keep_cores_free
from nnunetv2_misfm.errors import PlanError, exit_with_message
from nnunetv2_misfm.plans.run_settings import DEFAULT_BASELINE_PLANS, DEFAULT_FINETUNING_PLANS

PLANS = {"pretrained": DEFAULT_FINETUNING_PLANS, "from scratch": DEFAULT_BASELINE_PLANS}
_NUM_VOLUMES, _NUM_TRAINING, _NUM_TEST = 16, 6, 3
_PRETRAINING, _FINETUNING = (6, 16), (10, 16)  # epochs, iterations of each
_NETWORK = ("-features_per_stage", "6", "12", "24", "48", "96")
_PATCH = ("-patch_size", "8", "48", "48", "-batch_size", "2")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_demo."""
    parser = argparse.ArgumentParser(prog="misfm_demo", description=__doc__)
    parser.add_argument("-o", default="misfm_demo", metavar="FOLDER", help="where to work (default: ./misfm_demo)")
    parser.add_argument("-device", choices=("cuda", "cpu"), help="default: cuda if there is one, else cpu")
    options = parser.parse_args(arguments)
    exit_with_message("misfm_demo", lambda: demo(Path(options.o).resolve(), options.device))


def demo(folder: Path, device: str | None) -> None:
    """The whole job in a folder of its own; the user's nnU-Net folders are not touched.

    Raises:
        PlanError: if the folder has something else in it.
    """
    started = perf_counter()
    if folder.is_file():
        raise PlanError(f"{folder} is a file. Choose a folder with -o.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "demo.log").is_file():
        raise PlanError(f"{folder} exists and is not an earlier demo. Choose an empty folder with -o.")
    _use_folders(folder)
    from nnunetv2_misfm.commands.demo.report import write_report
    from nnunetv2_misfm.commands.demo.steps import Demo

    job = Demo(folder, device)
    print(f"Working in {folder} on {job.device}; the full output goes to {job.log}.")
    job.make_volumes(_NUM_VOLUMES, _NUM_TRAINING, _NUM_TEST)
    pretrained = job.pretrain(*_PRETRAINING, [*_NETWORK, *_PATCH])
    job.plan_with_nnunet()
    job.plan_finetuning(pretrained, *_FINETUNING, list(_PATCH))
    arms = [job.finetune_and_test(name, plans, _FINETUNING[0]) for name, plans in PLANS.items()]
    report = write_report(
        folder,
        pretrained.parent,
        arms,
        job.raw / "imagesTs",
        job.raw / "labelsTs",
        (perf_counter() - started) / 60,
        _next_commands(),
    )
    print(f"\n{'Dice on test volumes':<22}" + "".join(f"{label:>9}" for label in arms[0].dice) + f"{'mean':>9}")
    for arm in arms:
        print(f"{arm.name:<22}" + "".join(f"{d:>9.3f}" for d in arm.dice.values()) + f"{arm.mean_dice:>9.3f}")
    print("(A network this small, trained this briefly, shows that everything works, not what pretraining is worth.)")
    print(f"\nReport: {report}\n\nNext:\n{_next_commands()}")


def _use_folders(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.log").write_text("")
    shutil.rmtree(folder / "volumes", ignore_errors=True)
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


def _next_commands() -> str:
    return """export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
misfm_doctor
misfm_pretrain -i FOLDER_OF_VOLUMES -d 900 -n MyPool -modality ct
nnUNetv2_plan_and_preprocess -d DATASET_ID -c 3d_fullres
misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights \\
    $nnUNet_results/Dataset900_MyPool/VolumeFusionTrainer__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth
nnUNetv2_train DATASET_ID 3d_fullres 0 -tr MisFMTrainer -p nnUNetMisFMPlans
nnUNetv2_predict -i IMAGES -o PREDICTIONS -d DATASET_ID -c 3d_fullres -f 0 -tr MisFMTrainer -p nnUNetMisFMPlans"""
