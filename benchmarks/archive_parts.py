"""Whether parts that start together and are killed make the pool that one part makes.

    python benchmarks/archive_parts.py --data FOLDER [--volumes 300]

Ten parts start at the same moment on real volumes of FOLDER, which holds nnU-Net datasets; three of them are killed at
random moments and started again, twice. Replaces its section of benchmarks/results/archive.md.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
from archive_run import POOL, measure, part, pretrain

DATA = Path("nnUNet_preprocessed") / POOL / "nnUNetPlans_3d_fullres"
TOGETHER, KILLED, TRIALS = 10, 3, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--volumes", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    measure(options.folder, partial(measure_parts, options))


def measure_parts(options: argparse.Namespace, folder: Path) -> list[str]:
    images, generator = folder / "images", random.Random(0)
    sources = sorted(options.data.glob("Dataset*/imagesTr/*.nii.gz"))[: options.volumes]
    for source in sources:
        (images / source.parts[-3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, images / source.parts[-3])
    settings = ["-modality", "mr", "-spacing", "1.5", "1.5", "1.5"]
    pretrain(images, *settings)
    one, rows = arrays(folder), []
    for trial in range(TRIALS):
        shutil.rmtree(folder / "nnUNet_preprocessed" / POOL)
        started = {number: start(images, number, settings) for number in range(TOGETHER)}
        killed: dict[int, str] = {}
        for moment in sorted(generator.uniform(0.05, 0.6) * len(sources) for _ in range(KILLED)):
            while num_prepared(folder) < moment:
                time.sleep(0.02)
            alive = [number for number, process in started.items() if process.is_alive() and number not in killed]
            number = generator.choice(alive)
            os.kill(started[number].pid, signal.SIGKILL)
            started[number].join()
            killed[number] = f"part {number} after {num_prepared(folder)} volumes"
            started[number] = start(images, number, settings)
        for process in started.values():
            process.join()
        failed = [number for number, process in started.items() if process.exitcode]
        same = "the same" if arrays(folder) == one else "NOT the same"
        rows.append(f"| {trial + 1} | {', '.join(killed.values())} | {failed or 'none'} | {same} |")
    return [
        "## Parts that start together and are killed",
        "",
        f"{len(sources)} real volumes. {TOGETHER} parts start at the same moment; {KILLED} are killed (SIGKILL) and "
        "started again. Compared are the bytes of all arrays, the report, the fingerprint and the plans.",
        "",
        "| trial | killed | parts that failed | pool |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def num_prepared(folder: Path) -> int:
    """Volumes of all parts together."""
    return len(list((folder / DATA).glob("*_seg.b2nd")))


def start(images: Path, number: int, settings: Sequence[str]) -> Any:
    arguments = (images, *settings, *part(number, TOGETHER))
    process = multiprocessing.get_context("fork").Process(target=pretrain, args=arguments)
    process.start()
    return process


def arrays(folder: Path) -> dict[str, str]:
    """Digests of all arrays of the pool, and of what is said about them."""
    found = {path.name: digest(blosc2.open(str(path))[:].tobytes()) for path in (folder / DATA).glob("*.b2nd")}
    found |= {path.name: digest(path.read_bytes()) for path in (folder / DATA).parent.glob("*.csv")}
    return found | {path.name: digest(path.read_bytes()) for path in (folder / DATA).parent.glob("*.json")}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
