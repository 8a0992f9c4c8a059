"""Does pretraining help with few labels? One dataset, from its images to the page of misfm_compare.

    python benchmarks/low_label.py --dataset .../Dataset004_Hippocampus --work FOLDER [--patients 'patient\\d+']
        [--labelled 5 10] [--seeds 5] [--epochs 12] [--pretraining_epochs 16] [--device cuda] [--jobs 8]

Plans and preprocesses the dataset with nnU-Net, pretrains a small PCT-Net with each geometry of Volume Fusion on the
images that misfm_compare neither tests nor validates on, without their labels, and compares fine-tuning with training
from scratch and with nnU-Net. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nnunetv2_misfm.commands.compare.splits import split_cases

NETWORK = ("-network", "pctnet", "-features_per_stage", "8", "16", "32", "64", "128")
# Crops of 32 voxels lie within most of the volumes, and a step takes .4 of the time.
SMALL_CROPS = ("-patch_size", "32", "32", "32", "-batch_size", "8", "-initial_lr", "3e-3")
FEW_LARGE_BOXES = ("-num_boxes", "3", "10", "-box_size_min", *3 * ("0.25",), "-box_size_max", *3 * ("0.75",))
PRETRAINING = {"boxes": ("-geometry", "boxes", *FEW_LARGE_BOXES), "blocks": ("-geometry", "blocks")}
RATES = ("3e-3", "5e-3")
NNUNET_RATES = ("1e-2", "3e-2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("--patients", help="regular expression that finds the patient in a case's name")
    parser.add_argument("--labelled", nargs="+", default=["10"])
    parser.add_argument("--seeds", default="5")
    parser.add_argument("--epochs", default="12", help="of fine-tuning, 25 iterations each (default: %(default)s)")
    parser.add_argument("--pretraining_epochs", default="16", help="of 100 iterations each (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", default="1", help="runs at once (default: %(default)s)")
    options = parser.parse_args()
    work = options.work.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / name)
    raw = work / "nnUNet_raw" / options.dataset.name
    if not raw.exists():
        raw.symlink_to(options.dataset.resolve(), target_is_directory=True)
    number = options.dataset.name.removeprefix("Dataset").partition("_")[0]
    if not (work / "nnUNet_preprocessed" / raw.name / "nnUNetPlans.json").is_file():
        command("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres")
    images = unlabelled_images(raw, work / "unlabelled", options.patients)
    checkpoints = [
        f"{name}={pretrain(name, images, number, work, options.pretraining_epochs, options.device)}"
        for name in PRETRAINING
    ]
    by_patient = ["-patients", options.patients] if options.patients else []
    command(
        *("misfm_compare", "-d", number, "-pretrained_weights", *checkpoints, "--from_scratch", "--nnunet"),
        *("-num_labelled", *options.labelled, "-seeds", options.seeds, "-num_epochs", options.epochs),
        *("-num_iterations_per_epoch", "25", "-num_val_iterations_per_epoch", "10", "-batch_size", "2"),
        *("-initial_lr", *RATES, "-nnunet_lr", *NNUNET_RATES, "-o", str(work / "comparison"), *by_patient),
        *("-device", options.device, "-jobs", options.jobs),
    )


def unlabelled_images(raw: Path, target: Path, patients: str | None) -> Path:
    """A folder with the images of the patients that misfm_compare trains with."""
    ending = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    cases = [path.name.removesuffix(ending) for path in (raw / "labelsTr").glob(f"*{ending}")]
    split = split_cases(cases, patients, None, None)
    target.mkdir(exist_ok=True)
    for case in split.cases_of(split.training):
        for image in (raw / "imagesTr").glob(f"{case}_????{ending}"):
            if not (target / image.name).is_file():
                shutil.copy(image, target)
    return target


def pretrain(name: str, images: Path, number: str, work: Path, epochs: str, device: str) -> Path:
    """The checkpoint of a geometry, made if it is not there."""
    run = work / "nnUNet_results" / "Dataset904_LowLabelPool" / f"VolumeFusionTrainer__{name}Plans__3d_fullres"
    checkpoint = run / "fold_all" / "checkpoint_final.pth"
    if not checkpoint.is_file():
        continued = ["--c"] if checkpoint.with_name("checkpoint_latest.pth").is_file() else []
        command(
            *("misfm_pretrain", "-i", str(images), "-d", "904", "-n", "LowLabelPool", "-plans_from", number),
            *("-overwrite_plans_name", f"{name}Plans", "-num_epochs", epochs, "-num_iterations_per_epoch", "100"),
            *("-num_val_iterations_per_epoch", "10", "-device", device, *NETWORK, *SMALL_CROPS, *PRETRAINING[name]),
            *continued,
        )
    return checkpoint


def command(*words: str) -> None:
    """Run a command as a user would; end with its status if it fails."""
    print("$", *words, flush=True)
    status = subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]]).returncode
    if status != 0:
        sys.exit(status)


if __name__ == "__main__":
    main()
