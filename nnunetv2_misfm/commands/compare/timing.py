"""How long the runs of a comparison will take, from finished ones or from a few iterations of each kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from nnunetv2_misfm.commands.compare.arms import Arm, Run
from nnunetv2_misfm.commands.compare.records import RunRecord, read_record
from nnunetv2_misfm.commands.compare.runner import Runner
from nnunetv2_misfm.commands.compare.study import Study
from nnunetv2_misfm.commands.compare.workspace import fold_key
from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.run_settings import BLOCK

_TIMED_EPOCHS, _TIMED_ITERATIONS = 2, 4  # the first epoch warms up, the second is timed
_VALIDATION_COST = 1 / 3  # of a training iteration


class _Cost(NamedTuple):
    """Seconds of a run, but for prediction, and of predicting a case."""

    training: float
    of_a_case: float


def estimate_hours(study: Study, runner: Runner) -> float:
    """How long the runs that are left will take, from finished runs or, without any, from short ones.

    Raises:
        UserError: if a short run fails; the message shows how its log ends.
    """
    kinds = {arm.name: _kind(study, arm) for arm in study.arms}
    costs: dict[str, _Cost] = {}
    total, left = 0.0, study.left()
    for run in left:
        kind = kinds[run.arm]
        if kind not in costs:
            alike = [arm for arm in study.arms if kinds[arm.name] == kind]
            finished = [_cost(record) for record in _finished(study, alike)]
            costs[kind] = _Cost(*map(fmean, zip(*finished, strict=True))) if finished else _time(study, run, runner)
        total += costs[kind].training + costs[kind].of_a_case * len(study.predicted(run))
    # Runs that share a GPU gain little by it.
    at_once = min(study.options.jobs, len(study.options.gpus) or 1) if runner.device == "cuda" else study.options.jobs
    return total / min(at_once, len(left) or 1) / 3600


def _cost(record: RunRecord) -> _Cost:
    return _Cost(record.seconds - record.prediction_seconds, record.prediction_seconds / len(record.dice))


def _kind(study: Study, arm: Arm) -> str:
    """Equal for arms whose runs take as long."""
    entry = configuration_3d(study.workspace.plans_of(arm.plans), study.workspace.configuration)
    del entry["data_identifier"]
    return arm.trainer + json.dumps(entry, sort_keys=True)


def _finished(study: Study, arms: Sequence[Arm]) -> Iterator[RunRecord]:
    for arm in arms:
        for folder in sorted((study.workspace.folder / "runs").glob(f"{arm.name}_n*")):
            if (record := read_record(folder / "record.json")) is not None and record.arm == arm.name:
                yield record


def _time(study: Study, run: Run, runner: Runner) -> _Cost:
    """What a run takes, from a few of its iterations and the prediction of one of its cases."""
    settings, probe, preprocessed = study.settings, study.options.probe, study.workspace.preprocessed
    fold = study.fold(run)
    order = study.order(run, study.workspace.write_folds([fold])[fold_key(fold)])
    short = {
        "num_epochs": _TIMED_EPOCHS,
        "num_iterations_per_epoch": min(_TIMED_ITERATIONS, settings.num_iterations_per_epoch),
        "num_val_iterations_per_epoch": 1,
    }
    name = f"timing_{run.title}"
    folder, plans_file = study.workspace.folder / "runs" / f".{name}", preprocessed / f"{name}.json"
    plans = study.workspace.plans_of(run.title) | {"plans_name": name}
    if BLOCK in plans:
        plans[BLOCK] |= short
    write_json(plans, plans_file)
    timed = order.model_copy(
        update={
            "plans_file": plans_file,
            "results": order.results.with_name(f"{order.trainer}__{name}__{order.configuration}"),
            "stock": order.stock | short,
            "cases": dict(list(order.cases.items())[:1]),
            "predictions": folder / "predictions",
            "record": folder / "record.json",
            "keep_weights": False,
        }
    )
    try:
        if failures := runner.perform([timed], "timed run", 0 if probe else _TIMED_EPOCHS):
            raise UserError(f"A short run of {run.arm} failed: {failures[0].last}\nIts log: {failures[0].log}")
        record = read_record(timed.record)
        assert record is not None
    finally:
        shutil.rmtree(timed.results, ignore_errors=True)
        plans_file.unlink(missing_ok=True)
    shutil.rmtree(folder)
    start_up = record.seconds - record.training_seconds - record.prediction_seconds
    steps = short["num_iterations_per_epoch"] + _VALIDATION_COST
    of_epoch = settings.num_iterations_per_epoch + _VALIDATION_COST * settings.num_val_iterations_per_epoch
    training = 0.0 if probe else record.last_epoch_seconds / steps * of_epoch * settings.num_epochs
    return _Cost(start_up + training, record.prediction_seconds)
