"""misfm_pretrain: from bare volumes, or a dataset nnU-Net has preprocessed, to a pretrained checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY
from nnunetv2_misfm.commands.earlier_run import EarlierRun, check_device, run_folder
from nnunetv2_misfm.commands.processes import Processes
from nnunetv2_misfm.commands.setting_options import add_setting_options, flag_of, given
from nnunetv2_misfm.cpu_threads import keep_cores_free
from nnunetv2_misfm.errors import PlanError, exit_with_message
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import build_on_meta, check_plans_name, check_replaceable
from nnunetv2_misfm.plans.files import (
    nnunet_folder,
    preprocessed_cases,
    preprocessed_dataset,
    read_dataset_json,
    read_plans,
)
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.plans.run_settings import BLOCK, PretrainingSettings, without_groups
from nnunetv2_misfm.plans.settings import read_settings
from nnunetv2_misfm.pool.settings import PoolSettings
from nnunetv2_misfm.pretrain.settings import AugmentSettings, FusionSettings

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.planning import RunRequest

DEFAULT_PLANS_NAME = "nnUNetPlans"
DERIVED_PLANS_NAME = "nnUNetMisFMPretrainPlans"
BOX_OPTIONS = ("num_boxes", "box_size_min", "box_size_max")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_pretrain."""
    options = _parser().parse_args(arguments)
    options.only_prepare |= options.num_parts is not None
    keep_cores_free()
    exit_with_message("misfm_pretrain", lambda: pretrain(options))


def pretrain(options: argparse.Namespace) -> None:
    """Prepare the data if volumes were given, plan, and train.

    Raises:
        UserError: for everything in the options, folders or plans that cannot be used.
    """
    processes = Processes()
    _check(options, processes)
    nnunet_folder("nnUNet_results")
    if not options.only_prepare:
        check_device(options.device, max(options.num_gpus, processes.on_this_machine))
    planned = processes.first_does(lambda: prepare(options))
    if planned is None:
        return
    dataset_name, plans_name = planned
    # nnU-Net and torch take seconds to import; --help and wrong flags should not wait for them.
    from nnunetv2_misfm.commands.launch import launch

    with processes.training(options.device):
        launch(dataset_name, plans_name, options.c, options.device, options.num_gpus, options.continue_training)
    if processes.rank == 0:
        checkpoint = run_folder(dataset_name, plans_name, options.c) / "checkpoint_final.pth"
        print(f"Pretrained weights: {checkpoint}")
        weights = quote(str(checkpoint))
        print(f"Plan a fine-tuning with: misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights {weights}")


def prepare(options: argparse.Namespace) -> tuple[str, str] | None:
    """Prepare the data and write the plans; dataset and plans to train, or None if there is nothing to train now.

    Raises:
        UserError: for everything in the options, folders or plans that cannot be used.
    """
    from nnunetv2_misfm.pretrain.planning import enough_samples

    plans = _from_volumes(options) if options.i else _from_preprocessed(options)
    if plans is None:
        return None
    if options.only_prepare:
        print(f"Train with: misfm_pretrain -d {plans['dataset_name']} -p {plans['plans_name']} -c {options.c}")
        return None
    entry = plans["configurations"][options.c]
    enough = enough_samples(entry["architecture"], entry["patch_size"])
    if entry["batch_size"] < enough:
        print(
            f"Batch size {entry['batch_size']} leaves BatchNorm few values in the deepest feature map of patch size "
            f"{entry['patch_size']}; the weights help fine-tuning more with -batch_size {enough}."
        )
    run = EarlierRun(run_folder(plans["dataset_name"], plans["plans_name"], options.c))
    if options.overwrite:
        run.delete()
    elif options.continue_training and run.is_finished(plans):
        print(f"{run.folder} is finished; give a larger -num_epochs to go on.")
        return None
    return plans["dataset_name"], plans["plans_name"]


