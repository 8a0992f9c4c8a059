"""What misfm_pretrain is asked for: its options, read and checked together."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY
from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.commands.setting_options import add_setting_options, flag_of, given
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS, PretrainingSettings
from nnunetv2_misfm.pool.settings import DECIDED_BY_PLANS, PoolSettings
from nnunetv2_misfm.pool.share import BUNDLES
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.tasks import task_classes

DEFAULT_PLANS_NAME = "nnUNetPlans"
DEFAULT_TASK = next(iter(PRETEXT_TASKS))


@dataclass(frozen=True)
class PretrainOptions:
    """The request of a user. What is None or missing from the mappings was left open.

    Attributes:
        dataset: ID or name, of the pool that is made or of the dataset whose arrays are used.
        folders: of bare volumes; empty to use what is preprocessed.
        pool_name: the name in DatasetXXX_NAME.
        plans_from: ID or name of the dataset whose plans a pool is made by.
        base_plans: name of the plans to start from.
        plans_name: of the plans that are written.
        pretext: a name of `PRETEXT_TASKS`.
        network: a name of `NETWORKS`, or "plan".
        arch_kwargs: constructor arguments of the network; None takes an earlier plan's one back.
        pool, run, augmentation: settings by name; of the volumes, the run and the augmentation.
        of_tasks: settings by name, for every pretext task.
    """

    dataset: str
    configuration: str
    folders: tuple[Path, ...]
    pool_name: str | None
    plans_from: str | None
    base_plans: str | None
    plans_name: str | None
    pretext: str | None
    network: str | None
    arch_kwargs: Mapping[str, Any]
    patch_size: tuple[int, int, int] | None
    batch_size: int | None
    pool: Mapping[str, Any]
    run: Mapping[str, Any]
    augmentation: Mapping[str, Any]
    of_tasks: Mapping[str, Mapping[str, Any]]
    device: str
    num_gpus: int
    num_processes: int
    num_parts: int
    part_id: int
    only_prepare: bool
    only_inspect: bool
    dry_run: bool
    continue_training: bool
    overwrite: bool


def read_options(arguments: list[str] | None, under_torchrun: bool) -> PretrainOptions:
    """Read the command line.

    Args:
        arguments: instead of the program's own.
        under_torchrun: whether this is one of several processes that train together.

    Raises:
        PlanError: naming all combinations of options that make no sense.
    """
    options = _parser().parse_args(arguments)
    problems = [
        *_problems_of_data(options),
        *_problems_of_parts(options),
        *_problems_of_run(options, under_torchrun),
    ]
    if problems:
        raise PlanError("; ".join(problems) + ".")
    network = {"features_per_stage": options.features_per_stage} if options.features_per_stage else {}
    if options.stems is not None:
        network["stems"] = list(DEGREES_OF_ANISOTROPY) if options.stems == "all" else None
    return PretrainOptions(
        dataset=options.d,
        configuration=options.c,
        folders=tuple(Path(folder) for folder in options.i or ()),
        pool_name=options.n,
        plans_from=options.plans_from,
        base_plans=options.p,
        plans_name=options.overwrite_plans_name,
        pretext=options.pretext,
        network=options.network,
        arch_kwargs=network,
        patch_size=tuple(options.patch_size) if options.patch_size else None,
        batch_size=options.batch_size,
        pool=given(options, PoolSettings),
        run=given(options, PretrainingSettings),
        augmentation=given(options, AugmentSettings),
        of_tasks={kind.name: given(options, kind.Settings) for kind in task_classes()},
        device=options.device,
        num_gpus=options.num_gpus,
        num_processes=options.np,
        num_parts=options.num_parts or 1,
        part_id=options.part_id or 0,
        only_prepare=options.only_prepare or options.only_inspect or options.num_parts is not None,
        only_inspect=options.only_inspect,
        dry_run=options.dry_run,
        continue_training=options.continue_training,
        overwrite=options.overwrite,
    )


def _problems_of_data(options: argparse.Namespace) -> Iterator[str]:
    yield from _problems_of_volumes(options) if options.i else _in_vain_without_volumes(options)
    decided = [flag_of(PoolSettings, name) for name in given(options, PoolSettings) if name in DECIDED_BY_PLANS]
    if options.plans_from and decided:
        yield f"-plans_from: those plans decide {', '.join(decided)}; leave {'it' if len(decided) == 1 else 'them'} out"
    if options.np < 1:
        yield f"-np {options.np} must be at least 1"


def _in_vain_without_volumes(options: argparse.Namespace) -> Iterator[str]:
    of_volumes = [flag_of(PoolSettings, name) for name in given(options, PoolSettings)]
    if named := [*of_volumes, *(["-n"] if options.n else [])]:
        yield f"{', '.join(named)}: these describe volumes; they need -i"
    if options.plans_from:
        yield "-plans_from needs volumes (-i)"


def _problems_of_volumes(options: argparse.Namespace) -> Iterator[str]:
    if "" in options.i:
        yield "-i is empty; give a folder (if it is a variable of the shell, it is not set)"
    if options.d.startswith("Dataset"):
        if options.n:
            yield f"-d {options.d} is the whole name of the dataset; leave -n {options.n} out, or give its number only"
    elif options.n is None and not options.continue_training:
        yield "-i needs -n NAME, the name of the pool's dataset"


def _problems_of_parts(options: argparse.Namespace) -> Iterator[str]:
    for flag, chosen in (
        ("-num_parts", options.num_parts is not None),
        ("--only_inspect", options.only_inspect),
        ("--dry_run", options.dry_run),
    ):
        if chosen and not options.i:
            yield f"{flag} is about the preparation of volumes; it needs -i"
    if (options.num_parts is None) != (options.part_id is None):
        yield "-num_parts (how many) and -part_id (which one, from 0) belong together; give both"
    elif options.num_parts is not None and not 0 <= options.part_id < options.num_parts <= BUNDLES:
        yield (
            f"-num_parts {options.num_parts} -part_id {options.part_id}: there are 1 to {BUNDLES} parts, and -part_id "
            f"counts from 0 to one less than -num_parts"
        )
    if options.dry_run and options.num_parts is not None:
        yield "--dry_run is about all parts together; leave -num_parts and -part_id out"


def _problems_of_run(options: argparse.Namespace, under_torchrun: bool) -> Iterator[str]:
    if options.continue_training and options.overwrite:
        yield "--c continues a run and --overwrite starts anew; choose one"
    if options.stems == "all" and options.network not in (None, "pctnet"):
        yield f"-stems all is for PCT-Net, not for -network {options.network}"
    if options.num_gpus < 1:
        yield f"-num_gpus {options.num_gpus} must be at least 1"
    if options.num_gpus > 1 and options.device != "cuda":
        yield f"-num_gpus {options.num_gpus} needs -device cuda"
    if under_torchrun and options.num_gpus > 1:
        yield "-num_gpus starts processes itself; leave it out under torchrun (--nproc_per_node)"
    if under_torchrun and (options.only_prepare or options.only_inspect or options.dry_run or options.num_parts):
        yield "--only_prepare, --only_inspect, --dry_run and -num_parts need no torchrun; run them as misfm_pretrain"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="misfm_pretrain",
        description="Pretrain a network with a pretext task on bare volumes (-i), or on a dataset that nnU-Net has "
        "preprocessed (no -i). Labels are never used.",
        epilog="An option that is not given stays as the plans that are replaced or started from (-p) have it, if they "
        "are for the task; otherwise it has its default. The log says which. Options of the pool must be given again "
        "whenever -i is.",
    )
    _add_data(parser)
    _add_network(parser)
    _add_work(parser)
    add_setting_options(parser, "how volumes become a pool (with -i)", PoolSettings)
    add_setting_options(
        parser, f"the run (defaults of {DEFAULT_TASK}; other tasks have some of their own)", PretrainingSettings
    )
    for kind in task_classes():
        add_setting_options(parser, kind.title, kind.Settings)
    add_setting_options(
        parser, "augmentation of the crops; a range is given by its lowest and its highest value", AugmentSettings
    )
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="ID or name of the dataset; with -i, of the pool that is made")
    add("-i", action="append", metavar="FOLDER", help="folder of volumes; may be given several times")
    add("-n", metavar="NAME", help="name of the pool that is made (with -i)")
    add(
        "-plans_from",
        metavar="ID",
        help="prepare the volumes (-i) as this dataset is planned: with its spacing, normalisation and patch size, and "
        "with its network if misfm_plan or misfm_pretrain chose it",
    )
    add("-p", metavar="PLANS", help=f"name of the plans to start from (default: {DEFAULT_PLANS_NAME})")
    add("-c", default="3d_fullres", metavar="CONFIG", help="name of the configuration (default: 3d_fullres)")
    add("-overwrite_plans_name", metavar="NAME", help="name to give the plans that are written")


def _add_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-pretext",
        choices=tuple(PRETEXT_TASKS),
        help=f"pretext task (default: that of earlier plans of the same name, otherwise {DEFAULT_TASK})",
    )
    add(
        "-network",
        choices=[*NETWORKS, "plan"],
        help="network to pretrain; plan takes the one of nnU-Net's plans (default: that of plans which this package "
        "wrote, otherwise pctnet)",
    )
    add("-features_per_stage", nargs=5, type=int, metavar="N", help="channels of the network's five stages")
    add(
        "-stems",
        choices=("all", "plan"),
        help="which stems of PCT-Net to train: the one for the spacing of the plans (plan, the default), or all "
        "three in turn, for targets of any spacing (all)",
    )
    add("-patch_size", nargs=3, type=int, metavar="N", help="patch size in plans axis order")
    add(
        "-batch_size",
        type=int,
        metavar="N",
        help="batch size (default: that of the plans, or 4 for a new pool; more if the patches are small)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="where to train (default: cuda)")
    add("-num_gpus", type=int, default=1, metavar="N", help="number of GPUs of this machine to train on (default: 1)")
    add("-np", type=int, default=2, metavar="N", help="number of processes that prepare volumes (default: 2)")
    add(
        "-num_parts", type=int, metavar="N", help="divide the volumes into so many parts, prepare one of them, and stop"
    )
    add("-part_id", type=int, metavar="N", help="which of the parts to prepare, counted from 0 (with -num_parts)")
    add("--only_prepare", action="store_true", help="prepare the pool, then stop without training")
    add(
        "--only_inspect",
        action="store_true",
        help="read the headers, plan the pool, and stop; with -num_parts, for one part of the volumes",
    )
    add("--dry_run", action="store_true", help="estimate from a sample what preparing will cost, and keep nothing")
    add("--c", dest="continue_training", action="store_true", help="continue the run from its latest checkpoint")
    add(
        "--overwrite",
        action="store_true",
        help="start anew; the files of an earlier run are moved into a folder earlier_N there, and can be deleted",
    )
