"""What a small network learns in 500 iterations of each pretext task, on the volumes of some folders together.

    python benchmarks/pretext_learning.py FOLDER ... --work WORK [--tasks NAME ...] [--pictures FOLDER]

Runs `misfm_pretrain` once for each task, after preparing one pool of all folders. Goes on where it was stopped. The
table has the main score over time, beside what is reached without learning: by a constant, the input itself, guessing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from provenance import device_name, provenance

from nnunetv2_misfm.files import read_json
from nnunetv2_misfm.plans.run_settings import BLOCK, PRETEXT_TASKS
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import validation_samples
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask, Target, standardised
from nnunetv2_misfm.pretrain.tasks import PretextSettings
from nnunetv2_misfm.pretrain.volume_fusion import VolumeFusion
from nnunetv2_misfm.trainers.pretext_data import hold_out

RESULTS = Path(__file__).parent / "results" / "pretext_learning.md"
POOL = "Dataset700_Three"
EPOCHS, ITERATIONS, VALIDATION = 10, 50, 8
NETWORK = ("-network", "fmunet", "-features_per_stage", "4", "8", "16", "32", "64")
SIZES = ("-patch_size", "16", "32", "32", "-batch_size", "2")
LENGTH = (
    *("-num_epochs", str(EPOCHS), "-num_iterations_per_epoch", str(ITERATIONS)),
    *("-num_val_iterations_per_epoch", str(VALIDATION)),
)
# What differs from a task's defaults, which are for long runs.
ADAMW = ("-optimizer", "adamw", "-initial_lr", "3e-3", "-schedule", "poly")
FEW_LARGE_BOXES = ("-num_boxes", "3", "10", "-box_size_min", *3 * ("0.25",), "-box_size_max", *3 * ("0.75",))
OPTIONS = {
    "volume_fusion": (*ADAMW, *FEW_LARGE_BOXES),
    "models_genesis": (*ADAMW, "-nonlinear_rate", "0.5"),
    "vox2vec": ("-initial_lr", "1e-3"),
}
NUM_COLOURS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of volumes")
    parser.add_argument("--work", type=Path, required=True, help="for the pool and the runs")
    parser.add_argument("--tasks", nargs="+", choices=PRETEXT_TASKS, default=list(PRETEXT_TASKS))
    parser.add_argument("--pictures", type=Path, help="folder for a small copy of each run's picture")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    options = parser.parse_args()
    use_folders(options.work)
    pool = Path(os.environ["nnUNet_preprocessed"]) / POOL
    if not (pool / "nnUNetPlans.json").is_file() or not list(pool.glob("nnUNetPlans_3d_fullres/*.b2nd")):
        folders = [word for folder in options.folders for word in ("-i", str(folder))]
        pretrain("-d", POOL, *folders, *NETWORK, *SIZES, "--only_prepare")
    rows = []
    for task in options.tasks:
        run = trained(task, options.device)
        rows.append(row(task, run, pool))
        print(rows[-1], flush=True)
        if options.pictures:
            small_copy(next(run.glob("*samples.png")), options.pictures / f"{task}_learnt.png")
    report = make_report(rows, options.tasks, pool, options.device)
    options.output.write_text(report, encoding="utf-8")
    print(report)


def use_folders(work: Path) -> None:
    """nnU-Net's folders, for this process and those it starts."""
    for name in ("raw", "preprocessed", "results"):
        folder = work.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)


