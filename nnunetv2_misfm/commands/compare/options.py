"""The command line of misfm_compare: its options, and what is wrong with them, all at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_misfm.commands.compare.arms import FIRST_TUNING_SEED, named_weights
from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.commands.plan import add_planning_options
from nnunetv2_misfm.commands.setting_options import add_setting_options, flag_of, given
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.plans.run_settings import FinetuningSettings
from nnunetv2_misfm.plans.settings import SettingsError, read_settings

ALL = "all"
NNUNET_LR = 1e-2  # nnUNetTrainer's
_OWN_OPTION = ("initial_lr", "seed")
_OF_THE_TRANSFER = ("min_coverage", "encoder_only", "mix_input_channels")  # which decide on frozen features too


@dataclass(frozen=True)
class CompareOptions:
    """What the user asked for, checked.

    Attributes:
        dataset, configuration, plans: of nnU-Net, to start from.
        folder: for all that is made.
        weights: checkpoint of each pretrained arm, by the arm's name.
        scratch, nnunet: whether these arms are trained too.
        labelled: numbers of labelled patients; None stands for all there are.
        seeds: of the draws that are tested.
        tuning_seeds: how many draws to choose learning rates with.
        patients: regular expression that finds the patient in a case's name, or None.
        num_test, num_validation: patients, or None for a share.
        rates, nnunet_rates: learning rates; with more than one each arm's is chosen on the validation cases.
        settings: of the runs, as given, with one schedule for all arms unless each is to have its own.
        planning: further options of misfm_plan.
        probe: score frozen features instead of fine-tuning.
        device, gpus, jobs: where (an empty device is the best there is), and how many runs at once.
        mirroring: at prediction.
        keep_weights: of finished runs.
        num_processes: to preprocess with.
        dry_run: say how the cases are split and do nothing.
    """

    dataset: str
    configuration: str
    plans: str
    folder: Path | None
    weights: dict[str, str]
    scratch: bool
    nnunet: bool
    labelled: tuple[int | None, ...]
    seeds: range
    tuning_seeds: int
    patients: str | None
    num_test: int | None
    num_validation: int | None
    rates: tuple[float, ...]
    nnunet_rates: tuple[float, ...]
    settings: dict[str, Any]
    planning: tuple[str, ...]
    probe: bool
    device: str
    gpus: tuple[str, ...]
    jobs: int
    mirroring: bool
    keep_weights: bool
    num_processes: int
    dry_run: bool


def read_options(arguments: list[str] | None) -> CompareOptions:
    """The options of a command line.

    Raises:
        PlanError: with a line for each thing that is wrong.
    """
    options = _parser().parse_args(arguments)
    weights, problems = named_weights(options.pretrained_weights)
    problems += _contradictions(options, len(weights) + options.from_scratch + options.nnunet)
    problems += _problems(options)
    asked = {name: value for name, value in given(options, FinetuningSettings).items() if name not in _OWN_OPTION}
    settings = asked if options.own_schedules else {"schedule": "poly", **asked}
    rates = tuple(dict.fromkeys(options.initial_lr or [FinetuningSettings().initial_lr]))
    problems += _problems_of_settings(settings, rates)
    if problems:
        raise PlanError("these options cannot be used:" + "".join(f"\n  - {problem}" for problem in problems))
    return CompareOptions(
        dataset=options.d,
        configuration=options.c,
        plans=options.p,
        folder=Path(options.o).resolve() if options.o else None,
        weights=weights,
        scratch=options.from_scratch,
        nnunet=options.nnunet,
        labelled=tuple(dict.fromkeys(None if n == ALL else int(n) for n in options.num_labelled)),
        seeds=range(options.first_seed, options.first_seed + options.seeds),
        tuning_seeds=options.tuning_seeds,
        patients=options.patients,
        num_test=options.num_test,
        num_validation=options.num_validation,
        rates=rates,
        nnunet_rates=tuple(dict.fromkeys(options.nnunet_lr or [NNUNET_LR])),
        settings=settings,
        planning=_planning_options(options),
        probe=options.probe,
        device="cuda" if options.gpus else options.device or "",
        gpus=tuple(options.gpus),
        jobs=options.jobs or max(1, len(options.gpus)),
        mirroring=not options.disable_tta,
        keep_weights=options.keep_weights,
        num_processes=options.np,
        dry_run=options.dry_run,
    )


def _problems(options: argparse.Namespace) -> list[str]:
    """Values that cannot be used."""
    problems = [
        f"-num_labelled {n}: give numbers of at least 1, or all"
        for n in options.num_labelled
        if n != ALL and (not n.isdecimal() or int(n) < 1)
    ]
    for name, low in (("seeds", 1), ("tuning_seeds", 1), ("jobs", 1), ("np", 1), ("num_test", 1), ("first_seed", 0)):
        value = getattr(options, name)
        if value is not None and value < low:
            problems.append(f"-{name} {value} must be at least {low}")
    if options.first_seed + options.seeds > FIRST_TUNING_SEED:
        problems.append(
            f"-first_seed {options.first_seed} -seeds {options.seeds}: draws from {FIRST_TUNING_SEED} on choose "
            f"learning rates; take lower ones"
        )
    if options.num_validation is not None and options.num_validation < 1:
        problems.append(f"-num_validation {options.num_validation} must be at least 1: the learning curves need it")
    if options.patients is not None:
        try:
            re.compile(options.patients)
        except re.error as error:
            problems.append(f"-patients {options.patients!r} is no regular expression: {error}")
    wrong = (rate for rate in options.nnunet_lr or () if not 0 < rate <= 10)
    problems += [f"-nnunet_lr {rate:g} must be above 0 and at most 10" for rate in wrong]
    return problems


def _contradictions(options: argparse.Namespace, num_arms: int) -> Iterator[str]:
    """Options that do not go together."""
    if num_arms < 2 and not options.dry_run:
        yield (
            "there are fewer than two arms to compare; give -pretrained_weights CKPT (also several), --from_scratch, "
            "--nnunet"
        )
    yield from _uneven_tuning(options)
    if options.own_schedules and options.schedule is not None:
        yield f"-schedule {options.schedule} is one for all arms, --own_schedules is not; leave one of them out"
    if options.schedule == "decoder_only" and options.from_scratch:
        yield "-schedule decoder_only keeps the encoder of --from_scratch random; leave one of them out"
    if options.probe and options.nnunet:
        yield "--probe scores pretrained features, which --nnunet has none of; leave one of them out"
    if options.probe and (in_vain := list(_without_effect_on_a_probe(options))):
        yield f"{' and '.join(in_vain)}: --probe trains nothing but the classifier; leave out"
    if options.jobs is not None and options.jobs < len(options.gpus):
        yield (
            f"-jobs {options.jobs} leaves some of the {len(options.gpus)} -gpus without a run; give fewer GPUs or more "
            f"jobs"
        )
    if options.gpus and options.device not in (None, "cuda"):
        yield f"-gpus needs -device cuda, not {options.device}"


def _without_effect_on_a_probe(options: argparse.Namespace) -> Iterator[str]:
    for name in ("initial_lr", "own_schedules", "keep_weights", "disable_tta"):
        if getattr(options, name):
            yield f"{'-' if name == 'initial_lr' else '--'}{name}"
    settings = (name for name in given(options, FinetuningSettings) if name not in (*_OWN_OPTION, *_OF_THE_TRANSFER))
    yield from (flag_of(FinetuningSettings, name) for name in settings)


def _uneven_tuning(options: argparse.Namespace) -> Iterator[str]:
    """Learning rates by which arms would not be tuned alike, and options that have none to choose from."""
    rates, of_nnunet = len(set(options.initial_lr or [None])), len(set(options.nnunet_lr or [None]))
    if options.nnunet and rates != of_nnunet:
        yield (
            f"-initial_lr gives {rates} learning rate{'s' * (rates > 1)} to choose from, -nnunet_lr {of_nnunet}; give "
            f"as many to nnU-Net's trainer, so that every arm is tuned with the same effort"
        )
    if options.nnunet_lr and not options.nnunet:
        yield "-nnunet_lr is for --nnunet, which is not given; leave it out"
    if options.tuning_seeds > 1 and rates == 1:
        yield f"-tuning_seeds {options.tuning_seeds}: one learning rate is not chosen; give several, or leave it out"


def _problems_of_settings(settings: dict[str, Any], rates: tuple[float, ...]) -> list[str]:
    found: dict[str, None] = {}
    for rate in rates:
        try:
            read_settings(FinetuningSettings, {**settings, "initial_lr": rate}, "The settings of the runs")
        except SettingsError as error:
            found |= dict.fromkeys(f"{flag_of(FinetuningSettings, p.split()[0])}: {p}" for p in error.problems)
    return list(found)


def _planning_options(options: argparse.Namespace) -> tuple[str, ...]:
    words: list[str] = []
    for name in ("network", "batch_size", "ct_intensities"):
        if getattr(options, name) is not None:
            words += [f"-{name}", str(getattr(options, name))]
    for name in ("features_per_stage", "patch_size", "spacing"):
        if getattr(options, name):
            words += [f"-{name}", *map(str, getattr(options, name))]
    return tuple(words)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="misfm_compare",
        description="Find out whether pretraining helps on a dataset. Each arm is trained with the same plans "
        "(nnU-Net's arm keeps its own), batches, iterations and labelled cases and tested on the same test cases; a "
        "page with the answer is written. If it was stopped, the same command continues it. More arms, seeds and "
        "numbers of labelled cases may be added later.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="ID or name of a dataset that nnU-Net has planned and preprocessed")
    add("-c", default="3d_fullres", metavar="CONFIG", help="name of a 3D configuration (default: 3d_fullres)")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="the dataset's plans to start from (default: nnUNetPlans)")
    add("-o", metavar="FOLDER", help="folder for all results (default: ./misfm_compare_DATASET)")
    _add_arms(parser)
    _add_terms(parser)
    _add_place_and_plans(parser)
    add_setting_options(
        parser,
        "the runs, the same for all arms (-schedule is poly unless it or --own_schedules is given)",
        FinetuningSettings,
        *_OWN_OPTION,
    )
    return parser


def _add_arms(parser: argparse.ArgumentParser) -> None:
    arms = parser.add_argument_group("the arms")
    arms.add_argument(
        "-pretrained_weights",
        nargs="+",
        default=[],
        metavar="[NAME=]CKPT",
        help="add an arm for each checkpoint, which may be any that misfm_plan takes; NAME is what the page calls it",
    )
    arms.add_argument("--from_scratch", action="store_true", help="add an arm with the same network and random weights")
    arms.add_argument("--nnunet", action="store_true", help="add an arm with nnU-Net's own trainer and network")
    arms.add_argument(
        "--probe",
        action="store_true",
        help="instead of fine-tuning, fit a linear classifier to the frozen features of each network, which takes "
        "minutes",
    )


def _add_terms(parser: argparse.ArgumentParser) -> None:
    terms = parser.add_argument_group("on which terms")
    _add_cases(terms)
    _add_rates(terms)


def _add_cases(terms: argparse._ActionsContainer) -> None:
    terms.add_argument(
        "-num_labelled",
        nargs="+",
        default=[ALL],
        metavar="N",
        help="how many labelled cases to train with (patients, with -patients), or all; several numbers are compared "
        "in turn (default: all)",
    )
    terms.add_argument(
        "-seeds", type=int, default=5, metavar="N", help="how often labelled cases are drawn anew (default: 5)"
    )
    terms.add_argument(
        "-first_seed",
        type=int,
        default=0,
        metavar="N",
        help="number of the first draw; a higher one repeats a comparison with fresh draws (default: 0)",
    )
    terms.add_argument(
        "-patients",
        metavar="REGEX",
        help=r"regular expression that finds the patient in the name of a case, such as 'patient\d+'",
    )
    terms.add_argument(
        "-num_test", type=int, metavar="N", help="number of cases (patients) to test on (default: 30 %% of all)"
    )
    terms.add_argument(
        "-num_validation",
        type=int,
        metavar="N",
        help="number of cases (patients) for learning curves and the choice of learning rates (default: 15 %% of all)",
    )


def _add_rates(terms: argparse._ActionsContainer) -> None:
    terms.add_argument(
        "-initial_lr",
        nargs="+",
        type=float,
        metavar="LR",
        help="one learning rate for all arms (default: 1e-3), or several, of which each arm gets the one that is best "
        "for it on the validation cases",
    )
    terms.add_argument(
        "-nnunet_lr",
        nargs="+",
        type=float,
        metavar="LR",
        help="one or several learning rates for --nnunet, whose SGD needs others (default: nnU-Net's 1e-2)",
    )
    terms.add_argument(
        "--own_schedules",
        action="store_true",
        help="train each arm with the schedule that misfm_plan gives it, sawtooth with weights and poly from scratch, "
        "instead of one schedule for all",
    )
    terms.add_argument(
        "-tuning_seeds",
        type=int,
        default=1,
        metavar="N",
        help="how many draws to choose learning rates with (default: 1)",
    )


def _add_place_and_plans(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where and how")
    where.add_argument(
        "-device",
        choices=("cuda", "cpu", "mps"),
        help="where to train (default: cuda if there is a usable GPU, otherwise cpu)",
    )
    where.add_argument(
        "-gpus",
        nargs="+",
        default=[],
        metavar="N",
        help="GPUs that runs take turns on, counted from 0 (default: the first)",
    )
    where.add_argument(
        "-jobs", type=int, metavar="N", help="how many runs train at once (default: one on each of -gpus, otherwise 1)"
    )
    where.add_argument(
        "-np", type=int, default=2, metavar="N", help="number of processes, if data are preprocessed (default: 2)"
    )
    where.add_argument("--disable_tta", action="store_true", help="predict without mirroring, eight times as fast")
    where.add_argument("--keep_weights", action="store_true", help="do not delete the weights of finished runs")
    where.add_argument(
        "--dry_run", action="store_true", help="say which cases would be tested, and make nothing; needs no arms"
    )
    plan = parser.add_argument_group("plans, as in misfm_plan")
    plan.add_argument(
        "-network",
        choices=[*NETWORKS, "plan", "pretrained"],
        help="network of all arms but --nnunet (default: the checkpoint's)",
    )
    add_planning_options(plan)
    plan.set_defaults(spacing=None, ct_intensities=None)  # misfm_plan's own, unless they are given
