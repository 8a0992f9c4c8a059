"""A comparison from its options to its records: arms, splits, plans, learning rates, runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_misfm.commands.compare.arms import SCRATCH, Arm, Run, choose_rates, test_runs, tuning_runs
from nnunetv2_misfm.commands.compare.options import CompareOptions
from nnunetv2_misfm.commands.compare.planned_arms import made_of, plan_arms
from nnunetv2_misfm.commands.compare.records import (
    CaseFiles,
    ProbeOrder,
    RunIdentity,
    RunOrder,
    RunRecord,
    read_record,
)
from nnunetv2_misfm.commands.compare.runner import Failure, Runner
from nnunetv2_misfm.commands.compare.splits import Split, split_cases
from nnunetv2_misfm.commands.compare.terms import TERMS_FILE, checked_terms
from nnunetv2_misfm.commands.compare.workspace import Workspace, fold_key
from nnunetv2_misfm.errors import PlanError, UserError
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.run_settings import FinetuningSettings
from nnunetv2_misfm.plans.settings import read_settings


def planned_study(options: CompareOptions, workspace: Workspace) -> Study:
    """A comparison whose terms are checked and whose arms are planned.

    Args:
        options: of the command.
        workspace: prepared.

    Raises:
        UserError: if the dataset has too few patients, or regions, which a classifier of voxels has not; if the folder
            holds a comparison on other terms; for what misfm_plan refuses.
    """
    split = split_cases(list(workspace.cases), options.patients, options.num_test, options.num_validation)
    split.numbers(options.labelled)  # there are that many
    dataset_json = workspace.raw_dataset_json
    labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    if options.probe and labels.has_regions:
        raise PlanError(f"{workspace.dataset} has regions, which --probe cannot score. Leave --probe out.")
    terms = checked_terms(options, workspace, split)
    return Study(options, workspace, split, labels.ignore_label, terms, *plan_arms(options, workspace))


class Study:
    """One dataset, its split, and the runs that were asked for.

    Args:
        options: of the command.
        workspace: prepared.
        split: of its cases.
        ignored: nnU-Net's ignore label, if the dataset has one.
        terms: what all runs have in common.
        arms: planned.
        notes: what misfm_plan noted about the plans of each arm, by their name.
    """

    def __init__(
        self,
        options: CompareOptions,
        workspace: Workspace,
        split: Split,
        ignored: int | None,
        terms: Mapping[str, Any],
        arms: Sequence[Arm],
        notes: Mapping[str, Sequence[str]],
    ):
        self.options = options
        self.workspace = workspace
        self.split = split
        self.ignored = ignored
        self.arms = list(arms)
        self.notes = notes
        self.settings = read_settings(FinetuningSettings, options.settings, "The settings of the runs")
        self.labelled = split.numbers(options.labelled)
        self._terms = terms

    @property
    def own_schedules(self) -> bool:
        """Whether misfm_plan chooses each arm's schedule."""
        return "schedule" not in self.options.settings

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def perform(self, runner: Runner) -> tuple[list[Failure], dict[tuple[str, int], float]]:
        """Choose learning rates, then do the runs that are tested; what is finished already is not done again.

        Returns:
            The runs that failed, and the learning rate of each arm for each number of labelled cases, without those
            for which a run that chooses rates failed: a rate that was not tried might be the best one.
        """
        write_json(self._terms, self.workspace.folder / TERMS_FILE)  # not before: options that failed bind nobody
        tuning = self.tuning()
        failures = runner.perform(self._orders(tuning), "runs for learning rates", self._epochs)
        chosen = self._chosen()
        if tuning:
            for (arm, number), rate in chosen.items():
                print(f"Learning rate of {arm} with {number} labelled: {rate:g}")
        failures += runner.perform(self._orders(self.tested(chosen)), "runs", self._epochs)
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

    def _orders(self, runs: Sequence[Run]) -> list[RunOrder]:
        """Orders for the runs that are not finished, whose plans and folds are written.

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
        return [self.order(run, numbers[fold_key(fold)]) for run, fold in zip(waiting, folds, strict=True)]

    def _differs(self, record: RunRecord) -> bool:
        """Whether a run had other weights or plans than its arm has now; records of earlier versions lack the plans."""
        now = made_of(self.workspace, self.arm(record.arm))
        return record.weights_sha256 != now["weights_sha256"] or record.plans_sha256 not in (None, now["plans_sha256"])

    def fold(self, run: Run) -> dict[str, list[str]]:
        """The cases that a run trains with and those of its learning curve, as in nnU-Net's splits."""
        split = self.split
        return {"train": split.labelled(run.labelled, run.seed), "val": split.cases_of(split.validation)}

    def predicted(self, run: Run) -> list[str]:
        """The cases that a run is scored on."""
        return self.split.cases_of(self.split.validation if run.tuning else self.split.test)

    def order(self, run: Run, fold: int) -> RunOrder:
        """All that the process of a run needs to know; its plans are written."""
        arm, workspace, settings = self.arm(run.arm), self.workspace, self.settings
        workspace.write_run_plans(arm, run)
        folder, preprocessed = workspace.run_folder(run), workspace.preprocessed
        probe = None
        if self.options.probe:
            entry = workspace.plans_of(arm.plans)["configurations"][workspace.configuration]
            probe = ProbeOrder(
                arrays=preprocessed / entry["data_identifier"],
                dataset_json=preprocessed / "dataset.json",
                labelled_cases=tuple(self.fold(run)["train"]),
            )
        return RunOrder(
            about=RunIdentity(
                **(run.model_dump() | made_of(workspace, arm)),
                iterations_per_epoch=settings.num_iterations_per_epoch,
            ),
            dataset=workspace.dataset,
            configuration=workspace.configuration,
            fold=fold,
            trainer=arm.trainer,
            plans_file=preprocessed / f"{run.title}.json",
            stock={
                "num_epochs": settings.num_epochs,
                "num_iterations_per_epoch": settings.num_iterations_per_epoch,
                "num_val_iterations_per_epoch": settings.num_val_iterations_per_epoch,
                "initial_lr": run.rate,
            },
            results=workspace.results(arm, run),
            cases={
                case: CaseFiles(images=tuple(images), label=label)
                for case in self.predicted(run)
                for images, label in [workspace.cases[case]]
            },
            labels=tuple(workspace.labels()),
            file_ending=workspace.file_ending,
            predictions=folder / "predictions",
            record=folder / "record.json",
            device=self.options.device,
            mirroring=self.options.mirroring,
            keep_weights=self.options.keep_weights,
            probe=probe,
        )
