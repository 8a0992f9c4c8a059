"""CPU time of preparing a volume beside what each worker of nnUNetv2_preprocess does with it.

    python benchmarks/archive_speed.py --data FOLDER [--volumes 30]

FOLDER holds nnU-Net datasets. Both take every volume to the same target spacing, three times in turn. Replaces its
section of benchmarks/results/archive.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from archive_run import measure

from nnunetv2_misfm.pool.case import PREPARED, CaseTask, prepare_case
from nnunetv2_misfm.pool.folder import PoolFolder
from nnunetv2_misfm.pool.inspection import find_volumes
from nnunetv2_misfm.pool.plan import adopt_plans, layout_hash
from nnunetv2_misfm.pool.settings import PoolSettings

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--volumes", type=int, default=30, help="of each dataset (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    measure(options.folder, partial(measure_speed, options))


def measure_speed(options: argparse.Namespace, folder: Path) -> list[str]:
    rows = []
    for name in sorted(path.name for path in options.data.glob("Dataset*")):
        ours, theirs, spacing = [], [], ""
        for case in nnunet_cases(options.data / name, folder, options.volumes):
            for _ in range(ROUNDS):
                theirs.append(case["theirs"]())
                ours.append(case["ours"]())
            spacing = case["spacing"]
        ratio = sum(ours) / sum(theirs)
        rows.append(
            f"| {name} | {len(ours) // ROUNDS} | {spacing} | {statistics.mean(ours):.3f} | "
            f"{statistics.mean(theirs):.3f} | {ratio:.2f} |"
        )
    return [
        "## Beside nnUNetv2_preprocess",
        "",
        f"CPU seconds per volume, mean of {ROUNDS} alternating rounds in one process: ours is `prepare_case` with "
        "publishing and the record, by the plans of that dataset (`-plans_from`); nnU-Net's is `run_case_save`, which "
        "its workers run, with labels.",
        "",
        "| dataset | volumes | spacing, mm | ours | nnU-Net | ours / nnU-Net |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def nnunet_cases(dataset: Path, folder: Path, most: int) -> Iterator[dict[str, Any]]:
    """For every case two functions that give the CPU time of preparing it."""
    # nnU-Net reads the environment when it is imported.
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw = copy_cases(dataset, folder / "nnUNet_raw" / dataset.name, most)
    number = int(dataset.name[7:10])
    extract_fingerprints([number], num_processes=1)
    plan_experiments([number])
    root = folder / "nnUNet_preprocessed" / dataset.name
    plans = json.loads((root / "nnUNetPlans.json").read_text(encoding="utf-8"))
    dataset_json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    preprocessor = configuration.preprocessor_class(verbose=False)
    images = sorted((raw / "imagesTr").iterdir())
    settings = PoolSettings(skip_label_maps=True)
    names = f"Dataset{900 + number}_Pool", "nnUNetPlans", "3d_fullres"
    adopted = adopt_plans(plans, "3d_fullres", settings, *names[:2])
    pool = PoolFolder(*names)
    pool.create()
    pool.clear_temporary()
    (root / "theirs").mkdir()
    layout = layout_hash(adopted, "3d_fullres")
    found = find_volumes(images, settings.join_channels).volumes
    for volume, image in zip(sorted(found, key=lambda one: one.channels[0][0]), images, strict=True):
        label = raw / "labelsTr" / image.name.replace("_0000", "")
        case = CaseTask(replace(volume), adopted, "3d_fullres", layout, pool.temporary)
        arguments = (str(root / "theirs" / volume.case), [str(image)], str(label), manager, configuration, dataset_json)

        def ours(case: CaseTask = case) -> float:
            started = time.process_time()
            result = prepare_case(case)
            pool.publish(result.record)
            assert result.record.status == PREPARED, result.record.reason
            return time.process_time() - started

        def theirs(arguments: tuple[Any, ...] = arguments) -> float:
            for earlier in (root / "theirs").iterdir():  # blosc2 does not write over a file
                earlier.unlink()
            started = time.process_time()
            preprocessor.run_case_save(*arguments)
            return time.process_time() - started

        yield {"ours": ours, "theirs": theirs, "spacing": " x ".join(f"{mm:.3g}" for mm in configuration.spacing)}


def copy_cases(dataset: Path, target: Path, most: int) -> Path:
    """The first cases of a dataset of one channel."""
    (target / "imagesTr").mkdir(parents=True)
    (target / "labelsTr").mkdir()
    images = sorted((dataset / "imagesTr").iterdir())[:most]
    for image in images:
        shutil.copy(image, target / "imagesTr")
        shutil.copy(dataset / "labelsTr" / image.name.replace("_0000", ""), target / "labelsTr")
    described = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    (target / "dataset.json").write_text(json.dumps({**described, "numTraining": len(images)}), encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
