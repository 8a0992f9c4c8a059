"""What a small network learns of each pretext task, as a table: the runs of three_sets.py on its common pool.

    python benchmarks/three_sets.py pretrain --data FOLDER --work WORK
    python benchmarks/pretext_learning.py --work WORK [--more PLANS ...] [--pictures FOLDER]

The main score over time stands beside what is reached without learning: by a constant, the input itself, guessing.
--more adds runs of misfm_pretrain on that pool with other batches, by the names of their plans.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from provenance import device_name, provenance
from three_sets import (
    COMMON,
    FEATURES,
    ITERATIONS,
    NETWORKS,
    POOL_PLANS,
    PRETRAINING,
    TASK_OPTIONS,
    VALIDATION,
    use_folders,
)

from nnunetv2_misfm.files import read_json
from nnunetv2_misfm.plans.run_settings import BLOCK, PRETEXT_TASKS
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import validation_samples
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask, Target, standardised
from nnunetv2_misfm.pretrain.tasks import PretextSettings
from nnunetv2_misfm.pretrain.volume_fusion import VolumeFusion
from nnunetv2_misfm.trainers.pretext_data import hold_out

RESULTS = Path(__file__).parent / "results" / "pretext_learning.md"
EVERY = 2  # epochs between columns
NUM_COLOURS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of three_sets.py")
    parser.add_argument("--more", nargs="+", default=[], metavar="PLANS", help="plans of other runs on the pool")
    parser.add_argument("--pictures", type=Path, help="folder for a small copy of each run's picture")
    parser.add_argument("--device", default="cpu", help="that the runs were made on (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    options = parser.parse_args()
    use_folders(options.work)
    rows = []
    for plans in (*PRETEXT_TASKS, *options.more):
        (run,) = (Path(os.environ["nnUNet_results"]) / COMMON.dataset).glob(f"*__{plans}__3d_fullres/fold_all")
        rows.append(row(run))
        if options.pictures:
            small_copy(next(run.glob("*samples.png")), options.pictures / f"{plans}_learnt.png")
    report = make_report(rows, options.more, options.device)
    options.output.write_text(report, encoding="utf-8")
    print(report)


def row(run: Path) -> str:
    checkpoint = torch.load(run / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    scores = checkpoint["logging"]["mean_fg_dice"][EVERY - 1 :: EVERY]
    plans = read_json(run.parent / "plans.json", "Run three_sets.py again.")
    trivial = ", ".join(f"{what} {value:.3f}" for what, value in trivial_scores(plans).items())
    entry = plans["configurations"]["3d_fullres"]
    batches = f"{entry['batch_size']} of {'x'.join(map(str, entry['patch_size']))}"
    cells = [f"`{plans[BLOCK]['task']}`", batches, trivial, *(f"{float(score):.3f}" for score in scores)]
    return f"| {' | '.join(cells)} |"


def arrays_of(plans: Mapping[str, dict]) -> Path:
    return (
        Path(os.environ["nnUNet_preprocessed"])
        / COMMON.dataset
        / plans["configurations"]["3d_fullres"]["data_identifier"]
    )


def trivial_scores(plans: Mapping[str, dict]) -> dict[str, float]:
    """Main scores on the validation samples of what needs no learning."""
    pretext = PretextSettings.read(plans[BLOCK], "The plans")
    task = pretext.task()
    folder = arrays_of(plans)
    names = sorted(path.stem for path in folder.glob("*.b2nd") if not path.stem.endswith("_seg"))
    _, held_out = hold_out(names)
    entry = plans["configurations"]["3d_fullres"]
    patch, batch_size = entry["patch_size"], entry["batch_size"]
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


def make_report(rows: Sequence[str], more: Sequence[str], device: str) -> str:
    epochs = rows[0].count(" | ") - 2
    after = " | ".join(str(ITERATIONS * EVERY * (number + 1)) for number in range(epochs))
    changed = "; ".join(f"`{task}` {' '.join(options)}" for task, options in TASK_OPTIONS.items())
    added = " ".join(["", "--more", *more]) if more else ""
    network = NETWORKS["unet"]
    length = f"-num_epochs {network.epochs} -num_iterations_per_epoch {ITERATIONS}"
    length += f" -num_val_iterations_per_epoch {VALIDATION}"
    same = " ".join((*COMMON.options, *PRETRAINING))
    of_more = (
        f"Runs with other batches were made with `misfm_pretrain -d 900 -p {POOL_PLANS} -pretext TASK "
        f"-overwrite_plans_name NAME {' '.join((*network.options, *PRETRAINING))} {length} -device {device} "
        "-patch_size X Y Z -batch_size N`, and differ from the others in the patch and batch size of the table alone."
    )
    return "\n".join(
        [
            "# What a small network learns of each pretext task",
            "",
            "Main score on the fixed validation samples after so many iterations, one run for each task, on volumes of "
            f"three public sets together. nnU-Net's U-Net with {FEATURES} features; "
            f"`{same}`, otherwise the tasks' defaults, but {changed}.",
            "",
            "The score is the variance explained (0 for a constant, 1 for the image) of masked voxels or of all "
            "voxels; the share of the swaps' error that is undone (0 for the input, 1 for the image); the mean Dice of "
            "the fusion classes above 0; the share of voxels found again.",
            "",
            f"| task | batches | without learning | {after} |",
            "| --- " * (3 + epochs) + "|",
            *rows,
            "",
            *([of_more, ""] if more else []),
            *provenance(
                "python benchmarks/three_sets.py pretrain --data FOLDER --work WORK; "
                f"python benchmarks/pretext_learning.py --work WORK{added}",
                ("torch", "nnunetv2"),
                {},
                device_name(device),
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