def _from_volumes(options: argparse.Namespace) -> dict[str, Any] | None:
    """Prepare the pool; None if there is nothing to train yet because other parts are still to be prepared."""
    from nnunetv2_misfm.pool.plan import adopt_plans, existing_plans, find_geometry
    from nnunetv2_misfm.pool.prepare import check_usable, inspect_volumes, plan_pool, prepare_pool
    from nnunetv2_misfm.pretrain.planning import new_pool_entry, run_plans

    source = (
        read_plans(preprocessed_dataset(options.plans_from), options.p or DEFAULT_PLANS_NAME, [options.c])
        if options.plans_from
        else None
    )
    plans_name = options.overwrite_plans_name or options.p or DEFAULT_PLANS_NAME
    dataset_name = _pool_dataset_name(options)
    check_plans_name(plans_name)
    names = (dataset_name, plans_name, options.c)
    run = _earlier_run(dataset_name, plans_name, options)
    before = existing_plans(dataset_name, plans_name)
    request = _request(options, before)
    settings = read_settings(PoolSettings, given(options, PoolSettings), "The pool's settings")
    inspection = inspect_volumes(options.i, settings, options.np)
    check_usable(inspection, dataset_name, plans_name)
    print(inspection.summary())
    if source is not None:
        adopted = adopt_plans(source, options.c, *names, settings, source.get(BLOCK, {}))
        plans = run_plans(adopted, options.c, plans_name, dataset_name, request)
    else:
        geometry = find_geometry(inspection, settings, *names)
        entry, patch_size, batch_size = new_pool_entry(geometry.spacing, geometry.median_shape, request)
        plans = plan_pool(inspection, settings, geometry, *names, patch_size, batch_size, entry, request.block())
    if before is not None and options.c in before["configurations"]:
        # What the options leave open stays as the pool's plans have it.
        planned, now = before["configurations"][options.c], plans["configurations"][options.c]
        open_options = {
            "architecture": not (options.network or options.features_per_stage or options.stems),
            "patch_size": options.patch_size is None,
            "batch_size": options.batch_size is None,
        }
        now.update({key: planned[key] for key, is_open in open_options.items() if is_open})
    build_on_meta(plans["configurations"][options.c]["architecture"], 1, request.fusion.num_fusion_classes)
    if options.continue_training:
        run.check_same(plans, options.c)
    report = prepare_pool(inspection, plans, options.c, options.np, options.num_parts or 1, options.part_id or 0)
    print(report.summary())
    return report.plans if report.complete else None


def _pool_dataset_name(options: argparse.Namespace) -> str:
    if options.d.startswith("Dataset"):
        return str(options.d)
    if not options.d.isdecimal() or not 0 < int(options.d) < 1000:
        raise PlanError(f"-d {options.d} is not a dataset ID; use a number from 1 to 999.")
    return f"Dataset{int(options.d):03d}_{options.n}" if options.n else preprocessed_dataset(options.d).name


