"""The log of the recipe: what was tried for low_label.py, scored on its validation cases only.

    python benchmarks/low_label_tuning.py --dataset .../Dataset004_Hippocampus --work FOLDER [--trials NAME ...]

Each trial trains with 10 labelled cases, for labelled cases of seeds that the study does not use, and leaves a file in
benchmarks/results/low_label/tuning/. The table of all of them, low_label_tuning.md, is written anew each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from low_label import BLOCKS, BOXES, NUM_VALIDATION, RESULTS, Arm, Study

LABELLED = 10
SEEDS = (10, 11)
TUNING = RESULTS / "tuning"

DEFAULT = ("-schedule", "default")
TRIALS: dict[str, Arm] = {
    "scratch_1e-3": Arm(plan=("-initial_lr", "1e-3")),
    "scratch_3e-3": Arm(plan=("-initial_lr", "3e-3")),
    "scratch_1e-2": Arm(plan=("-initial_lr", "1e-2")),
    "boxes_1e-3": Arm(BOXES, ("-initial_lr", "1e-3")),
    "boxes_3e-3": Arm(BOXES, ("-initial_lr", "3e-3")),
    "boxes_1e-2": Arm(BOXES, ("-initial_lr", "1e-2")),
    "boxes_default_3e-3": Arm(BOXES, (*DEFAULT, "-initial_lr", "3e-3")),
    "boxes_default_1e-2": Arm(BOXES, (*DEFAULT, "-initial_lr", "1e-2")),
    "blocks_3e-3": Arm(BLOCKS, ("-initial_lr", "3e-3")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    study = Study(options.dataset, None, options.work.resolve(), "cpu")
    study.prepare()
    TUNING.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.trials:
            record = TUNING / f"{name}_seed{seed}.json"
            if not record.is_file():
                folder, content = study.train(name, TRIALS[name], LABELLED, seed)
                record.write_text(json.dumps(content, indent=1))
                shutil.rmtree(folder)
                print(write_table(), flush=True)


def write_table() -> str:
    """Write low_label_tuning.md from the files of the trials; returns it."""
    runs = defaultdict(list)
    for path in sorted(TUNING.glob("*.json")):
        run = json.loads(path.read_text())
        runs[run["arm"]].append(run)
    lines = [
        "# What was tried for the recipe",
        "",
        f"Setting `cpu` of low_label.py, {LABELLED} labelled cases, Dice of the {NUM_VALIDATION} validation cases in "
        "points after the last iteration, and pseudo Dice a third and two thirds of the way; best first.",
        "",
        "| trial | misfm_pretrain | misfm_plan | Dice | seeds | at 1/3 | at 2/3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    ranked = sorted(runs.items(), key=lambda item: -np.mean([run["validation_dice"] for run in item[1]]))
    for name, trials in ranked:
        scores = [100 * run["validation_dice"] for run in trials]
        curve = 100 * np.mean([run["validation_curve"] for run in trials], axis=0)
        options = trials[0]["options"]
        lines.append(
            f"| {name} | {options['misfm_pretrain'] or ''} | {options['misfm_plan']} | {np.mean(scores):.1f} | "
            f"{', '.join(f'{score:.1f}' for score in scores)} | "
            f"{curve[len(curve) // 3 - 1]:.1f} | {curve[2 * len(curve) // 3 - 1]:.1f} |"
        )
    text = "\n".join([*lines, ""])
    (RESULTS.parent / "low_label_tuning.md").write_text(text)
    return text


if __name__ == "__main__":
    main()
