"""A table and a figure of what three_sets.py has found: python benchmarks/three_sets_table.py.

Writes results/three_sets.md and results/three_sets.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from provenance import provenance
from three_sets import EPOCH, ITERATIONS, NETWORKS, OWN_SCHEDULES, PRETRAINING, RESULTS, SETS, TASK_OPTIONS, Network

from nnunetv2_misfm.commands.compare.arms import NNUNET, SCRATCH
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS

WHERE_FROM = (
    "- Dataset004_Hippocampus: 200 of the training cases of Task04 of the Medical Segmentation Decathlon "
    "(medicaldecathlon.com), as they are.",
    "- Dataset005_LeftAtrium: 80 of the training cases of the 2018 left atrial segmentation challenge (Xiong et al., "
    "2020), as the repository yulequan/UA-MT has them, voxels of 2x2x2 averaged to 1.25 mm.",
    "- Dataset006_ACDC: 140 frames of 70 patients of the ACDC challenge, as the repository HiLab-git/WSL4MIS has them, "
    "cases called patient001_frame01, nominal spacing 10x1.5x1.5 mm.",
)
TITLES = {
    "hippocampus": "Hippocampus",
    "atrium": "Left atrium",
    "heart": "ACDC",
    "atrium-2.5mm": "Left atrium at 2.5 mm",
    "heart-3mm": "ACDC at 3 mm",
}
# What the figure calls the pools.
POOLS = {"common": "images of all sets", "own": "own images", "own_long": "own images, longer"}
COLOURS = "#35b779", "#440154"  # of the shorter and the longer fine-tuning


def main() -> None:
    found = sorted(
        map(result, RESULTS.glob("compare_*.json")), key=lambda of: (of.set, of.iterations, of.own_schedules)
    )
    changed = "; ".join(f"{task} {' '.join(words)}" for task, words in TASK_OPTIONS.items())
    tested = ", ".join(f"{name} {labelled.num_test}" for name, labelled in SETS.items())
    devices = sorted({one.content["terms"]["device"] for one in found})
    lines = [
        "# Three public sets: what pretraining brings with few labels",
        "",
        f"Small networks, pretrained (`misfm_pretrain {' '.join(PRETRAINING)}`; {changed}) on the images of patients "
        "that are neither tested nor validated on: of all three sets together in 8 crops of 32x32x32 (common), or of "
        "the set alone in 4 crops of the size it is fine-tuned with (own). Mean foreground Dice of the test cases, in "
        "points; mean ± standard deviation over draws of the labelled patients; one draw where there is none. Test "
        f"patients: {tested}.",
        "",
        *(f"- {network.title}: pretrained for {lengths(network)}." for network in NETWORKS.values()),
        *WHERE_FROM,
        "",
        *probed(),
        *fine_tuned(found),
        *provenance("python benchmarks/three_sets_table.py", ("torch", "nnunetv2"), {}, ", ".join(devices).upper()),
        "",
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    draw_differences(found, RESULTS.with_suffix(".png"))
    print("\n".join(lines))


@dataclass(frozen=True)
class Result:
    """A comparison: what its file's name says, and what it holds."""

    set: str
    network: str
    iterations: int
    own_schedules: bool
    content: dict

    def schedule(self, arm: str) -> str:
        """That misfm_compare has trained an arm with."""
        of_arm = "sawtooth" if self.own_schedules and arm not in (SCRATCH, NNUNET) else "poly"
        return of_arm + self.short_epochs

    @property
    def short_epochs(self) -> str:
        """How long epochs were, for results of the time when ramps rose with each epoch."""
        length = self.content["terms"]["length"]
        return "" if f"epochs of {EPOCH})" in length else f", epochs {length.partition('epochs ')[2].rstrip(')')}"

    @property
    def fresh(self) -> str:
        """Which draws they are, for a repetition with others than the first."""
        first = min(int(seed) for score in self.content["scores"] for seed in score["dice_by_seed"])
        return f", from draw {first}" if first else ""

    def differences(self) -> Iterator[dict]:
        """To scratch."""
        return (one for one in self.content["comparisons"] if one["minus"] == SCRATCH)


def result(path: Path) -> Result:
    _, name, network, iterations, _, *own = path.stem.split("_")
    return Result(name, network, int(iterations), OWN_SCHEDULES in own, read(path))


def lengths(network: Network) -> str:
    others = [f"{task} for {epochs * ITERATIONS:,}" for task, epochs in network.other_epochs.items()]
    iterations = f"{network.epochs * ITERATIONS:,} iterations"
    return ", ".join([iterations, *others, "on its own images three times that, long twelve times"])


def probed() -> list[str]:
    """Nothing if nothing was probed yet."""
    probes = {path.stem.split("_")[1]: read(path) for path in sorted(RESULTS.glob("probe_*_unet.json"))}
    if not probes:
        return []
    arms = dict.fromkeys(score["arm"] for probe in probes.values() for score in probe["scores"])
    rows = [
        [
            "random weights" if arm == SCRATCH else arm,
            *(mean_and_deviation(score_of(p, arm)) for p in probes.values()),
        ]
        for arm in arms
    ]
    head = f"## A linear classifier of frozen features ({NETWORKS['unet'].title}, 10 labelled)"
    return [head, "", *table(["weights", *probes], rows), ""]


