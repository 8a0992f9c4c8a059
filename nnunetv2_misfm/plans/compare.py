"""How two plans files would train differently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nnunetv2_misfm.plans.run_settings import BLOCK, RUNS, RunSettings
from nnunetv2_misfm.plans.settings import Settings, declared, write_settings

# How long a run is, and what it shows or checks on the way.
_MAY_CHANGE = {name for kind in RUNS for name in kind.model_fields if declared(kind, name, "may_change")}
_OF_THE_DATA = ("patch_size", "batch_size", "spacing", "data_identifier")


def run_changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    configuration: str,
    run: RunSettings | None = None,
    **groups: Settings,
) -> dict[str, tuple[Any, Any]]:
    """What differs in network, patch, batch, spacing, data and settings, by name: the value then and the one now.

    Args:
        before, now: plans that both have the configuration.
        configuration: its name.
        run: the defaults of the run's settings, if they are not those declared.
        groups: the defaults of nested groups, by name. A setting that plans of another version lack has its default.
    """
    old, new = (_everything(plans, configuration, run, groups) for plans in (before, now))
    names = sorted({*old, *new}, key=lambda name: ("." not in name, name))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def what_a_run_must_keep(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    configuration: str,
    run: RunSettings | None = None,
    **groups: Settings,
) -> list[str]:
    """What differs although a run that goes on must keep it, one line each; empty if nothing does."""
    changed = run_changes(before, now, configuration, run, **groups)
    if "task" in changed:  # the settings of one task say nothing about another
        changed = {"task": changed["task"]}
    return [f"{name}: {old} then, {new} now" for name, (old, new) in changed.items() if name not in _MAY_CHANGE]


def _everything(
    plans: Mapping[str, Any], configuration: str, run: RunSettings | None, groups: Mapping[str, Settings]
) -> dict[str, Any]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # takes seconds

    entry = PlansManager(dict(plans)).get_configuration(configuration).configuration
    architecture, settings = entry["architecture"], dict(plans.get(BLOCK, {}))
    settings.pop("pool", None)  # what the volumes are, which may become more
    for kind in RUNS:
        if settings.get("task") in kind.TASKS:
            settings = write_settings(run or kind()) | settings
    for name, defaults in groups.items():
        values = write_settings(defaults) | settings.pop(name, {})
        settings |= {f"{name}.{key}": value for key, value in values.items()}
    found = {
        "network": architecture["network_class_name"].rpartition(".")[2],
        **{f"network.{name}": value for name, value in architecture["arch_kwargs"].items()},
        **{name: entry.get(name) for name in _OF_THE_DATA},
        **settings,
    }
    as_in_a_file: dict[str, Any] = json.loads(json.dumps(found))
    return as_in_a_file