def pretrain(*words: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-m", "nnunetv2_misfm.pretrain", *words], check=True)


def plans_of(task: str) -> str:
    return f"Learning_{task}"


def trained(task: str, device: str) -> Path:
    """The results folder of a finished run."""

    def folder() -> Path | None:
        found = (Path(os.environ["nnUNet_results"]) / POOL).glob(f"*__{plans_of(task)}__3d_fullres/fold_all")
        return next(found, None)

    run = folder()
    if run is None or not (run / "checkpoint_final.pth").is_file():
        again = ["--c"] if run is not None and (run / "checkpoint_latest.pth").is_file() else ["--overwrite"]
        words = (*NETWORK, *SIZES, *LENGTH, *OPTIONS.get(task, ()), "-overwrite_plans_name", plans_of(task))
        started = time.perf_counter()
        pretrain("-d", POOL, "-pretext", task, "-device", device, *words, *(again if run is not None else ()))
        print(f"{task}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
        run = folder()
    assert run is not None
    return run


def row(task: str, run: Path, pool: Path) -> str:
    checkpoint = torch.load(run / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    scores = checkpoint["logging"]["mean_fg_dice"]
    block = read_json(pool / f"{plans_of(task)}.json", "Run the benchmark again.")[BLOCK]
    trivial = ", ".join(f"{what} {value:.3f}" for what, value in trivial_scores(block, pool).items())
    return f"| `{task}` | {trivial} | " + " | ".join(f"{float(score):.3f}" for score in scores) + " |"


def trivial_scores(block: Mapping[str, object], pool: Path) -> dict[str, float]:
    """Main scores on the validation samples of what needs no learning."""
    pretext = PretextSettings.read(block, "The plans")
    task = pretext.task()
    folder = pool / "nnUNetPlans_3d_fullres"
    names = sorted(path.stem for path in folder.glob("*.b2nd") if not path.stem.endswith("_seg"))
    _, held_out = hold_out(names)
    patch, batch_size = [int(n) for n in SIZES[1:4]], int(SIZES[-1])
    batches = crop_loader(
        validation_samples(folder, held_out, patch, task, pretext.run.seed, 1), batch_size, VALIDATION
    )
    made = [task.make(next(batches), torch.device("cpu")) for _ in range(VALIDATION)]
    if isinstance(task, ReconstructionTask):
        outputs = {"a constant": torch.zeros_like, "the input": standardised}
        return {what: summed(task, [(of(x), target) for x, target in made]) for what, of in outputs.items()}
    if isinstance(task, VolumeFusion):
        shares = torch.bincount(torch.cat([target.flatten() for _, target in made]).long()).double()
        # A guess that is class k as often as k is there is right in that share of the voxels.
        return {"guessing": float((shares / shares.sum())[1:].mean())}
    guessed = sum(len(target.there) for _, target in made) / sum(int(target.there.sum()) for _, target in made)
    return {"guessing": guessed}


def summed(task: ReconstructionTask, outputs: Sequence[tuple[torch.Tensor, Target]]) -> float:
    counts = [task.count(output, target) for output, target in outputs]
    return float(task.scores({name: sum(count[name] for count in counts) for name in counts[0]}).main)


def small_copy(picture: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(picture).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def make_report(rows: Sequence[str], tasks: Sequence[str], pool: Path, device: str) -> str:
    volumes = sum(not path.stem.endswith("_seg") for path in (pool / "nnUNetPlans_3d_fullres").glob("*.b2nd"))
    after = " | ".join(str(ITERATIONS * (epoch + 1)) for epoch in range(EPOCHS))
    changed = [f"`{task}` {' '.join(OPTIONS[task])}" for task in tasks if task in OPTIONS]
    return "\n".join(
        [
            "# What a small network learns of each pretext task",
            "",
            f"Main score on the fixed validation samples after so many iterations, one run for each task, on {volumes} "
            f"volumes of three public sets together. Options: `{' '.join((*NETWORK, *SIZES, *LENGTH))}`, otherwise the "
            f"tasks' defaults" + (f", but {'; '.join(changed)}." if changed else "."),
            "",
            "The score is the variance explained (0 for a constant, 1 for the image) of masked voxels or of all "
            "voxels; the share of the swaps' error that is undone (0 for the input, 1 for the image); the mean Dice of "
            "the fusion classes above 0; the share of voxels found again.",
            "",
            f"| task | without learning | {after} |",
            "| --- " * (2 + EPOCHS) + "|",
            *rows,
            "",
            *provenance(
                "python benchmarks/pretext_learning.py FOLDER ... --work WORK",
                ("torch", "nnunetv2"),
                {},
                device_name(device),
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
