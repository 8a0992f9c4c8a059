"""Table and figure of what low_label.py has run so far: python benchmarks/low_label_report.py SETTING.

They go to benchmarks/results/low_label_SETTING.md and .png.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from low_label_study import ARMS, RECORDS, RESULTS
from scipy import stats

BASELINE = "scratch"
CONFIDENCE = 0.95

Runs = dict[tuple[str, int], dict[int, dict[str, Any]]]  # (arm, labelled cases) -> seed -> run


def write_report(setting: str) -> str:
    """Write the page and the figure of a setting; returns the page."""
    runs = read_runs(RECORDS / setting)
    if not runs:
        return "No runs yet."
    example = next(iter(next(iter(runs.values())).values()))
    epochs, iterations, _ = example["setting"]["finetuning"]
    lines = [
        f"Setting `{setting}`: {epochs * iterations} iterations of fine-tuning with batch size "
        f"{example['setting']['batch_size']}; network options "
        f"`{' '.join(example['setting']['network']) or 'default'}`. Mean foreground Dice of 40 test cases, in points; "
        f"mean ± standard deviation over seeds, each with its own labelled cases. Differences are paired by seed, with "
        f"their {100 * CONFIDENCE:.0f} % t interval.",
        "",
        "| labelled | arm | seeds | test Dice | minus scratch | minus encoder_only | iterations to scratch's final |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (arm, labelled), by_seed in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        dice = [100 * run["test_dice"] for run in by_seed.values()]
        spread = f" ± {np.std(dice, ddof=1):.1f}" if len(dice) > 1 else ""
        lines.append(
            f"| {labelled} | {arm} | {len(dice)} | {np.mean(dice):.1f}{spread} | "
            f"{paired(by_seed, runs.get((BASELINE, labelled), {})) if arm != BASELINE else ''} | "
            f"{paired(by_seed, runs.get(('encoder_only', labelled), {})) if arm in ('boxes', 'blocks') else ''} | "
            f"{iterations_to(by_seed, runs.get((BASELINE, labelled), {}))} |"
        )
    shown = [name for name in ARMS if name in {arm for arm, _ in runs}]
    lines += ["", *(f"- `{name}`: {ARMS[name].meaning}." for name in shown)]
    picture = f"low_label_{setting}.png"
    summary = "\n".join(lines)
    devices = sorted({run["device"] for by_seed in runs.values() for run in by_seed.values()})
    dates = sorted({run["date"] for by_seed in runs.values() for run in by_seed.values()})
    footer = [
        f"- Command: `python benchmarks/low_label.py --dataset DATASET --work FOLDER --setting {setting} --tuned`",
        *sorted({options_of(run) for by_seed in runs.values() for run in by_seed.values()}),
        f"- Device: {', '.join(devices)}",
        f"- Date: {dates[0]} to {dates[-1]}",
        "",
    ]
    figure = "\n\n![learning curves]({})\n"
    page = f"# Fine-tuning with few labels, {setting}\n\n{summary}{figure.format(picture)}\n" + "\n".join(footer)
    (RESULTS / f"low_label_{setting}.md").write_text(page)
    draw(runs, RESULTS / picture)
    return page


def options_of(run: dict[str, Any]) -> str:
    """A line with what an arm's commands were given beside the setting."""
    given = [f"`{name} {options}`" for name, options in run["options"].items() if options]
    return f"- {run['arm']}: {', '.join(given) or 'defaults'}"


def read_runs(folder: Path) -> Runs:
    """The records of all runs."""
    runs: Runs = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        runs[run["arm"], run["labelled"]][run["seed"]] = run
    return dict(runs)


def paired(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    """Mean difference of the seeds that both have, in points of Dice; with its interval where it is not one seed's."""
    seeds = sorted(set(runs) & set(others))
    differences = [100 * (runs[seed]["test_dice"] - others[seed]["test_dice"]) for seed in seeds]
    if not differences:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.1f} (1)"
    low, high = interval(differences)
    return f"{np.mean(differences):+.1f} [{low:+.1f}, {high:+.1f}] ({len(differences)})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The t interval of a mean of two values or more."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def iterations_to(runs: dict[int, dict[str, Any]], scratch: dict[int, dict[str, Any]]) -> str:
    """Iterations until the mean validation curve reaches the end of the baseline's, as a share of all of them."""
    seeds = sorted(set(runs) & set(scratch))
    if not seeds:
        return ""
    goal = np.mean([scratch[seed]["validation_curve"][-1] for seed in seeds])
    curve = np.mean([runs[seed]["validation_curve"] for seed in seeds], axis=0)
    reached = np.flatnonzero(curve >= goal)
    if len(reached) == 0:
        return "not reached"
    step = runs[seeds[0]]["iterations_per_epoch"]
    return f"{(reached[0] + 1) * step} of {len(curve) * step}"


def draw(runs: Runs, path: Path) -> None:
    """Learning curves: a row for each number of labelled cases, against iterations and against time."""
    numbers = sorted({labelled for _, labelled in runs})
    figure, axes = plt.subplots(len(numbers), 2, figsize=(11, 3.8 * len(numbers)), squeeze=False)
    for row, labelled in zip(axes, numbers, strict=True):
        for index, arm in enumerate(sorted(a for a, n in runs if n == labelled)):
            by_seed = runs[arm, labelled]
            curves = np.array([run["validation_curve"] for run in by_seed.values()])
            iterations = next(iter(by_seed.values()))["iterations_per_epoch"] * np.arange(1, curves.shape[1] + 1)
            minutes = np.mean([run["training_seconds"] for run in by_seed.values()]) / 60
            for axis, x in zip(row, (iterations, iterations / iterations[-1] * minutes), strict=True):
                axis.plot(x, curves.mean(0), color=f"C{index}", label=f"{arm} ({len(curves)})")
                if len(curves) > 1:
                    deviation = curves.std(0, ddof=1)
                    axis.fill_between(x, curves.mean(0) - deviation, curves.mean(0) + deviation, alpha=0.15)
        for axis, label in zip(row, ("iteration", "minutes of training"), strict=True):
            axis.set(xlabel=label, ylabel="pseudo Dice, validation cases", title=f"{labelled} labelled cases")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=("small", "full"))
    setting = parser.parse_args().setting
    print(write_report(setting))
