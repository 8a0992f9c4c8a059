"""The arms of a comparison, and the runs it takes: each arm with the labelled cases of each seed."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict

SCRATCH, NNUNET = "scratch", "nnunet"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")
Kind = Literal["pretrained", "scratch", "nnunet"]
FIRST_TUNING_SEED = 1000  # so that learning rates are chosen with other labelled cases than are tested
MEANINGS: dict[Kind, str] = {
    "pretrained": "pretrained weights",
    "scratch": "the same network with random weights",
    "nnunet": "nnU-Net's own trainer, network, optimiser and patch size",
}


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        name: for the reader, and in names of files.
        kind: what it starts from, and with which trainer.
        rates: learning rates to choose from.
        weights: checkpoint, for a pretrained arm.
        baseline: name of the arm that differs from it in the weights alone.
    """

    name: str
    kind: Kind
    rates: tuple[float, ...]
    weights: str | None = None
    baseline: str | None = None

    @property
    def trainer(self) -> str:
        """Its trainer's class name."""
        return "nnUNetTrainer" if self.kind == "nnunet" else "MisFMTrainer"

    @property
    def plans(self) -> str:
        """The name of the plans that its runs' plans are made from."""
        return f"{self.name}_arm"


class Run(BaseModel):
    """One arm with the labelled cases of one seed, to be tested or to choose a learning rate.

    Attributes:
        arm: its name.
        labelled: number of labelled cases or patients.
        seed: which draw of them, and of everything random.
        rate: learning rate.
        tuning: scored on the validation cases, not on the test cases.
    """

    model_config = ConfigDict(frozen=True)

    arm: str
    labelled: int
    seed: int
    rate: float
    tuning: bool

    @property
    def title(self) -> str:
        """The name of its plans and of its folder."""
        return f"{self.arm}_n{self.labelled}_seed{self.seed}_lr{self.rate:g}"


def named_weights(given_weights: list[str]) -> tuple[dict[str, str], list[str]]:
    """The checkpoint of each arm by the arm's name, from words like NAME=FILE, and what is wrong with them."""
    from nnunetv2_misfm.checkpoints.hub import is_hub_name  # loads torch, which takes seconds

    named: dict[str, str] = {}
    problems = []
    for word in given_weights:
        name, equals, path = word.partition("=")
        if not equals or is_hub_name(word) or Path(word).expanduser().is_file():
            name, path = _name_of(word), word
        if not is_hub_name(path):
            path = os.path.abspath(Path(path).expanduser())
            if not Path(path).is_file():
                problems.append(f"-pretrained_weights {word}: there is no file {path}; give a checkpoint")
        if not _NAME.fullmatch(name) or name == NNUNET or f"{name}_".startswith(f"{SCRATCH}_"):
            problems.append(
                f"-pretrained_weights {word}: {name!r} cannot name an arm; give NAME={path} with letters, digits, - "
                f"and single _, other than {NNUNET} and {SCRATCH} (also with an _ after it)"
            )
        elif name in named:
            problems.append(f"-pretrained_weights: two arms would be called {name!r}; give NAME=FILE for each")
        named[name] = path
    return named, problems


def _name_of(path: str) -> str:
    """The repository's or the file's name; for a checkpoint in a results folder of nnU-Net that of its dataset."""
    from nnunetv2_misfm.checkpoints.hub import is_hub_name, repository_name

    if is_hub_name(path):
        return repository_name(path)
    file = Path(os.path.abspath(Path(path).expanduser()))
    if file.name.startswith("checkpoint_") and file.parent.name.startswith("fold_") and len(file.parts) > 4:
        return file.parts[-4].partition("_")[2] or file.parts[-4]
    return file.name.partition(".")[0]


def tuning_runs(arms: Sequence[Arm], labelled: Sequence[int], seeds: int) -> list[Run]:
    """The runs that choose learning rates; an arm with one rate needs none."""
    return [
        Run(arm=arm.name, labelled=number, seed=FIRST_TUNING_SEED + seed, rate=rate, tuning=True)
        for number in labelled
        for seed in range(seeds)
        for arm in arms
        if len(arm.rates) > 1
        for rate in arm.rates
    ]


def test_runs(
    arms: Sequence[Arm], labelled: Sequence[int], seeds: Iterable[int], chosen: Mapping[tuple[str, int], float]
) -> list[Run]:
    """The runs that are tested, seed by seed, so that an interrupted comparison has whole pairs.

    Args:
        arms, labelled, seeds: what to compare.
        chosen: learning rate by arm and number of labelled cases; what is not in it is left out.
    """
    return [
        Run(arm=arm.name, labelled=number, seed=seed, rate=chosen[arm.name, number], tuning=False)
        for seed in seeds
        for number in labelled
        for arm in arms
        if (arm.name, number) in chosen
    ]


def choose_rates(
    arms: Sequence[Arm], labelled: Sequence[int], scores: Mapping[Run, float]
) -> dict[tuple[str, int], float]:
    """The learning rate of each arm for each number of labelled cases: its best on the validation cases.

    Args:
        arms, labelled: what to compare.
        scores: mean validation Dice of the tuning runs; of equal ones the lower rate is taken.
    """
    of_rate: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for run, score in scores.items():
        of_rate[run.arm, run.labelled, run.rate].append(score)
    return {
        (arm.name, number): max(sorted(arm.rates), key=lambda rate: _known(of_rate[arm.name, number, rate]))
        for arm in arms
        for number in labelled
    }


def _known(scores: Sequence[float]) -> float:
    """Their mean; the lowest of all where there is none, as on validation cases without any of the labels."""
    found = fmean(scores) if scores else math.nan
    return -math.inf if math.isnan(found) else found
