"""How much of a pretraining run is spent waiting for data: misfm_pretrain as users run it, on synthetic volumes.

    python benchmarks/pretraining_speed.py [--workers 8] [--device cuda] [--work FOLDER]

The table compares each epoch's time with what it would be with every batch at hand, so 1.00 is a run that never waits.
The first epoch, which fills caches and compiles, does not count. On a CPU a small network and patch take the place of
the full-size ones, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from fusion_speed import make_volume
from provenance import device_name, provenance

RESULTS = Path(__file__).parent / "results"
NUM_VOLUMES = 8
EPOCHS = 5
SETTINGS = {
    "cuda": ("-patch_size", "64", "128", "128", "-batch_size", "4", "-num_iterations_per_epoch", "50"),
    "cpu": ("-patch_size", "16", "48", "48", "-batch_size", "2", "-num_iterations_per_epoch", "5")
    + ("-features_per_stage", "4", "8", "16", "32", "64"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SETTINGS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="data loading processes (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        rows = pretrain(Path(folder), options.device, options.workers)
    report = make_report(rows, options.device, options.workers)
    (RESULTS / f"pretraining_speed_{options.device}.md").write_text(report, encoding="utf-8")
    print(report)


def pretrain(folder: Path, device: str, workers: int) -> list[dict[str, str]]:
    """The rows of metrics.csv after the first."""
    images = folder / "images"
    images.mkdir()
    for seed in range(NUM_VOLUMES):
        volume = (1000 * make_volume(seed)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(images / f"{seed}.nii.gz"))
    environment = dict(os.environ)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        environment[name] = str(folder / name)
    environment["nnUNet_n_proc_DA"] = str(workers)
    command = [str(Path(sys.executable).parent / "misfm_pretrain"), "-i", str(images), "-d", "906", "-n", "Speed"]
    command += ["-modality", "ct", "-spacing", "none", "-device", device, "-num_epochs", str(EPOCHS), *SETTINGS[device]]
    subprocess.run(command, env=environment, check=True)
    metrics = next((folder / "nnUNet_results").rglob("metrics.csv"))
    with open(metrics, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[1:]


def make_report(rows: list[dict[str, str]], device: str, workers: int) -> str:
    lines = [
        "# Pretraining: waiting for data",
        "",
        f"`misfm_pretrain {' '.join(SETTINGS[device])}`, {workers} loading processes, {NUM_VOLUMES} volumes of "
        "160x256x256.",
        "",
        "| epoch | iterations/s | waiting for data | time / time with batches at hand | peak memory, GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = float(row["data_wait_share"])
        lines.append(
            f"| {row['epoch']} | {float(row['iterations_per_s']):.2f} | {100 * share:.1f} % | {1 / (1 - share):.2f} | "
            f"{row['peak_memory_gb']} |"
        )
    command = f"python benchmarks/pretraining_speed.py --device {device} --workers {workers}"
    return "\n".join([*lines, "", *provenance(command, ("torch", "nnunetv2", "blosc2"), {}, device_name(device)), ""])


if __name__ == "__main__":
    main()
