"""misfm_plan: from a pretrained checkpoint and a dataset of nnU-Net to the plans of a fine-tuning."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError, exit_with_message
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import check_labels, check_replaceable, with_trainer
from nnunetv2_misfm.plans.files import folds, preprocessed_dataset, read_dataset_json, read_plans
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.plans.run_options import add_run_options, given
from nnunetv2_misfm.plans.run_settings import (
    DEFAULT_BASELINE_PLANS,
    DEFAULT_FINETUNING_PLANS,
    FinetuningSettings,
)
from nnunetv2_misfm.plans.settings import read_settings

_FEW_ITERATIONS = 1000
_SCHEDULES = (
    "learning rate: sawtooth, the decoder's rises while the encoder stays as it is, then that of the whole network "
    "rises and falls (default with weights); warmup, that of the whole network rises and falls; default and scratch, "
    "it falls from the start (default without weights); decoder_only, the encoder stays as it is"
)


def plan_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_plan."""
    options = _parser().parse_args(arguments)
    exit_with_message("misfm_plan", lambda: plan(options))


def plan(options: argparse.Namespace) -> None:
    """Write the plans file and provide its data.

    Raises:
        UserError: for everything in the options, the dataset or the checkpoint that cannot be used.
    """
    # nnU-Net and torch take seconds to import; --help and wrong flags should not wait for them.
    from nnunetv2_misfm.transfer.arrays import provide_data
    from nnunetv2_misfm.transfer.memory_target import fit_to_memory
    from nnunetv2_misfm.transfer.planning import PlanRequest, check_fit, check_name, finetuning_plans
    from nnunetv2_misfm.transfer.pretrained import read_source
    from nnunetv2_misfm.transfer.replaced_plans import what_changes
    from nnunetv2_misfm.transfer.shrunk_weights import shrunk_weights

    if options.np < 1:
        raise PlanError(f"-np {options.np} must be at least 1.")
    if options.gpu_memory_target is not None and (options.patch_size or options.batch_size):
        raise PlanError("-gpu_memory_target chooses patch and batch size; leave -patch_size and -batch_size out.")
    dataset_folder = preprocessed_dataset(options.d)
    base = read_plans(dataset_folder, options.p, options.c)
    dataset = read_dataset_json(dataset_folder)
    check_labels(dataset, dataset_folder / "dataset.json")
    source = read_source(options.pretrained_weights) if options.pretrained_weights else None
    scratch = options.from_scratch or source is None
    # A name of its own: under one name the baseline would train in the results folder of the fine-tuned run.
    default_name = DEFAULT_BASELINE_PLANS if options.from_scratch else DEFAULT_FINETUNING_PLANS
    plans_name = options.overwrite_plans_name or default_name
    check_name(plans_name, base)
    path = dataset_folder / f"{plans_name}.json"
    replaced = check_replaceable(path, FinetuningSettings.TASK, options.c)
    request = PlanRequest(
        plans_name=plans_name,
        configurations=tuple(options.c),
        network=options.network,
        settings=_settings(options, scratch),
        arch_kwargs={"features_per_stage": options.features_per_stage} if options.features_per_stage else {},
        spacing=_spacing(options.spacing),
        patch_size=tuple(options.patch_size) if options.patch_size else None,
        batch_size=options.batch_size,
        from_scratch=scratch,
        kept=_kept(path, replaced, options.c, base),
    )
    plans, remarks = finetuning_plans(base, request, source)
    if source is not None and not scratch and (shrunk := shrunk_weights(source.weights)) is not None:
        remarks.append(f"{source.path} starts from zero in {shrunk}: weight decay has shrunk its weights to nothing.")
    iterations = request.settings.num_epochs * request.settings.num_iterations_per_epoch
    if not scratch and iterations <= _FEW_ITERATIONS and options.initial_lr is None:
        remarks.append(
            f"{iterations} iterations are few for the default learning rate, which is for 250,000; in a study "
            f"with 300 iterations -schedule default -initial_lr 5e-3 did best."
        )
    if options.gpu_memory_target is not None:
        for name in request.configurations:
            remarks.append(fit_to_memory(plans, name, dataset, options.gpu_memory_target))
    for name in request.configurations:
        check_fit(plans, name, dataset, source)
    if replaced is not None:
        remarks += what_changes(path, replaced, plans, options.c)
    for entry in plans["configurations"].values():
        if "architecture" in entry:
            entry["architecture"] = with_trainer(entry["architecture"])
    write_json(plans, path)
    for remark in remarks:
        print(f"Note: {remark}")
    print(f"Plans {'written' if replaced is None else 'replaced'}: {path}")
    if not options.no_pp:
        for name in request.configurations:
            print(provide_data(dataset_folder, plans, base, name, options.np))
    print("Train with:")
    known = options.d if options.d.isdecimal() else dataset_folder.name
    there = folds(dataset_folder, dataset["numTraining"])
    for name in request.configurations:
        # The next stage of a cascade needs predictions of all cases.
        for fold in there if plans["configurations"][name].get("next_stage") else there[:1]:
            print(f"  nnUNetv2_train {known} {name} {fold} -tr MisFMTrainer -p {plans_name}")


