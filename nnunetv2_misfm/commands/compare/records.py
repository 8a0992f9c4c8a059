"""What a run is asked to do, and what it leaves when it is finished: a record, and all records as a table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nnunetv2_misfm.commands.compare.arms import Run
from nnunetv2_misfm.files import written_whole


class RunIdentity(Run):
    """Which run, and what it is made of.

    Attributes:
        iterations_per_epoch: of training.
        weights_sha256: of a pretrained arm's checkpoint.
        plans_sha256: of the arm's plans, but for their names and weights; earlier records lack it.
    """

    iterations_per_epoch: int
    weights_sha256: str | None = None
    plans_sha256: str | None = None


class CaseFiles(BaseModel):
    """The files of a case: its channels, in nnU-Net's order, and its label."""

    model_config = ConfigDict(frozen=True)

    images: tuple[str, ...]
    label: str


class ProbeOrder(BaseModel):
    """What a linear classifier is fitted to: labelled cases in a folder of preprocessed arrays."""

    model_config = ConfigDict(frozen=True)

    arrays: Path
    dataset_json: Path
    labelled_cases: tuple[str, ...]


class RunOrder(BaseModel):
    """All that the process of a run needs to know.

    Attributes:
        about: which run.
        dataset, configuration, fold: as nnU-Net's training takes them.
        trainer: name of its class.
        plans_file: of the run's own plans, which have its name.
        stock: attributes that nnU-Net's own trainer gets; the others read them from their plans.
        results: folder over all folds.
        cases: to predict and evaluate, by their names.
        labels: names of the labels or regions, in the order of nnU-Net's scores.
        file_ending: of label files.
        predictions: folder for them.
        record: file that is written last.
        device: to train and predict on.
        mirroring: in prediction.
        keep_weights: do not delete the results folder in the end.
        probe: what to fit in place of a training.
    """

    model_config = ConfigDict(frozen=True)

    about: RunIdentity
    dataset: str
    configuration: str
    fold: int
    trainer: str
    plans_file: Path
    stock: dict[str, int | float]
    results: Path
    cases: dict[str, CaseFiles]
    labels: tuple[str, ...]
    file_ending: str
    predictions: Path
    record: Path
    device: str
    mirroring: bool
    keep_weights: bool
    probe: ProbeOrder | None = None


class RunRecord(RunIdentity):
    """A finished run.

    Attributes:
        dice: of each case and label, 0 to 1; None where the label is in neither truth nor prediction.
        curve: pseudo Dice of the validation cases after each epoch, as nnU-Net logs it.
        training_seconds, prediction_seconds, seconds: for all epochs, for all cases, for everything.
        last_epoch_seconds: for one epoch, when caches are warm.
        device, date, versions: where, when, and of which packages; earlier records lack the last.
    """

    dice: dict[str, dict[str, float | None]]
    curve: list[float]
    training_seconds: float
    prediction_seconds: float
    seconds: float
    last_epoch_seconds: float = 0.0
    device: str = ""
    date: str = ""
    versions: str = ""

    @property
    def label_dice(self) -> dict[str, float]:
        """Mean Dice of each label over the cases that have it, in points, as nnU-Net averages."""
        labels = next(iter(self.dice.values()))
        return {label: 100 * mean(case[label] for case in self.dice.values()) for label in labels}

    @property
    def case_dice(self) -> dict[str, float]:
        """Mean Dice of each case over its labels, in points."""
        return {case: 100 * mean(labels.values()) for case, labels in self.dice.items()}

    @property
    def score(self) -> float:
        """Mean foreground Dice in points, nnU-Net's `foreground_mean`."""
        return mean(self.label_dice.values())


def mean(values: Iterable[float | None]) -> float:
    """Of the values that there are; nan for none."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def versions() -> str:
    """Of the packages that a run depends on, as they are now."""
    from nnunetv2_misfm.checkpoints.checkpoint import installed_versions  # loads torch, which takes seconds

    return ", ".join(f"{name} {version}" for name, version in installed_versions().items())


def read_record(path: Path) -> RunRecord | None:
    """A run's record; None if there is none that can be read, and the run has to be done."""
    try:
        return RunRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None


def write_csv(records: Iterable[RunRecord], path: Path) -> None:
    """A row for each run, label and case: arm, labelled, seed, learning_rate, tuning, case, label, dice."""
    with written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "labelled", "seed", "learning_rate", "tuning", "case", "label", "dice"])
        for record in records:
            about = [record.arm, record.labelled, record.seed, record.rate, int(record.tuning)]
            for case, labels in record.dice.items():
                for label, value in labels.items():
                    writer.writerow([*about, case, label, "" if value is None else f"{value:.6f}"])