def fine_tuned(found: Sequence[Result]) -> list[str]:
    """Nothing if nothing was compared yet."""
    rows: dict[str, list[list[str]]] = {}
    for of in found:
        differences = {(one["arm"], one["labelled"]): one for one in of.differences()}
        for score in of.content["scores"]:
            arm, labelled, by_seed = score["arm"], score["labelled"], score["dice_by_seed"]
            rate = ", ".join(f"{rate:g}" for rate in score["learning_rates"])
            terms = [of.set, labelled, of.iterations, arm, of.schedule(arm), rate]
            cells = [*terms, f"{len(by_seed)}{of.fresh}", mean_and_deviation(list(by_seed.values()))]
            row = [*map(str, cells), *difference_cells(differences.get((arm, labelled)))]
            rows.setdefault(of.network, []).append(row)
    if not rows:
        return []
    head = ["set", "labelled", "iterations", "arm", "schedule", "rate", "seeds", "Dice", "minus scratch"]
    tables = [
        line
        for network, of_network in rows.items()
        for line in (
            f"### {NETWORKS[network].title}",
            "",
            *table([*head, "iterations to scratch's end"], of_network),
            "",
        )
    ]
    return [
        "## Fine-tuned",
        "",
        "All arms of a set have the same plans, batches of 2, AdamW, cases and seeds, and the same schedule unless the "
        "table says otherwise (`--own_schedules`: `sawtooth` for weights, as misfm_plan plans them). Where arms have "
        "several learning rates in all, each was tried with every one on the validation cases. Differences are paired "
        "by seed, with their 95 % t interval.",
        "",
        *tables,
    ]


def draw_differences(results: Sequence[Result], path: Path) -> None:
    """Differences to scratch with their intervals: a panel for each set and number of labelled patients.

    Of the comparisons in which all tasks took part, with the schedules of misfm_plan and the first network; the table
    has all. A row is a task and its pool, the best on average first.
    """
    shown = [of for of in results if of.own_schedules and of.network == next(iter(NETWORKS)) and not of.short_epochs]
    shown = [of for of in shown if {task for task, _ in map(task_and_pool, of.differences())} == set(PRETEXT_TASKS)]
    found = [(of, one) for of in shown for one in of.differences()]
    sets = sorted({of.set for of in shown}, key=lambda name: TITLES[name])
    numbers = sorted({one["labelled"] for _, one in found})
    gains: dict[tuple[str, str], list[float]] = {}
    for _, one in found:
        gains.setdefault(task_and_pool(one), []).append(one["difference"])
    rows = sorted(gains, key=lambda row: -fmean(gains[row]))
    figure, axes = plt.subplots(
        len(numbers),
        len(sets),
        figsize=(3.4 + 2.5 * len(sets), 0.8 + len(numbers) * (0.5 + 0.27 * len(rows))),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, number in zip(axes, numbers, strict=True):
        for axis, name in zip(line, sets, strict=True):
            of_panel = [(of, one) for of, one in found if of.set == name and one["labelled"] == number]
            if not of_panel:
                axis.set_visible(False)
                continue
            draw_panel(axis, of_panel, rows)
            axis.set_title(f"{TITLES[name]}, {number} labelled", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("points of Dice more than from scratch")
    axes[0, 0].set_yticks(range(len(rows)), [f"{task.replace('_', ' ')}, {POOLS[pool]}" for task, pool in rows])
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis: Axes, found: Sequence[tuple[Result, dict]], rows: Sequence[tuple[str, str]]) -> None:
    """The differences of one set: a colour for each length, the shorter one above."""
    axis.axvline(0, color="black", linewidth=1)
    axis.grid(axis="x", alpha=0.3)
    for number, iterations in enumerate(sorted({of.iterations for of, _ in found})):
        colour, below = COLOURS[number], 0.3 * (number - 0.5)
        for of, one in found:
            if of.iterations == iterations and one["low"] is not None:
                y = rows.index(task_and_pool(one)) + below
                axis.plot((one["low"], one["high"]), (y, y), color=colour, linewidth=2, alpha=0.6)
                axis.plot(one["difference"], y, "o", color=colour, markersize=5)
        axis.plot([], [], "o-", color=colour, markersize=5, label=f"{iterations:,} iterations")
    axis.legend(fontsize="x-small", loc="upper left")


def task_and_pool(difference: dict) -> tuple[str, str]:
    pool = next(pool for pool in POOLS if difference["arm"].endswith(f"_{pool}"))
    return difference["arm"].removesuffix(f"_{pool}"), pool


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def score_of(found: dict, arm: str) -> list[float]:
    return [value for score in found["scores"] if score["arm"] == arm for value in score["dice_by_seed"].values()]


def mean_and_deviation(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{np.mean(values):.1f}"


def difference_cells(difference: dict | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    low, high = difference["low"], difference["high"]
    interval = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
    iterations = difference["iterations_to_the_others_end"]
    return f"{difference['difference']:+.1f}{interval}", str(iterations or f"more than {difference['iterations']}")


if __name__ == "__main__":
    main()
