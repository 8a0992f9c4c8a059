"""Running VolumeFusionTrainer through nnU-Net's own training entry point."""

from __future__ import annotations

import os

from nnunetv2_misfm.start_up import add_plugin_folder


def launch(
    dataset_name: str, plans_name: str, configuration: str, device: str, num_gpus: int, continue_training: bool
) -> None:
    """Train on a prepared pool or preprocessed dataset, then validate the pretext task.

    Args:
        dataset_name: a folder of nnUNet_preprocessed.
        plans_name, configuration: what to train.
        device: "cuda", "cpu" or "mps".
        num_gpus: GPUs of this machine.
        continue_training: go on from the latest checkpoint.
    """
    import torch
    from nnunetv2.run.run_training import run_training

    # For installations whose start-up file Python does not read, and processes that were started with it off.
    add_plugin_folder()
    # As in nnUNetv2_train: on a GPU more threads only get in the way of the data workers.
    torch.set_num_threads(os.cpu_count() or 1 if device == "cpu" else 1)
    run_training(
        dataset_name,
        configuration,
        "all",
        "VolumeFusionTrainer",
        plans_name,
        num_gpus=num_gpus,
        continue_training=continue_training,
        device=torch.device(device),
    )
