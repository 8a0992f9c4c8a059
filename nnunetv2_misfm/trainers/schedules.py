"""Learning-rate schedules and which part of the network they train when.

A schedule is a pure function of the iteration, so a resumed run is at the stage an uninterrupted one would be at. Stage
lengths scale with the length of the run. Ramps rise with each iteration, so that runs of a few epochs begin gently too;
decays fall with each epoch, as nnU-Net's does.

- `poly`: the whole network, nnU-Net's decay (exponent 0.9).
- `warmup`: a linear rise over the first 5 % of the run, then poly.
- `sawtooth`: the decoder alone rises for 5 %, the whole network rises for another 5 %, then poly (the best of the
  fine-tuning schedules for Volume Fusion in arXiv 2412.17041).
- `decoder_only`: the encoder stays as it is throughout.
- `halving`: pretraining; halved after each fifth of the run (paper: every 20k of 100k iterations).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnunetv2_misfm.checkpoints.names import SEG_LAYERS, Names, names_of
from nnunetv2_misfm.plans.network_entry import ENCODER, STEM

_RAMP_SHARE = 0.05
_POLY_EXPONENT = 0.9
_PARTS_OF_HALVING = 5
# The stage a parameter of an encoder belongs to: PCT-Net's stage2 and down2, FMUNet's and nnU-Net's stages.2.
_STAGE = re.compile(r"\.(?:stage|down|stages\.|downs\.)(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """Where a run is in its schedule.

    Attributes:
        name: for the log.
        encoder_factor, decoder_factor: of the initial learning rate; an encoder factor of 0 means frozen.
    """

    name: str
    encoder_factor: float
    decoder_factor: float

    @property
    def encoder_frozen(self) -> bool:
        """Whether the encoder must not change, its BatchNorm statistics included."""
        return self.encoder_factor == 0


def stage_at(schedule: str, epoch: int, num_epochs: int, part: float) -> Stage:
    """The stage of `schedule` at an iteration.

    Args:
        schedule: its name.
        epoch: counted from 0.
        num_epochs: of the run.
        part: of this epoch's iterations that are done after this one; above 0, at most 1.
    """
    if schedule == "poly":
        factor = _poly(epoch, num_epochs)
        return Stage("whole network", factor, factor)
    if schedule == "decoder_only":
        return Stage("decoder only", 0.0, _poly(epoch, num_epochs))
    if schedule == "halving":
        factor = 0.5 ** (epoch * _PARTS_OF_HALVING // num_epochs)
        return Stage("whole network", factor, factor)
    if schedule in ("sawtooth", "warmup"):
        ramp, done = _RAMP_SHARE * num_epochs, epoch + part
        if schedule == "sawtooth":
            if done <= ramp:
                return Stage("decoder ramp", 0.0, done / ramp)
            done -= ramp
        if done <= ramp:
            return Stage("whole-network ramp", done / ramp, done / ramp)
        ramps = ramp if schedule == "warmup" else 2 * ramp
        factor = _poly(max(0, epoch - ramps), num_epochs - ramps)
        return Stage("whole network", factor, factor)
    raise ValueError(f"{schedule!r} is not a schedule")


def parameter_groups(
    network: nn.Module, layer_decay: float = 1.0, seg_layers_lr_factor: float = 1.0, names: Names | None = None
) -> list[dict[str, Any]]:
    """The optimiser's groups, with the `name` and `lr_scale` that `StagedSchedule` steers them by.

    The decoder comes first because nnU-Net logs the learning rate of the first group, and the decoder always trains.
    With a decay below 1 each stage of the encoder is a group, its rate that share of the next deeper stage's; the
    deepest has that share of the decoder's. With a factor other than 1 the segmentation layers are a group of their
    own, their rate that many times the decoder's. A network that does not declare the names of its parts needs `names`.
    """
    decoder: list[nn.Parameter] = []
    seg_layers: list[nn.Parameter] = []
    encoder: dict[int, list[nn.Parameter]] = {}
    names = names or names_of(network)
    for name, parameter in network.named_parameters():
        part = names.part_in_network(name)
        if part in (STEM, ENCODER):
            stage = _STAGE.search(name)
            depth = int(stage[1]) if stage is not None and layer_decay < 1 else 0
            encoder.setdefault(depth, []).append(parameter)
        elif part == SEG_LAYERS and seg_layers_lr_factor != 1:
            seg_layers.append(parameter)
        else:
            decoder.append(parameter)
    groups: list[dict[str, Any]] = [{"params": decoder, "name": "decoder", "lr_scale": 1.0}]
    deepest = max(encoder, default=0)
    for depth in sorted(encoder, reverse=True):
        scale = layer_decay ** (1 + deepest - depth)
        groups.append({"params": encoder[depth], "name": "encoder", "lr_scale": scale})
    if seg_layers:
        groups.append({"params": seg_layers, "name": "seg_layers", "lr_scale": seg_layers_lr_factor})
    return groups


class StagedSchedule:
    """Sets the learning rates of an optimiser with the groups of `parameter_groups`."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: str, initial_lr: float, num_epochs: int):
        self.optimizer = optimizer
        self.schedule = schedule
        self.initial_lr = initial_lr
        self.num_epochs = num_epochs
        self.step(0)

    def step(self, epoch: int, part: float = 1.0) -> None:
        """Set the learning rates for an iteration, see `stage_at`."""
        self.stage = stage_at(self.schedule, epoch, self.num_epochs, part)
        for group in self.optimizer.param_groups:
            factor = self.stage.encoder_factor if group["name"] == "encoder" else self.stage.decoder_factor
            group["lr"] = self.initial_lr * factor * group["lr_scale"]


def _poly(epoch: float, num_epochs: float) -> float:
    return float((1 - epoch / num_epochs) ** _POLY_EXPONENT)
