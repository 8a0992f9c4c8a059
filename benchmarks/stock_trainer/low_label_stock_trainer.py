"""nnU-Net's own trainer for as many iterations as the other arms of low_label.py have; nothing else differs."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.cpu_threads import training_threads

DEVICE = torch.device("cuda")  # nnU-Net's default


class LowLabelStockTrainer(nnUNetTrainer):
    """nnUNetTrainer with the number of epochs and iterations from the environment."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = DEVICE):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if device.type == "cpu":
            torch.set_num_threads(training_threads())  # as the other arms
        self.num_epochs = int(os.environ["LOW_LABEL_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["LOW_LABEL_ITERATIONS"])
        self.num_val_iterations_per_epoch = int(os.environ["LOW_LABEL_VAL_ITERATIONS"])