def _from_preprocessed(options: argparse.Namespace) -> dict[str, Any]:
    """Plans for a pool that is prepared already, or for a dataset nnU-Net has preprocessed, whose data is shared."""
    from nnunetv2_misfm.pretrain.planning import run_plans

    dataset_folder = preprocessed_dataset(options.d)
    base = read_plans(dataset_folder, options.p or DEFAULT_PLANS_NAME, [options.c])
    if base.get(BLOCK, {}).get("task") == PretrainingSettings.TASK:
        plans_name = options.overwrite_plans_name or base["plans_name"]
    else:
        plans_name = options.overwrite_plans_name or DERIVED_PLANS_NAME
    check_plans_name(plans_name)
    is_pool = read_dataset_json(dataset_folder).get("misfm_pool", False)
    if is_pool and not (dataset_folder / "dataset_fingerprint.json").is_file():
        raise PlanError(
            f"The pool {dataset_folder} is not complete: volumes are still to be prepared. Give their folders with -i "
            f"again; what is prepared already is kept."
        )
    run = _earlier_run(dataset_folder.name, plans_name, options)
    path = dataset_folder / f"{plans_name}.json"
    existing = check_replaceable(path, PretrainingSettings.TASK, [options.c])
    if options.continue_training and existing is not None and options.c in existing["configurations"]:
        base = existing
    plans = run_plans(base, options.c, plans_name, dataset_folder.name, _request(options, base))
    if options.continue_training:
        run.check_same(plans, options.c)
    if existing is not None:
        # Runs of other configurations under the same name need their entries to be continued.
        plans["configurations"] = {**existing["configurations"], **plans["configurations"]}
    data = dataset_folder / plans["configurations"][options.c]["data_identifier"]
    if not preprocessed_cases(data):
        raise PlanError(
            f"{data} holds no preprocessed cases. Run nnUNetv2_preprocess -d {options.d} -plans_name "
            f"{base['plans_name']} -c {options.c} first, or give volumes with -i."
        )
    write_json(plans, path)
    return plans


def _request(options: argparse.Namespace, base: Mapping[str, Any] | None) -> RunRequest:
    """What the options ask for; what they leave open comes from the pool's own plans, then from the defaults."""
    from nnunetv2_misfm.pretrain.planning import RunRequest

    block = (base or {}).get(BLOCK, {})
    before = block if block.get("task") == PretrainingSettings.TASK else {}
    run = {**without_groups(before), **given(options, PretrainingSettings)}
    fusion = {**before.get("fusion", {}), **given(options, FusionSettings)}
    augmentation = {**before.get("augmentation", {}), **given(options, AugmentSettings)}
    boxes = [f"-{name}" for name in BOX_OPTIONS if getattr(options, name) is not None]
    if boxes and fusion.get("geometry") == "blocks":
        raise PlanError(f"{' and '.join(boxes)}: blocks are no boxes. Leave out, or choose -geometry boxes.")
    arguments: dict[str, Any] = {}
    if options.features_per_stage:
        arguments["features_per_stage"] = options.features_per_stage
    if options.stems == "all":
        arguments["stems"] = list(DEGREES_OF_ANISOTROPY)
    elif options.stems == "plan":
        arguments["stems"] = None  # not those that an earlier plan has
    return RunRequest(
        network=options.network,
        settings=read_settings(PretrainingSettings, run, "The run settings"),
        fusion=read_settings(FusionSettings, fusion, "The Volume Fusion settings"),
        augmentation=read_settings(AugmentSettings, augmentation, "The augmentation settings"),
        arch_kwargs=arguments,
        patch_size=tuple(options.patch_size) if options.patch_size else None,
        batch_size=options.batch_size,
    )


def _earlier_run(dataset_name: str, plans_name: str, options: argparse.Namespace) -> EarlierRun:
    """What an earlier run left, checked but not touched.

    Raises:
        PlanError: if there is one and the user did not say what to do with it.
    """
    run = EarlierRun(run_folder(dataset_name, plans_name, options.c))
    if not (options.continue_training or options.only_prepare or options.overwrite):
        run.check_absent()
    return run


