"""The settings of a run, which live in the plans file under `misfm`.

A plans file with this block is one of ours. The results folder keeps plans.json, so every run records how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nnunetv2_misfm.plans.settings import SettingsError, is_number, is_whole, read_settings

BLOCK = "misfm"
PRETRAIN_INFO = "pretrain_info"  # beside the block, as in nnU-Net: the weights that a fine-tuning starts from
DEFAULT_FINETUNING_PLANS = "nnUNetMisFMPlans"
DEFAULT_BASELINE_PLANS = "nnUNetMisFMScratchPlans"
TASKS = ("segmentation", "volume_fusion")
OPTIMIZERS = ("adam", "adamw", "sgd")
FINETUNING_SCHEDULES = ("scratch", "default", "warmup", "sawtooth", "decoder_only")
PRETRAINING_SCHEDULES = ("halving", "poly")
# Groups of settings that stand inside the block and are read beside the code they steer.
NESTED_GROUPS = ("fusion", "augmentation", "pool", "network")


@dataclass(frozen=True)
class RunSettings:
    """What both kinds of run have in common.

    Attributes:
        num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch: as in nnU-Net.
        optimizer: "adamw", "sgd" (nnU-Net's, with Nesterov momentum 0.99) or "adam" (published recipe, whose weight
            decay shrinks weights with hardly any gradient to nothing, see `transfer/shrunk_weights.py`).
        initial_lr: learning rate the schedule starts from or rises to.
        weight_decay: of the optimiser.
        schedule: learning-rate schedule, see `trainers/schedules.py`.
        checkpointing: "auto" (only when memory is short), "on" or "off".
        seed: of everything random in the run that this package draws.
    """

    TASK: ClassVar[str] = ""
    SCHEDULES: ClassVar[tuple[str, ...]] = ()

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    optimizer: str = "adamw"
    initial_lr: float = 1e-3
    weight_decay: float = 1e-5
    schedule: str = ""
    checkpointing: str = "auto"
    seed: int = 12345

    def problems(self) -> list[str]:
        """One sentence per value that cannot be used."""
        found = [
            f"{name} = {getattr(self, name)!r} must be a whole number of at least 1"
            for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1
        ]
        if self.optimizer not in OPTIMIZERS:
            found.append(f"optimizer = {self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        if not is_number(self.initial_lr) or not 0 < self.initial_lr < 10:
            found.append(f"initial_lr = {self.initial_lr!r} must be a number above 0")
        if not is_number(self.weight_decay) or not 0 <= self.weight_decay < 1:
            found.append(f"weight_decay = {self.weight_decay!r} must be a number from 0 up to 1")
        if self.schedule not in self.SCHEDULES:
            found.append(f"schedule = {self.schedule!r} must be one of {', '.join(self.SCHEDULES)}")
        if self.checkpointing not in ("auto", "on", "off"):
            found.append(f"checkpointing = {self.checkpointing!r} must be auto, on or off")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**63:
            found.append(f"seed = {self.seed!r} must be a whole number from 0 up to 2**63")
        return found


@dataclass(frozen=True)
class FinetuningSettings(RunSettings):
    """A segmentation run.

    Attributes:
        min_coverage: share of the network outside the segmentation layers that pretrained weights must cover.
        encoder_only: leave the decoder fresh.
        mix_input_channels: mix the input channels of pretrained weights to fit another number of channels.
        layer_decay: learning rate of each stage of the encoder as a share of the next deeper one's; the decoder's is
            the full one.
        seg_layers_lr_factor: learning rate of the segmentation layers as a multiple of the decoder's. They start from
            random weights whatever was pretrained; at a rate that is right for the rest they hold it back.
    """

    TASK = "segmentation"
    SCHEDULES = FINETUNING_SCHEDULES

    schedule: str = "scratch"
    min_coverage: float = 1.0
    encoder_only: bool = False
    mix_input_channels: bool = False
    layer_decay: float = 1.0
    seg_layers_lr_factor: float = 1.0

    def problems(self) -> list[str]:
        """One sentence per value that cannot be used."""
        found = super().problems()
        if not is_number(self.min_coverage) or not 0 <= self.min_coverage <= 1:
            found.append(f"min_coverage = {self.min_coverage!r} must be a share from 0 to 1")
        for name in ("encoder_only", "mix_input_channels"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} = {getattr(self, name)!r} must be true or false")
        if not is_number(self.layer_decay) or not 0 < self.layer_decay <= 1:
            found.append(f"layer_decay = {self.layer_decay!r} must be a factor above 0 and up to 1")
        if not is_number(self.seg_layers_lr_factor) or not 0 < self.seg_layers_lr_factor <= 1000:
            found.append(
                f"seg_layers_lr_factor = {self.seg_layers_lr_factor!r} must be a factor above 0 and up to 1000"
            )
        return found


@dataclass(frozen=True)
class PretrainingSettings(RunSettings):
    """A Volume Fusion run.

    The defaults are the published recipe for about 1,000 volumes (100,000 iterations at 1e-3, halved every 20,000) but
    for the optimiser, see `RunSettings.optimizer`.

    Attributes:
        picture_every: epochs between two pictures of fused samples, labels and predictions.
    """

    TASK = "volume_fusion"
    SCHEDULES = PRETRAINING_SCHEDULES

    num_epochs: int = 400
    num_val_iterations_per_epoch: int = 25
    schedule: str = "halving"
    picture_every: int = 50

    def problems(self) -> list[str]:
        """One sentence per value that cannot be used."""
        found = super().problems()
        if not is_whole(self.picture_every) or self.picture_every < 1:
            found.append(f"picture_every = {self.picture_every!r} must be a whole number of at least 1")
        return found


def is_ours(plans: Mapping[str, Any]) -> bool:
    """Whether a plans file was written by this package."""
    return isinstance(plans.get(BLOCK), Mapping)


def run_settings(plans: Mapping[str, Any], kind: type[RunSettings]) -> RunSettings:
    """The settings a plan holds for this kind of run; defaults if the plan is nnU-Net's or made for the other kind.

    Raises:
        SettingsError: listing every unknown name and bad value in the block.
    """
    block = plans.get(BLOCK, {})
    where = f"The '{BLOCK}' block of the plans {plans.get('plans_name', '')}"
    task = block.get("task", kind.TASK) if isinstance(block, Mapping) else None
    if task not in TASKS:
        raise SettingsError(where, [f"its task is {task!r}; known tasks are {', '.join(TASKS)}"])
    if task != kind.TASK:
        return kind()
    return read_settings(kind, without_groups(block), where)


def without_groups(block: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run itself in a `misfm` block."""
    return {name: value for name, value in block.items() if name not in (*NESTED_GROUPS, "task")}
