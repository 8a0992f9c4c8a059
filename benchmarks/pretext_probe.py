"""A linear probe of what each pretext task has taught, on several labelled datasets.

    python benchmarks/pretext_probe.py DATASET ... --work WORK --weights NAME=CHECKPOINT ...
        [--patients ACDC='patient\\d+']

Plans and preprocesses each dataset with nnU-Net, runs `misfm_compare --probe` with all checkpoints and random weights,
and writes one table. Goes on where it was stopped. The checkpoints may be those of pretext_learning.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from low_label import command
from provenance import device_name, provenance

RESULTS = Path(__file__).parent / "results" / "pretext_probe.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", type=Path, help="in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument("--patients", nargs="*", default=[], metavar="DATASET=REGEX", help="finds a case's patient")
    parser.add_argument("--labelled", default="10", help="cases (patients) to fit to (default: %(default)s)")
    parser.add_argument("--num_test", default="20", help="cases (patients) to test on (default: %(default)s)")
    parser.add_argument("--seeds", default="3", help="draws of them (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    options = parser.parse_args()
    for name in ("raw", "preprocessed", "results"):
        folder = options.work.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    patients = dict(word.split("=", 1) for word in options.patients)
    scores = {folder.name: probe(folder, patients, options) for folder in options.datasets}
    report = make_report(scores, options)
    options.output.write_text(report, encoding="utf-8")
    print(report)


def probe(folder: Path, patients: Mapping[str, str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Dice on the test cases of every seed by arm, in points."""
    raw = Path(os.environ["nnUNet_raw"]) / folder.name
    if not raw.exists():
        raw.symlink_to(folder.resolve(), target_is_directory=True)
    number, _, name = folder.name.removeprefix("Dataset").partition("_")
    if not (Path(os.environ["nnUNet_preprocessed"]) / folder.name / "nnUNetPlans_3d_fullres").is_dir():
        command("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres", "-npfp", "1", "-np", "1")
    output = options.work.resolve() / f"probe_{name}"
    command(
        *("misfm_compare", "-d", number, "-pretrained_weights", *options.weights, "--from_scratch", "--probe"),
        *("-num_labelled", options.labelled, "-num_test", options.num_test, "-seeds", options.seeds),
        *(["-patients", patients[name]] if name in patients else []),
        *("-device", options.device, "-o", str(output)),
    )
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {scored["arm"]: list(scored["dice_by_seed"].values()) for scored in summary["scores"]}


def make_report(scores: Mapping[str, Mapping[str, Sequence[float]]], options: argparse.Namespace) -> str:
    arms = list(dict.fromkeys(arm for by_arm in scores.values() for arm in by_arm))
    rows = []
    for arm in sorted(arms, key=lambda arm: (arm != "scratch", arm)):
        cells = [f"{np.mean(by_arm[arm]):.1f} ± {np.std(by_arm[arm]):.1f}" for by_arm in scores.values()]
        rows.append(f"| {'random weights' if arm == 'scratch' else arm} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "# A linear probe after each pretext task",
            "",
            "A linear classifier of voxels on the frozen feature maps of encoder and decoder, fitted to "
            f"{options.labelled} cases (patients where one has several) and tested on {options.num_test} others; mean "
            f"foreground Dice in points, mean ± standard deviation over {options.seeds} draws of the cases that it "
            "is fitted to. The weights are those of pretext_learning.md; nothing is fine-tuned.",
            "",
            f"| weights | {' | '.join(scores)} |",
            "| --- " * (1 + len(scores)) + "|",
            *rows,
            "",
            *provenance(
                "python benchmarks/pretext_probe.py DATASET ... --work WORK --weights NAME=CHECKPOINT ...",
                ("torch", "nnunetv2"),
                {},
                device_name(options.device),
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
