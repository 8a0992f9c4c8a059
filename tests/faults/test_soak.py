"""A long pretraining run: what grows, and what is left behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_dataset import NAME
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_misfm.pretrain.cli import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder

EPOCHS, ITERATIONS = 500, 6  # 3000 training steps and 500 rounds of validation
WARM_UP = EPOCHS // 10
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
        seen.append(
            {
                "memory": memory_of_the_job(),
                "handles": len(os.listdir("/proc/self/fd")),
                "clock": time.monotonic(),
                "processor": time.process_time(),
            }
        )

    run.on_epoch_end = observed
    run.run_training()
    assert len(seen) == EPOCHS
    # The median of a tenth of the run, so that a single measurement in an unlucky moment decides nothing.
    tenths = seen[WARM_UP : 2 * WARM_UP], seen[-WARM_UP:]
    early, late = (median("memory", tenth) for tenth in tenths)
    handles = [int(median("handles", tenth)) for tenth in tenths]
    # Processor time beside the clock: other jobs of the machine slow the clock's, hardly the processor's.
    pace = {
        key: [(tenth[-1][key] - tenth[0][key]) / (len(tenth) - 1) for tenth in tenths] for key in ("clock", "processor")
    }
    print(
        f"\n{EPOCHS * ITERATIONS} iterations, {EPOCHS} validations: memory {early / 2**20:.0f} to "
        f"{late / 2**20:.0f} MiB ({100 * (late / early - 1):+.2f} %), open files {handles[0]} to {handles[1]}, "
        "time per epoch, last tenth / second tenth: "
        + ", ".join(f"{last / second:.2f} by the {key}" for key, (second, last) in pace.items())
    )
    print("memory at the end of each tenth, MiB:", *(f"{row['memory'] / 2**20:.0f}" for row in seen[::-WARM_UP][::-1]))
    assert late / early < 1.02
    assert handles[1] <= handles[0]
    assert left_behind() == before


def median(key: str, rows: list[dict[str, float]]) -> float:
    return sorted(row[key] for row in rows)[len(rows) // 2]


def memory_of_the_job() -> int:
    """Bytes that this process and its loader processes have for themselves; what they share counts once.

    Without pages of files: how much of those counts here depends on which other programs use the same libraries.
    """
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return sum(proportional_memory(number) for number in processes if number is not None)


def proportional_memory(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def left_behind() -> dict[str, Any]:
    """Child processes and shared memory that exist now."""
    return {"processes": len(multiprocessing.active_children()), "shared memory": sorted(os.listdir("/dev/shm"))}