def _kept(
    path: Path, replaced: Mapping[str, Any] | None, planned: Sequence[str], base: Mapping[str, Any]
) -> dict[str, Any]:
    """Configurations of the plans that are replaced which stay: planned before, or added to the file by its owner."""
    if replaced is None:
        return {}
    there = replaced["configurations"]
    own = [name for name in planned if name in there and name not in base["configurations"]]
    if own:
        raise PlanError(
            f"{', '.join(own)} cannot be planned from {base['plans_name']}, which has no such configuration. It was "
            f"added to {path} and stays there whatever is planned: leave it out of -c."
        )
    return {name: entry for name, entry in there.items() if name not in planned}


def _spacing(given: list[str]) -> str | tuple[float, float, float]:
    if given in (["dataset"], ["pretrained"]):
        return given[0]
    try:
        x, y, z = (float(value) for value in given)
    except ValueError:
        raise PlanError(f"-spacing {' '.join(given)} is neither dataset, pretrained nor three numbers in mm.") from None
    return x, y, z


def _settings(options: argparse.Namespace, scratch: bool) -> FinetuningSettings:
    values = {"schedule": "scratch" if scratch else "sawtooth", **given(options, FinetuningSettings)}
    return read_settings(FinetuningSettings, values, "The run settings")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="misfm_plan",
        description="Write the plans for fine-tuning pretrained weights on an nnU-Net dataset (or for its baseline).",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="dataset ID or name")
    add("-c", nargs="+", default=["3d_fullres"], metavar="CONFIG", help="3D configurations (default: 3d_fullres)")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="the dataset's plans to start from (default: nnUNetPlans)")
    add(
        "-pretrained_weights",
        metavar="CKPT",
        help="checkpoint of ours or nnU-Net's, a published MIS-FM .pt file, or hf:OWNER/NAME on the Hugging Face Hub",
    )
    add("--from_scratch", action="store_true", help="the same network and data without the weights: the fair baseline")
    add(
        "-overwrite_plans_name",
        metavar="NAME",
        help=f"of the new plans (default: {DEFAULT_FINETUNING_PLANS}; with --from_scratch {DEFAULT_BASELINE_PLANS})",
    )
    add(
        "-network",
        choices=[*NETWORKS, "plan"],
        help="the network to train; plan keeps the one of the dataset's plans (default: the checkpoint's, or pctnet)",
    )
    add("-features_per_stage", nargs=5, type=int, metavar="N", help="channels of the five stages")
    add(
        "-spacing",
        nargs="+",
        default=["dataset"],
        metavar="MM",
        help="dataset (default), pretrained (the checkpoint's), or three numbers in mm, in plans axis order",
    )
    add("-patch_size", nargs=3, type=int, metavar="N", help="patch size in plans axis order (default: the plan's)")
    add("-batch_size", type=int, metavar="N", help="batch size (default: the plan's)")
    add("-gpu_memory_target", type=float, metavar="GB", help="choose patch and batch size for this much memory")
    add_run_options(parser, FinetuningSettings, _SCHEDULES)
    add(
        "-layer_decay",
        type=float,
        metavar="F",
        help="learning rate of each encoder stage as a share of the next (default: 1)",
    )
    add(
        "-seg_layers_lr_factor",
        type=float,
        metavar="F",
        help="learning rate of the segmentation layers as a multiple of the decoder's (default: 1)",
    )
    add("-min_coverage", type=float, help="share of the network that the weights must cover (default: 1)")
    add("--encoder_only", action="store_const", const=True, help="leave the decoder fresh")
    add("--mix_input_channels", action="store_const", const=True, help="mix the weights' input channels to fit others")
    add("-np", type=int, default=2, help="processes for preprocessing, if that is needed (default: 2)")
    add("--no_pp", action="store_true", help="write the plans only, preprocess later with nnUNetv2_preprocess")
    return parser
