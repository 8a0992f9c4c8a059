"""The settings of a run, which live in the plans file under `misfm`.

A plans file with this block is one of ours. The results folder keeps plans.json, so every run records how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from nnunetv2_misfm.plans.settings import Settings, SettingsError, read_settings, setting

BLOCK = "misfm"
PRETRAIN_INFO = "pretrain_info"  # beside the block, as in nnU-Net: the weights that a fine-tuning starts from
DEFAULT_FINETUNING_PLANS = "nnUNetMisFMPlans"
DEFAULT_BASELINE_PLANS = "nnUNetMisFMScratchPlans"
SCHEDULE_WITH_WEIGHTS = "sawtooth"  # what misfm_plan chooses for a fine-tuning
SEGMENTATION = "segmentation"
# The pretext tasks by the names that -pretext and the plans give them; the first is the default.
PRETEXT_TASKS = {
    "volume_fusion": "nnunetv2_misfm.pretrain.volume_fusion.VolumeFusion",
    "masked_autoencoder": "nnunetv2_misfm.pretrain.masked_autoencoder.MaskedAutoencoder",
    "models_genesis": "nnunetv2_misfm.pretrain.models_genesis.ModelsGenesis",
    "patch_swap": "nnunetv2_misfm.pretrain.patch_swap.PatchSwap",
    "vox2vec": "nnunetv2_misfm.pretrain.vox2vec.Vox2Vec",
}
TASKS = (SEGMENTATION, *PRETEXT_TASKS)


class RunSettings(Settings):
    """What both kinds of run have in common.

    "adam" is the published optimiser, whose weight decay shrinks weights with hardly any gradient to nothing (see
    `checkpoints/shrunk_weights.py`); "sgd" is nnU-Net's, with Nesterov momentum 0.99. Schedules:
    `trainers/schedules.py`.
    """

    TASKS: ClassVar[tuple[str, ...]] = ()  # that plans with these settings name; the first is that of ordinary plans

    num_epochs: int = setting(1000, "number of epochs", low=1, may_change=True)
    num_iterations_per_epoch: int = setting(250, "number of training steps in an epoch", low=1)
    num_val_iterations_per_epoch: int = setting(50, "number of validation batches in an epoch", low=1, may_change=True)
    schedule: str = setting("", "learning-rate schedule")
    optimizer: Literal["adam", "adamw", "sgd"] = setting("adamw", "optimiser")
    initial_lr: float = setting(
        1e-3, "learning rate that the schedule starts from or rises to", above=0, high=10, may_change=True
    )
    weight_decay: float = setting(1e-5, "weight decay of the optimiser", low=0, high=1)
    checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "activation checkpointing, which saves memory and costs time; auto uses it only when memory is short",
        may_change=True,
    )
    seed: int = setting(12345, "seed of everything random that this package draws", low=0, high=2**63 - 1)


class FinetuningSettings(RunSettings):
    """A segmentation run."""

    TASKS = (SEGMENTATION,)

    schedule: Literal["poly", "warmup", "sawtooth", "decoder_only"] = setting(
        "poly",
        "how the learning rate changes; poly (the default without weights): it falls from the start, as nnU-Net's "
        "does; warmup: it rises first and then falls; sawtooth (misfm_plan's default with weights): it rises for the "
        "decoder alone while the encoder stays as it is, then rises and falls for the whole network; decoder_only: the "
        "encoder stays as it is to the end",
        former={"default": "poly", "scratch": "poly"},
    )
    min_coverage: float = setting(
        1.0,
        "share of the network, segmentation layers apart, that the weights must cover",
        low=0,
        high=1,
        may_change=True,
    )
    encoder_only: bool = setting(
        False, "transfer stem and encoder only, so that the decoder starts from random weights"
    )
    mix_input_channels: bool = setting(
        False, "mix the input channels of weights that have several to fit a dataset that has another number of them"
    )
    layer_decay: float = setting(
        1.0, "learning rate of each stage of the encoder, as a share of that of the next deeper stage", above=0, high=1
    )
    seg_layers_lr_factor: float = setting(
        # They start from random weights whatever was pretrained; at a rate right for the rest they hold it back.
        1.0,
        "learning rate of the segmentation layers, as a multiple of that of the decoder",
        above=0,
        high=1000,
    )


class PretrainingSettings(RunSettings):
    """A pretraining run.

    The defaults are the published recipe of Volume Fusion for about 1,000 volumes (100,000 iterations at 1e-3, halved
    every 20,000) but for the optimiser; a pretext task may have others.
    """

    TASKS = tuple(PRETEXT_TASKS)

    num_epochs: int = setting(400, "number of epochs", low=1, may_change=True)
    num_val_iterations_per_epoch: int = setting(25, "number of validation batches in an epoch", low=1, may_change=True)
    schedule: Literal["halving", "poly"] = setting(
        "halving",
        "how the learning rate falls: it is halved after each fifth of the run, or follows nnU-Net's poly curve",
    )
    picture_every: int = setting(
        50, "number of epochs between pictures of samples and predictions", low=1, may_change=True
    )


RunT = TypeVar("RunT", bound=RunSettings)
RUNS = (FinetuningSettings, PretrainingSettings)


def pretrain_info(plans: Mapping[str, Any]) -> Mapping[str, Any]:
    """What plans say about the weights that a fine-tuning by them starts from; empty for plans without weights."""
    return plans.get(PRETRAIN_INFO) or {}


def is_ours(plans: Mapping[str, Any]) -> bool:
    """Whether a plans file was written by this package."""
    return isinstance(plans.get(BLOCK), Mapping)


def block_for(plans: Mapping[str, Any], kind: type[RunSettings]) -> Mapping[str, Any]:
    """The `misfm` block of plans for this kind of run; without settings if they are nnU-Net's or for the other kind.

    Raises:
        SettingsError: if the block's task is not known.
    """
    block = plans.get(BLOCK, {})
    task = block.get("task", kind.TASKS[0]) if isinstance(block, Mapping) else None
    if task not in TASKS:
        raise SettingsError(block_of(plans), [f"its task is {task!r}; known tasks are {', '.join(TASKS)}"])
    return {**block, "task": task} if task in kind.TASKS else {"task": kind.TASKS[0]}


def block_of(plans: Mapping[str, Any]) -> str:
    """What error messages call the block of these plans."""
    return f"The '{BLOCK}' block of the plans {plans.get('plans_name', '')}"


def run_settings(plans: Mapping[str, Any], kind: type[RunT]) -> RunT:
    """The settings a plan holds for this kind of run; defaults if the plan is nnU-Net's or made for the other kind.

    Raises:
        SettingsError: listing every unknown name and bad value in the block.
    """
    return read_settings(kind, without_groups(block_for(plans, kind)), block_of(plans))


def pretext_task_of(plans: Mapping[str, Any]) -> str | None:
    """The name of the pretext task that plans are for; None for all other plans."""
    block = plans.get(BLOCK)
    task = block.get("task") if isinstance(block, Mapping) else None
    return task if task in PRETEXT_TASKS else None


def without_groups(block: Mapping[str, Any], *groups: str) -> dict[str, Any]:
    """The settings of the run itself in a `misfm` block, without groups that are read beside the code they steer."""
    return {name: value for name, value in block.items() if name not in (*groups, "task")}
