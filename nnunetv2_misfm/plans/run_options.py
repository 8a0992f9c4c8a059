"""The options of a run that misfm_pretrain and misfm_plan have in common."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from nnunetv2_misfm.plans.run_settings import OPTIMIZERS, RunSettings


def add_run_options(parser: argparse.ArgumentParser, kind: type[RunSettings], schedules: str) -> None:
    """Add an option for every setting that both kinds of run have.

    Args:
        parser: of the command.
        kind: of run, for the defaults.
        schedules: help of `-schedule`: what each does, and which is the default.
    """
    add, defaults = parser.add_argument, kind()
    add("-num_epochs", type=int, help=f"default: {defaults.num_epochs}")
    add("-num_iterations_per_epoch", type=int, help=f"default: {defaults.num_iterations_per_epoch}")
    add("-num_val_iterations_per_epoch", type=int, help=f"default: {defaults.num_val_iterations_per_epoch}")
    add("-schedule", choices=kind.SCHEDULES, help=schedules)
    add("-optimizer", choices=OPTIMIZERS, help=f"default: {defaults.optimizer}")
    add("-initial_lr", type=float, help=f"default: {defaults.initial_lr}")
    add("-weight_decay", type=float, help=f"default: {defaults.weight_decay}")
    add("-checkpointing", choices=("auto", "on", "off"), help="activation checkpointing (default: auto)")
    add("-seed", type=int, help=f"default: {defaults.seed}")


def given(options: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The settings of a kind that the user gave; options are named as the settings are, and None where not given."""
    values = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not None}
