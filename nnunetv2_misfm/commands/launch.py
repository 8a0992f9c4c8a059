"""Running a pretraining trainer through nnU-Net's own training entry point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.start_up import add_plugin_folder


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

    # For installations whose start-up file Python does not read, and processes that were started with it off.
    add_plugin_folder()
    if device != "cpu":
        torch.set_num_threads(1)  # as in nnUNetv2_train: more only get in the way of the data workers
    with _ends_of_processes_explained(num_gpus):
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


@contextmanager
def _ends_of_processes_explained(num_gpus: int) -> Iterator[None]:
    """Say what became of a process that nnU-Net has started; wait for those that save when they are interrupted."""
    import torch
    from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

    from nnunetv2_misfm.trainers.stop_request import BY_SIGNAL

    try:
        yield
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
