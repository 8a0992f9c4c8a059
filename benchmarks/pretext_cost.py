"""What a training step of each pretext task costs beside one of Volume Fusion, with the same network and patches.

    python benchmarks/pretext_cost.py [--device cuda]

A step is all that the training device does: making inputs and targets, the network forward and backward, and the
optimiser. Reading is left out: batches are made before. On a GPU the time is the wall clock's, under automatic mixed
precision; on a CPU that of the process, in one thread, for a small patch. The tasks take turns. Memory is what training
estimates for a step (memory_estimate.py shows how close that is), at the published patch and batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fusion_speed import make_volume
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from provenance import device_name, provenance
from torch import nn

from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.plans.network_entry import architecture_entry
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS
from nnunetv2_misfm.pretrain.batches import CropBatch, crop_loader
from nnunetv2_misfm.pretrain.crops import CropSamples
from nnunetv2_misfm.pretrain.planning import PUBLISHED_BATCH_SIZE, PUBLISHED_PATCH_SIZE, plain_unet_entry
from nnunetv2_misfm.pretrain.task import PretextNetwork, PretextTask
from nnunetv2_misfm.pretrain.tasks import task_class

RESULTS = Path(__file__).parent / "results"
SIZES = {"cuda": (PUBLISHED_PATCH_SIZE, PUBLISHED_BATCH_SIZE, 50), "cpu": ((16, 64, 64), 2, 3)}  # patch, batch, steps
NETWORKS = {
    "PCT-Net": architecture_entry("pctnet", 0),
    "nnU-Net's U-Net": plain_unet_entry((1, 1, 1), PUBLISHED_PATCH_SIZE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    tasks = [task_class(name)(task_class(name).Settings()) for name in PRETEXT_TASKS]
    lines = []
    for network, entry in NETWORKS.items():
        seconds = measure(tasks, entry, options.device)
        memory = [gigabytes(task, entry) for task in tasks]
        lines += [
            f"| {network} | {task.name} | {s:.2f} | {s / seconds[0]:.2f} | {m:.1f} | {m / memory[0]:.2f} |"
            for task, s, m in zip(tasks, seconds, memory, strict=True)
        ]
    report = make_report(lines, options.device)
    (RESULTS / f"pretext_cost_{options.device}.md").write_text(report, encoding="utf-8")
    print(report)


def measure(tasks: list[PretextTask], entry: dict[str, Any], device: str) -> list[float]:
    """Seconds per step: the least of all, which other load on the machine hits least."""
    patch, batch_size, steps = SIZES[device]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "0.npy", np.stack([make_volume(0)]))
        batches = [batches_of(task, Path(folder), patch, batch_size, 2) for task in tasks]
    models = [model_of(task, entry).to(device).train() for task in tasks]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4) for model in models]
    least = [float("inf")] * len(tasks)
    for step in range(steps + 1):  # the first one makes the optimisers' states
        for index, task in enumerate(tasks):
            started = clock(device)
            train(task, models[index], optimizers[index], batches[index][step % 2], device)
            if step:
                least[index] = min(least[index], clock(device) - started)
    return least


def batches_of(task: PretextTask, folder: Path, patch: tuple[int, int, int], size: int, count: int) -> list[CropBatch]:
    samples = CropSamples(folder, ["0"], patch, task, task.augmentation_defaults, 0, 1)
    loader = crop_loader(samples, size, count)
    return [next(loader) for _ in range(count)]


def model_of(task: PretextTask, entry: dict[str, Any]) -> PretextNetwork:
    network: nn.Module = get_network_from_plans(
        entry["network_class_name"],
        entry["arch_kwargs"],
        entry["_kw_requires_import"],
        1,
        task.num_outputs(1),
        allow_init=True,
        deep_supervision=task.deep_supervision,
    )
    return PretextNetwork(network, task, 1)


def train(task: PretextTask, model: nn.Module, optimizer: torch.optim.Optimizer, batch: CropBatch, device: str) -> None:
    with torch.no_grad():
        x, target = task.make(batch, torch.device(device))
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, enabled=device == "cuda"):
        loss = task.loss(model(x, target), target)
    loss.backward()
    optimizer.step()


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def gigabytes(task: PretextTask, entry: dict[str, Any]) -> float:
    """Of a step under automatic mixed precision."""
    inputs = PUBLISHED_BATCH_SIZE * task.inputs_per_sample
    shape = (inputs, 1, *PUBLISHED_PATCH_SIZE)
    return estimate_training_memory(partial(model_of, task, entry), shape, autocast=True).total / 2**30


def make_report(lines: list[str], device: str) -> str:
    patch, batch_size, steps = SIZES[device]
    sizes, published = ("x".join(map(str, size)) for size in (patch, PUBLISHED_PATCH_SIZE))
    return "\n".join(
        [
            "# What a step of each pretext task costs",
            "",
            f"Time: {batch_size} samples of {sizes}, the least of {steps} steps. Memory: estimated, "
            f"{PUBLISHED_BATCH_SIZE} samples of {published} under automatic mixed precision.",
            "",
            "| network | task | s per step | times Volume Fusion's | GB | times Volume Fusion's |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            *provenance("python benchmarks/pretext_cost.py", ("torch", "nnunetv2"), {}, device_name(device)),
            "",
        ]
    )


if __name__ == "__main__":
    main()
