"""misfm_import_checkpoint, misfm_export_checkpoint and misfm_inspect: what can be done with a checkpoint alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from nnunetv2_misfm.errors import PlanError, exit_with_message


def import_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_import_checkpoint."""
    parser = argparse.ArgumentParser(
        prog="misfm_import_checkpoint",
        description="Turn a published MIS-FM file, such as pctnet_ct10k_volf.pt, into a checkpoint of this package.",
    )
    parser.add_argument("-i", required=True, metavar="FILE.pt", help="the published file")
    parser.add_argument("-o", required=True, metavar="FILE.pth", help="the checkpoint to write")
    parser.add_argument(
        "-resolution_mode",
        choices=("0", "1", "2", "all"),
        default="all",
        help="which of PCT-Net's three stems to keep: the degree of anisotropy they are for (default: all)",
    )
    options = parser.parse_args(arguments)
    exit_with_message("misfm_import_checkpoint", lambda: import_checkpoint(options))


def import_checkpoint(options: argparse.Namespace) -> None:
    """Convert a published file.

    Raises:
        UserError: if the file cannot be used or the target exists.
    """
    from nnunetv2_misfm.transfer.networks import import_published

    target = _new_path(options.o)
    stems = (0, 1, 2) if options.resolution_mode == "all" else (int(options.resolution_mode),)
    info = import_published(Path(options.i), target, stems)
    name = info.network_class_name.rpartition(".")[2]
    print(f"{target}: {name}, {info.input_channels} input channel(s), {info.num_classes} classes, {info.arch_kwargs}")


def export_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_export_checkpoint."""
    parser = argparse.ArgumentParser(
        prog="misfm_export_checkpoint",
        description="Write the weights of a checkpoint and what they are as safetensors, with a model card: a folder "
        "that can be uploaded to the Hugging Face Hub (hf upload OWNER/NAME FOLDER) and used as hf:OWNER/NAME.",
    )
    parser.add_argument("-i", required=True, metavar="CKPT", help="checkpoint of ours, or a published MIS-FM file")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="the folder to write; it must not exist")
    parser.add_argument("-license", metavar="NAME", help="licence for the model card, such as apache-2.0")
    options = parser.parse_args(arguments)
    exit_with_message("misfm_export_checkpoint", lambda: export_checkpoint(options))


def export_checkpoint(options: argparse.Namespace) -> None:
    """Write model.safetensors and README.md.

    Raises:
        UserError: if the checkpoint cannot be used or the folder exists.
    """
    from nnunetv2_misfm.transfer.model_card import export

    folder = _new_path(options.o)
    export(options.i, folder, options.license)
    print(f"{folder} holds model.safetensors and README.md. Upload it with: hf upload OWNER/NAME {quote(str(folder))}")
    weights = quote(str(folder / "model.safetensors"))
    print(f"Use it with: misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights {weights}")


def inspect_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_inspect."""
    parser = argparse.ArgumentParser(
        prog="misfm_inspect",
        description="Show what a checkpoint is and how it was made, without running code from it; with -d, also how it "
        "would transfer to a dataset.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="file or hf:OWNER/NAME")
    add("-d", metavar="ID", help="dataset ID or name")
    add("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="the dataset's plans (default: nnUNetPlans)")
    add("-network", choices=("pctnet", "fmunet", "plan"), help="as in misfm_plan")
    add("--encoder_only", action="store_const", const=True, help="as in misfm_plan")
    add("--mix_input_channels", action="store_const", const=True, help="as in misfm_plan")
    options = parser.parse_args(arguments)
    exit_with_message("misfm_inspect", lambda: inspect(options))


def inspect(options: argparse.Namespace) -> None:
    """Print a checkpoint's description and, for a dataset, what a transfer would do.

    Raises:
        UserError: if the checkpoint or the dataset cannot be used.
    """
    from nnunetv2_misfm.commands.setting_options import given
    from nnunetv2_misfm.plans.files import preprocessed_dataset, read_dataset_json, read_plans
    from nnunetv2_misfm.plans.run_settings import FinetuningSettings
    from nnunetv2_misfm.plans.settings import read_settings
    from nnunetv2_misfm.transfer.inspection import describe
    from nnunetv2_misfm.transfer.planning import PlanRequest, check_fit, finetuning_plans
    from nnunetv2_misfm.transfer.pretrained import read_source

    source = read_source(options.checkpoint)
    print(describe(source))
    if options.d is None:
        return
    folder = preprocessed_dataset(options.d)
    base = read_plans(folder, options.p, [options.c])
    request = PlanRequest(
        plans_name="misfm_inspect",
        configurations=_with_earlier_stages(base, options.c),
        network=options.network,
        settings=read_settings(FinetuningSettings, given(options, FinetuningSettings), "The run settings"),
    )
    plans, remarks = finetuning_plans(base, request, source)
    dataset = read_dataset_json(folder)
    report = check_fit(plans, options.c, dataset, source, min_coverage=0.0)
    assert report is not None
    print(f"\nTransfer to {folder.name}, {options.c} of {options.p}:")
    print(report.table())
    for remark in remarks:
        print(f"Note: {remark}")
    check_fit(plans, options.c, dataset, source)
    print("misfm_plan would accept it.")


def _with_earlier_stages(plans: Mapping[str, Any], configuration: str) -> tuple[str, ...]:
    """A configuration, and before it the one whose predictions it needs."""
    earlier = plans["configurations"].get(configuration, {}).get("previous_stage")
    return (configuration,) if not isinstance(earlier, str) else (earlier, configuration)


def _new_path(given: str) -> Path:
    path = Path(given)
    if path.exists():
        raise PlanError(f"{path} exists. Choose another name with -o, or remove it.")
    if not path.resolve().parent.is_dir():
        raise PlanError(f"The folder of {path} does not exist. Make it, or choose another name with -o.")
    return path
