"""The log of the recipe: what was tried for low_label.py, scored on its validation cases only.

    python benchmarks/low_label_tuning.py --dataset .../Dataset004_Hippocampus --work FOLDER [--trials NAME ...]
        [--device cuda] [--jobs 8]

Each trial trains with 10 labelled cases, for labelled cases of seeds that the study does not use, and leaves a file in
benchmarks/results/low_label/tuning/. The table of all of them, low_label_tuning.md, is written anew each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from low_label_study import ARMS, BOXES, NUM_VALIDATION, RECORDS, RESULTS, Arm, Pretraining, Run, Study, add_options

LABELLED = 10
SEEDS = (10, 11)
SETTING = "small"
TUNING = RECORDS / "tuning"


@dataclasses.dataclass(frozen=True)
class Trial:
    """An arm of the study done otherwise.

    Attributes:
        of: the arm that is tuned.
        plan: options of misfm_plan, beside the arm's own.
        pretraining: instead of the arm's own.
    """

    of: str
    plan: tuple[str, ...]
    pretraining: Pretraining | None = None

    @property
    def arm(self) -> Arm:
        arm = ARMS[self.of]
        return dataclasses.replace(arm, plan=arm.plan + self.plan, pretraining=self.pretraining or arm.pretraining)


def rate(value: str, schedule: str, *more: str) -> tuple[str, ...]:
    """Options of misfm_plan for a learning rate."""
    return ("-initial_lr", value, "-schedule", schedule, *more)


FAST_SEG_LAYERS = ("-seg_layers_lr_factor", "10")
ADAM = dataclasses.replace(BOXES, name="boxes_adam", options=(*BOXES.options, "-optimizer", "adam"))
TRIALS = {
    "scratch_adam_1e-3": Trial("scratch", rate("1e-3", "scratch", "-optimizer", "adam")),
    "scratch_adam_3e-3": Trial("scratch", rate("3e-3", "scratch", "-optimizer", "adam")),
    "scratch_adam_1e-2": Trial("scratch", rate("1e-2", "scratch", "-optimizer", "adam")),
    "scratch_adamw_3e-3": Trial("scratch", rate("3e-3", "scratch")),
    "scratch_adamw_5e-3": Trial("scratch", rate("5e-3", "scratch")),
    "scratch_adamw_3e-3_fast_seg_layers": Trial("scratch", rate("3e-3", "scratch", *FAST_SEG_LAYERS)),
    "boxes_pretrained_with_adam": Trial("boxes", rate("1e-3", "default"), ADAM),
    **{
        f"boxes_{schedule}_{value}": Trial("boxes", rate(value, schedule))
        for schedule in ("default", "sawtooth")
        for value in ("3e-3", "5e-3")
    },
    **{
        f"boxes_fast_seg_layers_{value}": Trial("boxes", rate(value, "default", *FAST_SEG_LAYERS))
        for value in ("1e-3", "2e-3", "3e-3")
    },
    "boxes_batch_2_fast_seg_layers_3e-3": Trial("boxes_batch_2", rate("3e-3", "default", *FAST_SEG_LAYERS)),
}
TUNED_LIKE = dict.fromkeys(("blocks", "boxes_wide_pool", "encoder_only"), "boxes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    study = Study(options.dataset, None, options.work, SETTING, options.device, options.jobs)
    study.prepare()

    def attempt(run: Run) -> None:
        record = TUNING / f"{run.title}.json"
        if not record.is_file():
            study.keep(record, study.train(run), run)

    runs = [Run(name, TRIALS[name].arm, LABELLED, seed) for seed in options.seeds for name in options.trials]
    failures = study.perform(runs, attempt, time.monotonic() + 60 * options.minutes)
    print(write_table())
    sys.exit("\n".join(failures) or 0)


def read_trials() -> dict[str, list[dict[str, Any]]]:
    """The records of each trial, a record for each seed."""
    runs = defaultdict(list)
    for path in sorted(TUNING.glob("*.json")):
        run = json.loads(path.read_text())
        runs[run["arm"]].append(run)
    return dict(runs)


def score(trials: Sequence[dict[str, Any]]) -> float:
    """Mean validation Dice of a trial's seeds, in points."""
    return float(np.mean([100 * run["validation_dice"] for run in trials]))


def best_options(arm: str) -> tuple[str, ...]:
    """The options of misfm_plan that did best among an arm's trials; the defaults where there are none."""
    tuned_as = TUNED_LIKE.get(arm, arm)
    scores = {name: score(runs) for name, runs in read_trials().items() if TRIALS[name].of == tuned_as}
    return ARMS[arm].plan + (TRIALS[max(scores, key=lambda name: scores[name])].plan if scores else ())


def write_table() -> str:
    """Write low_label_tuning.md from the files of the trials; returns it."""
    lines = [
        "# What was tried for the recipe",
        "",
        f"Setting `{SETTING}` of low_label.py, {LABELLED} labelled cases, Dice of the {NUM_VALIDATION} validation "
        "cases in points after the last iteration, and pseudo Dice a third and two thirds of the way; best first.",
        "",
        "| trial | misfm_pretrain | misfm_plan | Dice | seeds | at 1/3 | at 2/3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, trials in sorted(read_trials().items(), key=lambda item: -score(item[1])):
        scores = [100 * run["validation_dice"] for run in trials]
        curve = 100 * np.mean([run["validation_curve"] for run in trials], axis=0)
        options = trials[0]["options"]
        lines.append(
            f"| {name} | {options['misfm_pretrain'] or ''} | {options['misfm_plan']} | {np.mean(scores):.1f} | "
            f"{', '.join(f'{score:.1f}' for score in scores)} | "
            f"{curve[len(curve) // 3 - 1]:.1f} | {curve[2 * len(curve) // 3 - 1]:.1f} |"
        )
    text = "\n".join([*lines, ""])
    (RESULTS / "low_label_tuning.md").write_text(text)
    return text


if __name__ == "__main__":
    main()
