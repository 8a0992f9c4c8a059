"""Running a pretraining trainer through nnU-Net's own training entry point."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import dropwhile

from nnunetv2_misfm.errors import PlanError, UserError
from nnunetv2_misfm.start_up import add_plugin_folder


def usable_gpus() -> int:
    """How many GPUs PyTorch can train on; devices that are listed but cannot be started do not count."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def best_device() -> str:
    """The device that misfm_demo and misfm_compare take where none is named."""
    return "cuda" if usable_gpus() else "cpu"


def check_device(device: str, num_gpus: int) -> None:
    """Raise a PlanError if the device is not there; better now than after hours of preparation."""
    import torch

    if device == "cuda":
        if (there := usable_gpus()) < num_gpus:
            asked = f" with -num_gpus {num_gpus}" if num_gpus > 1 else ""
            remedy = f"Give -num_gpus {there}." if there else "Use -device cpu."
            raise PlanError(f"-device cuda{asked}: there are {there} usable GPUs. {remedy}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise PlanError("-device mps: PyTorch has no MPS device here. Use -device cpu.")


def check_gpus(numbers: Sequence[str]) -> None:
    """Raise a PlanError unless all are numbers of usable GPUs, counted from 0."""
    there = usable_gpus() if numbers else 0
    wrong = [number for number in numbers if not number.isdecimal() or int(number) >= there]
    if wrong:
        raise PlanError(f"-gpus {' '.join(wrong)}: there are {there} usable GPUs here, which are counted from 0.")


def name_of_gpu(number: str) -> str:
    """How CUDA_VISIBLE_DEVICES names a GPU of these numbers: a cluster may let this process see some of them only."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return seen[int(number)] if seen else number


def launch(
    trainer: str,
    dataset_name: str,
    plans_name: str,
    configuration: str,
    device: str,
    num_gpus: int,
    continue_training: bool,
) -> None:
    """Train on a prepared pool or preprocessed dataset, then validate the pretext task.

    Args:
        trainer: the name of its class.
        dataset_name: a folder of nnUNet_preprocessed.
        plans_name, configuration: what to train.
        device: "cuda", "cpu" or "mps".
        num_gpus: GPUs of this machine for which nnU-Net starts a process each; 1 trains in this process.
        continue_training: go on from the latest checkpoint.

    Raises:
        UserError: if one of nnU-Net's processes ends.
    """
    import torch
    from nnunetv2.run.run_training import run_training
    from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

    from nnunetv2_misfm.trainers.stop_request import BY_SIGNAL

    # For installations whose start-up file Python does not read, and processes that were started with it off.
    add_plugin_folder()
    if device != "cpu":
        torch.set_num_threads(1)  # as in nnUNetv2_train: more only get in the way of the data workers
    try:
        run_training(
            dataset_name,
            configuration,
            "all",
            trainer,
            plans_name,
            num_gpus=num_gpus,
            continue_training=continue_training,
            device=torch.device(device),
        )
    except KeyboardInterrupt:
        # A terminal interrupts all processes at once; those that train save first, and their folder must stay. Daemons
        # are workers of this process, which end with it.
        for process in torch.multiprocessing.active_children():
            if not process.daemon:
                process.join()
        raise
    except ProcessExitedException as error:
        if error.exit_code > BY_SIGNAL:
            raise SystemExit(error.exit_code) from None  # asked to stop; the process has saved and said so
        raise UserError(
            f"Process {error.error_index} of {num_gpus} ended ({error.msg}), and the others were stopped. Exit by "
            f"signal SIGKILL mostly means that the machine ran out of memory. Continue with --c."
        ) from None
    except ProcessException as error:
        raise UserError(f"Process {error.error_index} of {num_gpus} failed: {_message(str(error.msg))}") from error


def _message(traceback: str) -> str:
    """What the last error of a printed traceback says, which may be several lines; of ours without its class."""
    lines = traceback.rpartition("Traceback (most recent call last):\n")[2].strip("\n").splitlines()
    text = "\n".join(dropwhile(lambda line: line.startswith(" "), lines))
    kind, _, message = text.partition(": ")
    return message if kind.startswith("nnunetv2_misfm.") else text
