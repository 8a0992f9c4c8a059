"""The arms of a comparison, planned: each has plans that misfm_plan has written, nnU-Net's own but for that arm."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import replace
from typing import Any

from nnunetv2_misfm.commands.compare.arms import NNUNET, SCRATCH, Arm
from nnunetv2_misfm.commands.compare.options import CompareOptions
from nnunetv2_misfm.commands.compare.workspace import Workspace
from nnunetv2_misfm.commands.setting_options import flag_of
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.run_settings import (
    BLOCK,
    PRETRAIN_INFO,
    FinetuningSettings,
    pretrain_info,
    run_settings,
)


def plan_arms(options: CompareOptions, workspace: Workspace) -> tuple[list[Arm], dict[str, list[str]]]:
    """Plan every arm with misfm_plan, and provide the arrays of its plans.

    Returns:
        The arms, and what misfm_plan noted about the plans of each, by their name.

    Raises:
        UserError: for what misfm_plan refuses.
    """
    notes: dict[str, list[str]] = {}

    def plan(arm: Arm, *words: str) -> None:
        notes[arm.plans] = _misfm_plan(options, workspace, arm.plans, *words)

    stock = [Arm(NNUNET, "nnunet", options.nnunet_rates)] if options.nnunet else []
    for arm in stock:
        _stock_plans(options, workspace, arm)
    arms: list[Arm] = []
    baselines: dict[str, Arm] = {}
    for name, weights in options.weights.items():
        arm = Arm(name, "pretrained", options.rates, weights)
        plan(arm, "-pretrained_weights", weights)
        if options.scratch:
            # Checkpoints of one network share the arm that differs from theirs in the weights alone.
            content = _without_names(workspace, arm)
            if content not in baselines:
                scratch_name = f"{SCRATCH}_{name}" if baselines else SCRATCH
                baselines[content] = Arm(scratch_name, "scratch", options.rates)
                plan(baselines[content], "-pretrained_weights", weights, "--from_scratch")
            arm = replace(arm, baseline=baselines[content].name)
        arms.append(arm)
    scratch = list(baselines.values())
    if options.scratch and not scratch:
        scratch = [Arm(SCRATCH, "scratch", options.rates)]
        plan(scratch[0], "--from_scratch")
    return [*arms, *scratch, *stock], notes


def made_of(workspace: Workspace, arm: Arm) -> dict[str, str | None]:
    """What decides whether two runs of an arm can be compared, as in `RunIdentity`."""
    weights = pretrain_info(workspace.plans_of(arm.plans)).get("sha256") if arm.kind == "pretrained" else None
    plans = hashlib.sha256(_without_names(workspace, arm).encode()).hexdigest()
    return {"weights_sha256": weights, "plans_sha256": plans}


def _without_names(workspace: Workspace, arm: Arm) -> str:
    """What an arm's plans say but for their name, the name of their arrays, their weights and defaults, as JSON.

    A version with one setting more continues runs that lack it with its default.
    """
    plans = workspace.plans_of(arm.plans)
    del plans["plans_name"]
    plans.pop(PRETRAIN_INFO, None)  # nnU-Net's own plans have none
    del plans["configurations"][workspace.configuration]["data_identifier"]
    if BLOCK in plans:
        plans[BLOCK] = run_settings(plans, FinetuningSettings).model_dump(mode="json", exclude_defaults=True)
    return json.dumps(plans, sort_keys=True)


def _misfm_plan(options: CompareOptions, workspace: Workspace, plans_name: str, *words: str) -> list[str]:
    """What misfm_plan notes; all it says goes to a log, for its commands are not for these runs."""
    from nnunetv2_misfm.commands.plan import plan

    settings = [word for name, value in options.settings.items() for word in _as_option(name, value)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            plan(
                ["-d", workspace.dataset, "-c", workspace.configuration, "-p", options.plans]
                + ["-overwrite_plans_name", plans_name, "-np", str(options.num_processes), *words]
                + [*settings, *options.planning]
            )
    finally:
        with open(workspace.folder / "planning.log", "a", encoding="utf-8") as log:
            log.write(said.getvalue())
    lines = said.getvalue().splitlines()
    return [line.removeprefix("Note: ") for line in lines if line.startswith("Note: ")]


def _stock_plans(options: CompareOptions, workspace: Workspace, arm: Arm) -> None:
    """nnU-Net's plans, with the batch size of the other arms if it was given."""
    base, name, words = workspace.base, workspace.configuration, options.planning
    entry = configuration_3d(base, name)
    arrays = workspace.users_preprocessed / entry["data_identifier"]
    if not arrays.is_dir():
        raise PlanError(
            f"{arrays}, which --{NNUNET} trains with, is not there. Preprocess the dataset: nnUNetv2_preprocess -d "
            f"{workspace.dataset} -plans_name {options.plans} -c {name}"
        )
    if "-batch_size" in words:
        entry["batch_size"] = int(words[words.index("-batch_size") + 1])
    plans = base | {"plans_name": arm.plans, "configurations": {**base["configurations"], name: entry}}
    write_json(plans, workspace.preprocessed / f"{arm.plans}.json")


def _as_option(name: str, value: Any) -> list[str]:
    """A setting of a run as an option of misfm_plan."""
    flag = flag_of(FinetuningSettings, name)
    return [flag] if isinstance(value, bool) else [flag, str(value)]
