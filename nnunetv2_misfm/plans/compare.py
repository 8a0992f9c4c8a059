"""How two plans files would train differently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nnunetv2_misfm.plans.run_settings import BLOCK

# What a run that goes on may change: how long it is, and what it shows or checks on the way.
_MAY_CHANGE = frozenset(
    {"num_epochs", "initial_lr", "num_val_iterations_per_epoch", "picture_every", "checkpointing", "min_coverage"}
)
_OF_THE_DATA = ("patch_size", "batch_size", "spacing", "data_identifier")


def run_changes(before: Mapping[str, Any], now: Mapping[str, Any], configuration: str) -> dict[str, tuple[Any, Any]]:
    """What differs in network, patch, batch, spacing, data and settings, by name: the value then and the one now.

    Args:
        before, now: plans that both have the configuration.
        configuration: its name.
    """
    old, new = _everything(before, configuration), _everything(now, configuration)
    names = sorted({*old, *new}, key=lambda name: ("." not in name, name))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def what_a_run_must_keep(before: Mapping[str, Any], now: Mapping[str, Any], configuration: str) -> list[str]:
    """What differs although a run that goes on must keep it, one line each; empty if nothing does."""
    changed = run_changes(before, now, configuration)
    return [f"{name}: {old} then, {new} now" for name, (old, new) in changed.items() if name not in _MAY_CHANGE]


def _everything(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # takes seconds

    entry = PlansManager(dict(plans)).get_configuration(configuration).configuration
    architecture, settings = entry["architecture"], dict(plans.get(BLOCK, {}))
    settings.pop("pool", None)  # what the volumes are, which may become more
    found = {
        "network": architecture["network_class_name"].rpartition(".")[2],
        **{f"network.{name}": value for name, value in architecture["arch_kwargs"].items()},
        **{name: entry.get(name) for name in _OF_THE_DATA},
        **settings,
    }
    as_in_a_file: dict[str, Any] = json.loads(json.dumps(found))
    return as_in_a_file