def _check(options: argparse.Namespace, processes: Processes) -> None:
    """Raise one error for all combinations of options that make no sense."""
    problems = []
    new_pool = options.i and not options.continue_training and not options.d.startswith("Dataset")
    if new_pool and options.n is None:
        problems.append("-i needs -n NAME, the name of the pool's dataset")
    if options.plans_from and not options.i:
        problems.append("-plans_from needs volumes (-i)")
    if options.plans_from and (options.modality or options.spacing):
        problems.append("-plans_from takes modality and spacing from those plans; leave -modality and -spacing out")
    of_volumes = [flag_of(PoolSettings, name) for name in given(options, PoolSettings)]
    of_volumes += ["-n"] if options.n is not None else []
    if not options.i and of_volumes:
        problems.append(f"{', '.join(of_volumes)}: these describe volumes; they need -i")
    if (options.num_parts is None) != (options.part_id is None):
        problems.append("-num_parts (how many) and -part_id (which one, from 0) belong together; give both")
    elif options.num_parts is not None and not 0 <= options.part_id < options.num_parts:
        problems.append(
            f"-num_parts {options.num_parts} -part_id {options.part_id}: there is at least one part, and -part_id "
            f"counts from 0 to one less than -num_parts"
        )
    if options.num_parts is not None and not options.i:
        problems.append("-num_parts shares the preparation of volumes; it needs -i")
    if options.np < 1:
        problems.append(f"-np {options.np} must be at least 1")
    if options.continue_training and options.overwrite:
        problems.append("--c continues a run and --overwrite deletes it; choose one")
    if options.stems == "all" and options.network not in (None, "pctnet"):
        problems.append(f"-stems all is for PCT-Net, not for -network {options.network}")
    if options.num_gpus < 1:
        problems.append(f"-num_gpus {options.num_gpus} must be at least 1")
    if options.num_gpus > 1 and processes.several:
        problems.append("-num_gpus starts processes itself; leave it out under torchrun (--nproc_per_node)")
    if processes.several and options.only_prepare:
        problems.append("--only_prepare and -num_parts need no torchrun; run them as misfm_pretrain")
    if options.num_gpus > 1 and options.device != "cuda":
        problems.append(f"-num_gpus {options.num_gpus} needs -device cuda")
    if problems:
        raise PlanError("; ".join(problems) + ".")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="misfm_pretrain",
        description="Pretrain a network with Volume Fusion on bare volumes (-i), or on a dataset that nnU-Net has "
        "preprocessed (no -i). Labels are never used.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="dataset ID; with -i, of the pool that is made")
    add("-i", action="append", metavar="FOLDER", help="folder of volumes; may be given several times")
    add("-n", metavar="NAME", help="name of the pool's dataset (with -i)")
    add("-plans_from", metavar="ID", help="spacing, normalisation and patch (our plans: also network) of this dataset")
    add("-p", metavar="PLANS", help=f"plans to start from (default: {DEFAULT_PLANS_NAME})")
    add("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    add("-overwrite_plans_name", metavar="NAME", help="name of the plans that are written")
    add("-network", choices=[*NETWORKS, "plan"], help="network (default: the one of plans of ours, else pctnet)")
    add("-features_per_stage", nargs=5, type=int, metavar="N", help="channels of the five stages")
    add("-stems", choices=("all", "plan"), help="PCT-Net's stems: all three in turn, or the plan's alone (default)")
    add("-patch_size", nargs=3, type=int, metavar="N", help="patch size in plans axis order")
    add("-batch_size", type=int, metavar="N", help="batch size (default: 4, or the plan's; more for small patches)")
    add("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: cuda")
    add("-num_gpus", type=int, default=1, help="GPUs of this machine (default: 1)")
    add("-np", type=int, default=2, help="processes that prepare volumes (default: 2)")
    add("-num_parts", type=int, metavar="N", help="prepare only one of so many parts of the volumes, then stop")
    add("-part_id", type=int, metavar="N", help="which part, from 0 (with -num_parts)")
    add("--only_prepare", action="store_true", help="prepare the pool and stop")
    add("--c", dest="continue_training", action="store_true", help="continue from the latest checkpoint")
    add("--overwrite", action="store_true", help="delete what an earlier run left and start anew")
    add_setting_options(parser, "how volumes become a pool (with -i)", PoolSettings)
    add_setting_options(parser, "the run", PretrainingSettings)
    add_setting_options(parser, "Volume Fusion; sizes in plans axis order", FusionSettings)
    add_setting_options(parser, "augmentation of the crops; ranges are lowest and highest", AugmentSettings)
    return parser
