"""Opening a pool of many volumes: time and memory of our index beside nnU-Net's, and what loader processes add.

    python benchmarks/pool_index.py [--volumes 110000] [--output FILE]

The pool is simulated: a folder of empty files under the names that nnU-Net gives them. Each index is opened in
a process of its own. nnU-Net opens a dataset by listing its cases and splitting them into five folds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import device_name, provenance

RESULTS = Path(__file__).parent / "results"
WORKERS = 4
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=110_000)
    parser.add_argument("--output", type=Path, default=RESULTS / "pool_index.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.volumes):
            for ending in (".b2nd", ".pkl"):
                (Path(folder) / f"a_hospital_with_a_long_name_{number:06d}{ending}").touch()
        ours, theirs = (in_a_process(task, folder) for task in (open_ours, open_nnunets))
    report = "\n".join(
        [
            "# Opening a pool",
            "",
            f"A simulated pool of {options.volumes:,} volumes.",
            "",
            "| | seconds | memory of the index, MiB | own memory of the process, MiB | with code, MiB | "
            f"added by each of {WORKERS} loader processes, MiB |",
            "| --- | --- | --- | --- | --- | --- |",
            f"| ours | {ours['seconds']:.2f} | {ours['index']:.0f} | {ours['process']:.0f} | "
            f"{ours['code']:.0f} | {ours['worker']:.0f} |",
            f"| nnU-Net | {theirs['seconds']:.2f} | {theirs['index']:.0f} | {theirs['process']:.0f} | "
            f"{theirs['code']:.0f} | |",
            f"| ours / nnU-Net | {ours['seconds'] / theirs['seconds']:.2f} | "
            f"{ours['index'] / max(theirs['index'], 1):.2f} | {ours['process'] / theirs['process']:.2f} | "
            f"{ours['code'] / theirs['code']:.2f} | |",
            "",
            "The process' own memory is what no file backs (RssAnon); with code is all that is resident (VmRSS), and "
            "ours has PyTorch loaded, which nnU-Net's index does without. A loader process shares the index with "
            "the one that trains; what it adds is its private memory after reading the index.",
            "",
            *provenance("python benchmarks/pool_index.py", ("torch", "nnunetv2"), {}, device_name("cpu")),
            "",
        ]
    )
    options.output.write_text(report, encoding="utf-8")
    print(report)


def in_a_process(task: Callable[[Any, str], None], folder: str) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=task, args=(theirs, folder))
    process.start()
    found: dict[str, float] = ours.recv()
    process.join()
    return found


def open_ours(pipe: Any, folder: str) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    from nnunetv2_misfm.pretrain.crops import CropSamples
    from nnunetv2_misfm.pretrain.settings import AugmentSettings
    from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings, VolumeFusion
    from nnunetv2_misfm.trainers.pretext_data import hold_out

    before, started = memory("VmRSS"), time.perf_counter()
    training, _ = hold_out(nnUNetDatasetBlosc2.get_identifiers(folder))
    task = VolumeFusion(FusionSettings())
    pairs = CropSamples(folder, training, (64, 128, 128), task, AugmentSettings(), 0, 1)
    seconds = time.perf_counter() - started
    del training
    results = {"seconds": seconds, **measured(before)}
    queue = multiprocessing.get_context("fork").SimpleQueue()
    readers = [
        multiprocessing.get_context("fork").Process(target=read_all, args=(pairs, queue)) for _ in range(WORKERS)
    ]
    for reader in readers:
        reader.start()
    results["worker"] = sum(queue.get() for _ in readers) / WORKERS / MIB
    pipe.send(results)


def read_all(pairs: Any, queue: Any) -> None:
    before = private_memory()
    for case in range(pairs.num_cases):
        pairs.file_of(case)
    queue.put(private_memory() - before)


def open_nnunets(pipe: Any, folder: str) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    before, started = memory("VmRSS"), time.perf_counter()
    identifiers = nnUNetDatasetBlosc2.get_identifiers(folder)
    splits = generate_crossval_split(sorted(identifiers), seed=12345, n_splits=5)
    dataset = nnUNetDatasetBlosc2(folder, splits[0]["train"])
    seconds = time.perf_counter() - started
    assert len(dataset.identifiers) > 0
    pipe.send({"seconds": seconds, **measured(before)})


def measured(before: int) -> dict[str, float]:
    """Memory in MiB now, and how much more than `before` is resident."""
    resident = memory("VmRSS")
    return {"index": (resident - before) / MIB, "process": memory("RssAnon") / MIB, "code": resident / MIB}


def memory(name: str) -> int:
    """Bytes of this process, by their name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def private_memory() -> int:
    """Bytes that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


if __name__ == "__main__":
    main()
