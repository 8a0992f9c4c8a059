"""Scalars of a run for TensorBoard, beside those that nnU-Net gives to Weights & Biases."""

from __future__ import annotations

import os
from typing import Any

from nnunetv2_misfm.errors import UserError

SWITCH = "nnUNet_tensorboard_enabled"


class TensorBoardLogger:
    """A logger as nnU-Net's `MetaLogger` takes it; its files are in `tensorboard/` of the results folder.

    Args:
        output_folder: results folder of a fold.

    Raises:
        UserError: if TensorBoard is not installed.
    """

    def __init__(self, output_folder: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            remedy = "Install it with pip install tensorboard, or take the variable away."
            raise UserError(f"{SWITCH} is set, but TensorBoard is missing. {remedy}") from None
        self.writer = SummaryWriter(os.path.join(output_folder, "tensorboard"))

    @staticmethod
    def is_wanted() -> bool:
        """Whether the user has switched it on."""
        return os.environ.get(SWITCH, "").strip().lower() in ("1", "true")

    def update_config(self, config: dict[str, Any]) -> None:
        """Nothing: the settings are in plans.json."""

    def log(self, key: str, value: Any, step: int) -> None:
        """A number of an epoch."""
        self.writer.add_scalar(key, float(value), step)
        self.writer.flush()

    def log_summary(self, key: str, value: Any) -> None:
        """A number of the whole run."""
        self.writer.add_text(key, str(value))
