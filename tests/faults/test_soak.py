"""A long pretraining run: what grows, and what is left behind."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_dataset import NAME
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder

EPOCHS, ITERATIONS = 500, 6  # 3000 training steps and 500 rounds of validation
WARM_UP = EPOCHS // 10
EVERY = 10  # epochs between two measurements of the memory in use
SMALL = ["-features_per_stage", "4", "4", "8", "16", "32", "-patch_size", "16", "16", "16"]


@pytest.mark.faults
def test_a_long_run_neither_grows_nor_leaves_anything_behind(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    add_plugin_folder()
    misfm_pretrain(["-d", "4", "-device", "cpu", "-num_epochs", "1", "-num_iterations_per_epoch", "1", *SMALL])
    before = left_behind()
    run = get_trainer_from_args(
        NAME, "3d_fullres", "all", "VolumeFusionTrainer", "nnUNetMisFMPretrainPlans", False, torch.device("cpu")
    )
    run.num_epochs, run.num_iterations_per_epoch, run.num_val_iterations_per_epoch = EPOCHS, ITERATIONS, 2
    seen: list[dict[str, float]] = []
    end_epoch = run.on_epoch_end

    def observed() -> None:
        end_epoch()
        occupied = memory_of_the_job()
        if len(seen) % EVERY == 0:
            # nnU-Net's plots are garbage that waits to be collected, and a multiple of what a leak would add.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        seen.append(
            {
                "occupied": occupied,
                "in use": memory_of_the_job(),
                "handles": len(os.listdir("/proc/self/fd")),
                "clock": time.monotonic(),
                "processor": time.process_time(),
            }
        )

    run.on_epoch_end = observed
    run.run_training()
    assert len(seen) == EPOCHS
    tenths = seen[WARM_UP : 2 * WARM_UP], seen[-WARM_UP:]
    # The median, so that a single measurement in an unlucky moment decides nothing.
    early, late = (statistics.median(row["in use"] for row in tenth[::EVERY]) for tenth in tenths)
    handles = [statistics.median(row["handles"] for row in tenth) for tenth in tenths]
    # Processor time beside the clock: other jobs of the machine slow the clock's, hardly the processor's.
    pace = {
        key: [(tenth[-1][key] - tenth[0][key]) / (len(tenth) - 1) for tenth in tenths] for key in ("clock", "processor")
    }
    print(
        f"\n{EPOCHS * ITERATIONS} iterations, {EPOCHS} validations: memory in use {early / 2**20:.0f} to "
        f"{late / 2**20:.0f} MiB ({100 * (late / early - 1):+.2f} %), open files {handles[0]:.0f} to {handles[1]:.0f}, "
        "time per epoch, last tenth / second tenth: "
        + ", ".join(f"{last / second:.2f} by the {key}" for key, (second, last) in pace.items())
    )
    parts = [seen[start : start + WARM_UP] for start in range(0, EPOCHS, WARM_UP)]
    print("most memory occupied in each tenth, MiB:", *(f"{max(r['occupied'] for r in p) / 2**20:.0f}" for p in parts))
    assert late / early < 1.02
    assert handles[1] <= handles[0]
    assert left_behind() == before


def memory_of_the_job() -> int:
    """Bytes that this process and its loader processes have for themselves; what they share counts once.

    Without pages of files: how much of those counts here depends on which other programs use the same libraries.
    """
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return sum(proportional_memory(number) for number in processes if number is not None)


def proportional_memory(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def left_behind() -> dict[str, Any]:
    """Child processes and shared memory that exist now."""
    return {"processes": len(multiprocessing.active_children()), "shared memory": sorted(os.listdir("/dev/shm"))}
