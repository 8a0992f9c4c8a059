"""The memory that planning and training estimate for a training step, next to the measured peak.

    python benchmarks/memory_estimate.py

On a GPU steps run under automatic mixed precision, as nnU-Net trains; on a CPU in float32. Peak memory is measured as
in network_speed.py, in a process of its own for each row, in the second step (the first makes the optimiser's states).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from network_speed import CudaMemory, ResidentMemory, Variant, training_step
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from provenance import device_name, provenance

from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.plans.network_entry import architecture_entry
from nnunetv2_misfm.pretrain.planning import plain_unet_entry

RESULTS = Path(__file__).parent / "results"
NUM_CLASSES = 3


@dataclass(frozen=True)
class Row:
    """A network and what it is trained on."""

    name: str
    architecture: dict[str, Any]
    batch_size: int
    patch_size: tuple[int, int, int]
    checkpointing: bool = False


SMALL = {"features_per_stage": [12, 24, 64, 128, 256]}
ROWS = (
    Row("PCT-Net", architecture_entry("pctnet", 1), 1, (64, 128, 128)),
    Row("PCT-Net, checkpointing", architecture_entry("pctnet", 1), 1, (64, 128, 128), True),
    Row("PCT-Net", architecture_entry("pctnet", 0), 2, (64, 64, 64)),
    Row("PCT-Net, checkpointing", architecture_entry("pctnet", 0), 2, (64, 64, 64), True),
    Row("PCT-Net, half the channels", architecture_entry("pctnet", 2, **SMALL), 2, (24, 160, 160)),
    Row("PCT-Net, half the channels", architecture_entry("pctnet", 0, **SMALL), 4, (48, 64, 48)),
    Row("FMUNet", architecture_entry("fmunet", 1), 1, (64, 96, 96)),
    Row("FMUNet, checkpointing", architecture_entry("fmunet", 1), 1, (64, 96, 96), True),
    Row("PlainConvUNet", plain_unet_entry((1, 1, 1), (64, 96, 96)), 1, (64, 96, 96)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="where the table goes (default: results/memory_estimate_DEVICE.md)")
    options = parser.parse_args()
    lines, ratios = [], []
    # A GPU's memory is counted by each process' own allocator, so there all rows can run at once.
    processes = len(ROWS) if options.device == "cuda" else 1
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        peaks = pool.map(partial(measured, device=options.device), ROWS, chunksize=1)
    for row, peak in zip(ROWS, peaks, strict=True):
        estimate = estimated(row, options.device)
        ratios.append(peak / estimate)
        patch = "x".join(map(str, row.patch_size))
        values = f"{estimate / 2**30:.2f} | {peak / 2**30:.2f} | {ratios[-1]:.2f}"
        lines.append(f"| {row.name} | {row.batch_size} | {patch} | {values} |")
        print(lines[-1], flush=True)
    on_gpu = options.device == "cuda"
    report = "\n".join(
        [
            "# Memory of a training step: estimate and measured peak",
            "",
            f"{'Automatic mixed precision' if on_gpu else 'float32'}, Adam. Measured peaks are {min(ratios):.2f} to "
            f"{max(ratios):.2f} of the estimates.",
            "",
            "| network | batch | patch | estimate, GB | measured, GB | measured / estimate |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            *provenance(
                "python benchmarks/memory_estimate.py",
                ("torch", "nnunetv2"),
                {},
                device_name(options.device),
            ),
            "",
        ]
    )
    output = options.output or RESULTS / f"memory_estimate_{options.device}.md"
    output.write_text(report, encoding="utf-8")
    print(report)


def network(row: Row) -> torch.nn.Module:
    entry = row.architecture
    arguments = (entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"])
    built: torch.nn.Module = get_network_from_plans(*arguments, 1, NUM_CLASSES, allow_init=False, deep_supervision=True)
    return built


def estimated(row: Row, device: str) -> int:
    shape = (row.batch_size, 1, *row.patch_size)
    return estimate_training_memory(
        partial(network, row), shape, checkpointing=row.checkpointing, autocast=device == "cuda"
    ).total


def measured(row: Row, device: str) -> float:
    """Peak bytes of the second step, in a process of its own."""
    memory = CudaMemory() if device == "cuda" else ResidentMemory()
    net = network(row).to(device)
    if row.checkpointing:
        net.checkpointing = True  # type: ignore[assignment]
    size = (row.batch_size, 1, *row.patch_size)
    batch = torch.randn(size, device=device), torch.randint(NUM_CLASSES, size, device=device)
    step = training_step(net, Variant("", True, amp=device == "cuda"), batch)
    step()
    memory.reset()
    step()
    return memory.peak()


if __name__ == "__main__":
    main()
