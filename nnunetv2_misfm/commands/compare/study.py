"""A comparison from its options to its records: arms, splits, plans, learning rates, runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any
from zlib import crc32

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_misfm.commands.compare.arms import NNUNET, SCRATCH, Arm, Run, choose_rates, test_runs, tuning_runs
from nnunetv2_misfm.commands.compare.options import CompareOptions
from nnunetv2_misfm.commands.compare.records import RunRecord, read_record
from nnunetv2_misfm.commands.compare.runner import Failure, Runner
from nnunetv2_misfm.commands.compare.splits import Split, split_cases
from nnunetv2_misfm.commands.compare.workspace import Workspace, fold_key
from nnunetv2_misfm.errors import PlanError, UserError
from nnunetv2_misfm.files import read_json, write_json
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.run_settings import PRETRAIN_INFO, FinetuningSettings
from nnunetv2_misfm.plans.settings import read_settings

_TERMS_FILE = "terms.json"
# What every run of one folder has in common; more arms, seeds, labelled cases and learning rates may come later.
_TERMS = ("configuration", "plans", "patients", "num_test", "num_validation")


class Study:
    """One dataset, its split, and the runs that were asked for.

    Args:
        options: of the command.
        workspace: prepared.

    Raises:
        PlanError: if the dataset has too few patients, or regions, which a classifier of voxels has not; if the folder
            holds a comparison on other terms.
    """

    def __init__(self, options: CompareOptions, workspace: Workspace):
        self.options = options
        self.workspace = workspace
        self.settings = read_settings(FinetuningSettings, options.settings, "The settings of the runs")
        self.cases = workspace.cases
        self.split: Split = split_cases(list(self.cases), options.patients, options.num_test, options.num_validation)
        dataset_json = read_json(workspace.raw / "dataset.json", "Put the raw dataset back.")
        self.file_ending = dataset_json["file_ending"]
        labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
        self.ignored: int | None = labels.ignore_label
        if options.probe and labels.has_regions:
            raise PlanError(f"{workspace.dataset} has regions, which --probe cannot score. Leave --probe out.")
        self.labelled = self.split.numbers(options.labelled)
        self._terms = self._checked_terms()
        self.arms: list[Arm] = []
        self.notes: dict[str, list[str]] = {}
        """What misfm_plan noted about the plans of each arm, by their name."""

    def _checked_terms(self) -> dict[str, Any]:
        """What all runs of the folder have in common; those that are there already must have it too."""
        options = self.options
        terms = {name: getattr(options, name) for name in _TERMS} | {
            "dataset": self.workspace.dataset,
            "planning": list(options.planning),
            "settings": options.settings,
            "probe": options.probe,
            "mirroring": options.mirroring and not options.probe,
            "test": list(self.split.test),
            "validation": list(self.split.validation),
            "training": list(self.split.training),
            "cases": self.split.cases,
            "labels": self.workspace.labels(),
            "label_files": self._checksum_of_labels(),
        }
        terms = json.loads(json.dumps(terms))
        path = self.workspace.folder / _TERMS_FILE
        if path.is_file():
            before = read_json(path, f"Remove {self.workspace.folder} and start again.")
            both = [name for name in terms if name in before]  # folders of earlier versions have fewer
            changed = [
                f"{name} was {_short(before[name])}, is {_short(terms[name])}"
                for name in both
                if before[name] != terms[name]
            ]
            if changed:
                raise PlanError(
                    f"{self.workspace.folder} holds a comparison on other terms: {'; '.join(changed)}. Give the "
                    f"options it was begun with, or another folder with -o; a dataset with other cases or labels needs "
                    f"one."
                )
        return terms

    def _checksum_of_labels(self) -> str:
        """Of all label files: runs that were tested with other labels are not to be compared.

        Raises:
            PlanError: if they are not those that nnU-Net has preprocessed, with which the runs would train.
        """
        checksum, corrected = 0, []
        copies = self.workspace.users_preprocessed / "gt_segmentations"
        for case, (_, label) in self.cases.items():
            content = Path(label).read_bytes()
            checksum = crc32(content, checksum)
            preprocessed = copies / f"{case}{self.file_ending}"
            if preprocessed.is_file() and preprocessed.read_bytes() != content and self._differ(label, preprocessed):
                corrected.append(label)
        if corrected:
            more = f" and {len(corrected) - 1} more" if len(corrected) > 1 else ""
            raise PlanError(
                f"{corrected[0]}{more}: nnU-Net has preprocessed other labels, which the runs would train with. "
                f"Preprocess the dataset again: nnUNetv2_preprocess -d {self.workspace.dataset} -plans_name "
                f"{self.options.plans} -c {self.options.configuration} (if the labels have older dates than those in "
                f"{copies}, remove these first: nnU-Net would keep them)"
            )
        return f"{checksum:08x}"

    def _differ(self, label: str, other: Path) -> bool:
        """Whether two label files hold other labels, not only another compression or header."""
        reader = self.workspace.reader
        return not np.array_equal(reader.read_seg(label)[0], reader.read_seg(str(other))[0])

    # ---------------------------------------------------------------- plans

    def plan_arms(self) -> None:
        """Plan every arm with misfm_plan, and provide the arrays of its plans.

        Raises:
            UserError: for what misfm_plan refuses.
        """
        options = self.options
        stock = [Arm(NNUNET, "nnunet", options.nnunet_rates)] if options.nnunet else []
        for arm in stock:
            self._stock_plans(arm)
        arms: list[Arm] = []
        baselines: dict[str, Arm] = {}
        for name, weights in options.weights.items():
            arm = Arm(name, "pretrained", options.rates, weights)
            self._misfm_plan(arm.plans, "-pretrained_weights", weights)
            if options.scratch:
                # Checkpoints of one network share the arm that differs from theirs in the weights alone.
                content = self._without_names(arm)
                if content not in baselines:
                    scratch_name = f"{SCRATCH}_{name}" if baselines else SCRATCH
                    baselines[content] = Arm(scratch_name, "scratch", options.rates)
                    self._misfm_plan(baselines[content].plans, "-pretrained_weights", weights, "--from_scratch")
                arm = replace(arm, baseline=baselines[content].name)
            arms.append(arm)
        scratch = list(baselines.values())
        if options.scratch and not scratch:
            scratch = [Arm(SCRATCH, "scratch", options.rates)]
            self._misfm_plan(scratch[0].plans, "--from_scratch")
        self.arms = [*arms, *scratch, *stock]

    def _without_names(self, arm: Arm) -> str:
        """What an arm's plans say but for their name, the name of their arrays and their weights, as JSON."""
        plans = self.workspace.plans_of(arm.plans)
        del plans["plans_name"]
        plans.pop(PRETRAIN_INFO, None)  # nnU-Net's own plans have none
        del plans["configurations"][self.workspace.configuration]["data_identifier"]
        return json.dumps(plans, sort_keys=True)

    def _misfm_plan(self, plans_name: str, *words: str) -> None:
        """misfm_plan, whose notes go to the page, and all it says to a log: its commands are not for these runs."""
        from nnunetv2_misfm.commands.plan import plan

        settings = [word for name, value in self.options.settings.items() for word in _as_option(name, value)]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                plan(
                    ["-d", self.workspace.dataset, "-c", self.workspace.configuration, "-p", self.options.plans]
                    + ["-overwrite_plans_name", plans_name, "-np", str(self.options.num_processes), *words]
                    + [*settings, *self.options.planning]
                )
        finally:
            with open(self.workspace.folder / "planning.log", "a", encoding="utf-8") as log:
                log.write(said.getvalue())
        lines = said.getvalue().splitlines()
        self.notes[plans_name] = [line.removeprefix("Note: ") for line in lines if line.startswith("Note: ")]

    def _stock_plans(self, arm: Arm) -> None:
        """nnU-Net's plans, with the batch size of the other arms if it was given."""
        base, name, words = self.workspace.base, self.workspace.configuration, self.options.planning
        entry = configuration_3d(base, name)
        arrays = self.workspace.users_preprocessed / entry["data_identifier"]
        if not arrays.is_dir():
            raise PlanError(
                f"{arrays}, which --{NNUNET} trains with, is not there. Preprocess the dataset: nnUNetv2_preprocess -d "
                f"{self.workspace.dataset} -plans_name {self.options.plans} -c {name}"
            )
        if "-batch_size" in words:
            entry["batch_size"] = int(words[words.index("-batch_size") + 1])
        plans = base | {"plans_name": arm.plans, "configurations": {**base["configurations"], name: entry}}
        write_json(plans, self.workspace.preprocessed / f"{arm.plans}.json")

    @property
    def own_schedules(self) -> bool:
        """Whether misfm_plan chooses each arm's schedule."""
        return "schedule" not in self.options.settings

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    # ---------------------------------------------------------------- runs

    def perform(self, runner: Runner) -> tuple[list[Failure], dict[tuple[str, int], float]]:
        """Choose learning rates, then do the runs that are tested; what is finished already is not done again.

        Returns:
            The runs that failed, and the learning rate of each arm for each number of labelled cases, without those
            for which a run that chooses rates failed: a rate that was not tried might be the best one.
        """
        write_json(self._terms, self.workspace.folder / _TERMS_FILE)  # not before: options that failed bind nobody
        tuning = self.tuning()
        failures = runner.perform(self._requests(tuning), "runs for learning rates", self._epochs)
        chosen = self._chosen()
        if tuning:
            for (arm, number), rate in chosen.items():
                print(f"Learning rate of {arm} with {number} labelled: {rate:g}")
        failures += runner.perform(self._requests(self.tested(chosen)), "runs", self._epochs)
        return failures, chosen

    def _chosen(self) -> dict[tuple[str, int], float]:
        """The learning rate of each arm and number of labelled cases whose runs that choose it are all finished."""
        tuning = self.tuning()
        scores = {run: record.score for run in tuning if (record := self.record(run)) is not None}
        undecided = {(run.arm, run.labelled) for run in tuning if run not in scores}
        chosen = choose_rates(self.arms, self.labelled, scores)
        return {of: rate for of, rate in chosen.items() if of not in undecided}

    def tuning(self) -> list[Run]:
        """The runs that choose learning rates; probes have none."""
        return [] if self.options.probe else tuning_runs(self.arms, self.labelled, self.options.tuning_seeds)

    def tested(self, chosen: Mapping[tuple[str, int], float]) -> list[Run]:
        """The runs that are tested; those of arms whose learning rate is chosen."""
        return test_runs(self.arms, self.labelled, self.options.seeds, chosen)

    def record(self, run: Run) -> RunRecord | None:
        """What a finished run has left."""
        return read_record(self.workspace.run_folder(run) / "record.json")

    def asked(self) -> list[Run]:
        """All runs; those whose learning rate is not chosen yet have any of them."""
        first = {(arm.name, number): arm.rates[0] for arm in self.arms for number in self.labelled}
        return [*self.tuning(), *self.tested({**first, **self._chosen()})]

    def left(self) -> list[Run]:
        """Of these the runs that are not finished."""
        return [run for run in self.asked() if self.record(run) is None]

    @property
    def _epochs(self) -> int:
        """Of a run, for the progress bar."""
        return 0 if self.options.probe else self.settings.num_epochs

    def _requests(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Requests of the runs that are not finished, whose plans and folds are written.

        Raises:
            UserError: if a finished run is of other weights than are asked for now.
        """
        waiting = []
        for run in runs:
            record = self.record(run)
            if record is None:
                waiting.append(run)
            elif self._differs(record):
                raise UserError(
                    f"{self.workspace.run_folder(run)} was made with other weights, another network or plans. Remove "
                    f"that folder to do it again, give another folder with -o, or give a pretrained arm another name "
                    f"(-pretrained_weights NAME=FILE). If it is the baseline of other weights now ({SCRATCH} "
                    f"is that of the first), give the checkpoints that are new last."
                )
        folds = [self.fold(run) for run in waiting]
        numbers = self.workspace.write_folds(folds)
        return [self.request(run, numbers[fold_key(fold)]) for run, fold in zip(waiting, folds, strict=True)]

    def _differs(self, record: RunRecord) -> bool:
        """Whether a run had other weights or plans than its arm has now; records of earlier versions lack the plans."""
        arm = self.arm(record.arm)
        plans = record.plans_sha256
        return record.weights_sha256 != self._sha256(arm) or plans not in (None, self._plans_sha256(arm))

    def _plans_sha256(self, arm: Arm) -> str:
        return hashlib.sha256(self._without_names(arm).encode()).hexdigest()

    def fold(self, run: Run) -> dict[str, list[str]]:
        """The cases that a run trains with and those of its learning curve, as in nnU-Net's splits."""
        split = self.split
        return {"train": split.labelled(run.labelled, run.seed), "val": split.cases_of(split.validation)}

    def _sha256(self, arm: Arm) -> str | None:
        sha256: str | None = (self.workspace.plans_of(arm.plans).get(PRETRAIN_INFO) or {}).get("sha256")
        return sha256 if arm.kind == "pretrained" else None

    def request(self, run: Run, fold: int) -> dict[str, Any]:
        """All that the process of a run needs to know; its plans are written."""
        arm, workspace, settings = self.arm(run.arm), self.workspace, self.settings
        workspace.write_run_plans(arm, run)
        folder, split = workspace.run_folder(run), self.split
        cases = split.cases_of(split.validation if run.tuning else split.test)
        plans = workspace.plans_of(arm.plans)
        entry = plans["configurations"][workspace.configuration]
        return {
            "dataset": workspace.dataset,
            "configuration": workspace.configuration,
            "fold": fold,
            "trainer": arm.trainer,
            "plans": run.title,
            "plans_file": str(workspace.preprocessed / f"{run.title}.json"),
            "dataset_json": str(workspace.preprocessed / "dataset.json"),
            "arrays": str(workspace.preprocessed / entry["data_identifier"]),
            "labelled_cases": split.labelled(run.labelled, run.seed),
            "results": str(workspace.results(arm, run)),
            "stock": {
                "num_epochs": settings.num_epochs,
                "num_iterations_per_epoch": settings.num_iterations_per_epoch,
                "num_val_iterations_per_epoch": settings.num_val_iterations_per_epoch,
                "initial_lr": run.rate,
            },
            "cases": {case: {"images": self.cases[case][0], "label": self.cases[case][1]} for case in cases},
            "labels": list(workspace.labels()),
            "file_ending": self.file_ending,
            "predictions": str(folder / "predictions"),
            "record": str(folder / "record.json"),
            "device": self.options.device,
            "mirroring": self.options.mirroring,
            "probe": self.options.probe,
            "keep_weights": self.options.keep_weights,
            "about": {
                "arm": run.arm,
                "labelled": run.labelled,
                "seed": run.seed,
                "rate": run.rate,
                "tuning": run.tuning,
                "weights_sha256": self._sha256(arm),
                "plans_sha256": self._plans_sha256(arm),
                "iterations_per_epoch": settings.num_iterations_per_epoch,
            },
        }


def _short(value: Any) -> str:
    """A term as a message can show it: there may be hundreds of cases."""
    return shorten(str(value), 300, placeholder=" ...")


def _as_option(name: str, value: Any) -> list[str]:
    """A setting of a run as an option of misfm_plan."""
    from nnunetv2_misfm.commands.setting_options import flag_of

    flag = flag_of(FinetuningSettings, name)
    return [flag] if isinstance(value, bool) else [flag, str(value)]
