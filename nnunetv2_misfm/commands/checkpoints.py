"""misfm_import_checkpoint, misfm_export_checkpoint and misfm_inspect: what can be done with a checkpoint alone."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY
from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.errors import PlanError, UserError, exit_with_message
from nnunetv2_misfm.plans.network_entry import NETWORKS

if TYPE_CHECKING:
    from nnunetv2_misfm.checkpoints.source import Source
    from nnunetv2_misfm.transfer.planning import PlanRequest
    from nnunetv2_misfm.transfer.report import TransferReport


def import_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_import_checkpoint."""
    parser = CommandParser(
        prog="misfm_import_checkpoint",
        description="Write a published MIS-FM file, such as pctnet_ct10k_volf.pt, as a checkpoint of this package with "
        "all or one of its stems: to share it, or for nnU-Net's own -pretrained_weights. misfm_plan, misfm_inspect and "
        "load_network take the published file as it is.",
    )
    parser.add_argument("-i", required=True, metavar="FILE.pt", help="the published file")
    parser.add_argument("-o", required=True, metavar="FILE.pth", help="the checkpoint to write")
    parser.add_argument(
        "-resolution_mode",
        choices=("0", "1", "2", "all"),
        default="all",
        help="which of PCT-Net's three stems to keep, by the degree of anisotropy that it is for (default: all)",
    )
    options = parser.parse_args(arguments)
    exit_with_message("misfm_import_checkpoint", lambda: import_checkpoint(options))


def import_checkpoint(options: argparse.Namespace) -> None:
    """Convert a published file.

    Raises:
        UserError: if the file cannot be used or the target exists.
    """
    from nnunetv2_misfm.checkpoints.published_weights import import_published

    target = _new_path(options.o)
    if target.suffix == ".safetensors":
        raise PlanError(f"{target}: call it .pth, as a file of PyTorch's. misfm_export_checkpoint writes safetensors.")
    stems = DEGREES_OF_ANISOTROPY if options.resolution_mode == "all" else (int(options.resolution_mode),)
    info = import_published(Path(options.i), target, stems)
    name = info.network_class_name.rpartition(".")[2]
    print(f"{target}: {name}, {info.input_channels} input channel(s), {info.num_classes} classes, {info.arch_kwargs}")


def export_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_export_checkpoint."""
    parser = CommandParser(
        prog="misfm_export_checkpoint",
        description="Write the weights of a checkpoint and what they are as safetensors, with a model card: a folder "
        "that can be uploaded to the Hugging Face Hub (hf upload OWNER/NAME FOLDER) and used as hf:OWNER/NAME.",
    )
    parser.add_argument("-i", required=True, metavar="CKPT", help="checkpoint of a network of ours or of nnU-Net's")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="the folder to write; it must not exist")
    parser.add_argument("-license", metavar="NAME", help="licence for the model card, such as apache-2.0")
    options = parser.parse_args(arguments)
    exit_with_message("misfm_export_checkpoint", lambda: export_checkpoint(options))


def export_checkpoint(options: argparse.Namespace) -> None:
    """Write model.safetensors and README.md.

    Raises:
        UserError: if the checkpoint cannot be used or the folder exists.
    """
    from nnunetv2_misfm.checkpoints.inspection import export

    folder = _new_path(options.o)
    network_options = export(options.i, folder, options.license)
    upload = f"hf upload OWNER/NAME {shlex.quote(str(folder))}"
    print(f"{folder} holds model.safetensors and README.md. Upload it with: {upload}")
    weights = shlex.quote(str(folder / "model.safetensors"))
    print(f"Use it with: misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights {weights}{network_options}")


def inspect_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_inspect."""
    parser = CommandParser(
        prog="misfm_inspect",
        description="Show what a checkpoint is and how it was made, without running code from it; with -d, also how it "
        "would transfer to a dataset, and the command that uses most of it.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="file, hf:OWNER/NAME or an address on the Hugging Face Hub")
    add("-d", metavar="ID", help="ID or name of a dataset that would use the checkpoint")
    add("-c", default="3d_fullres", metavar="CONFIG", help="name of the configuration (default: 3d_fullres)")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="name of the dataset's plans (default: nnUNetPlans)")
    add("-network", choices=[*NETWORKS, "plan", "pretrained"], help="as in misfm_plan")
    add("--encoder_only", action="store_const", const=True, help="as in misfm_plan")
    add("--mix_input_channels", action="store_const", const=True, help="as in misfm_plan")
    options = parser.parse_args(arguments)
    exit_with_message("misfm_inspect", lambda: inspect(options))


def inspect(options: argparse.Namespace) -> None:
    """Print a checkpoint's description and, for a dataset, what a transfer would do.

    Raises:
        UserError: if the checkpoint or the dataset cannot be used.
    """
    from nnunetv2_misfm.checkpoints.inspection import describe
    from nnunetv2_misfm.checkpoints.source import read_source
    from nnunetv2_misfm.plans.files import preprocessed_dataset

    source = read_source(options.checkpoint)
    print(describe(source))
    if options.d is None:
        return
    folder = preprocessed_dataset(options.d)
    attempts = list(_attempts(options, folder, source))
    asked_for, best = attempts[0], max(attempts, key=lambda attempt: (attempt.share, attempt.share_of_source))
    if best.report is None:  # of none, so all have an error
        assert asked_for.error is not None
        raise asked_for.error
    if best is not asked_for and asked_for.report is not None:
        print(f"\nWith the options given, the weights give {asked_for.report.share()}.")
    elif best is not asked_for:
        print(f"\nWith the options given: {str(asked_for.error).splitlines()[0].removesuffix(' First mismatches:')}")
    print(f"\nTransfer to {folder.name}, {options.c} of {options.p}{' with ' if best.options else ''}", end="")
    print(f"{' '.join(best.options)}:\n{best.report.table()}")
    for remark in best.remarks:
        print(f"Note: {remark}")
    print(f"The weights give {best.report.share()}. Use them with:\n  {best.command(options)}")


@dataclass(frozen=True)
class Attempt:
    """A way to use a checkpoint for a dataset.

    Attributes:
        options: of misfm_plan, as it takes them.
        configurations: that are planned together, the earlier stage of a cascade too.
        report: what the transfer would do; None if it is not possible.
        remarks: on the plans.
        error: why it is not possible.
    """

    options: tuple[str, ...]
    configurations: tuple[str, ...]
    report: TransferReport | None = None
    remarks: tuple[str, ...] = ()
    error: UserError | None = None

    @property
    def share(self) -> float:
        """Of what the checkpoint can be expected to give."""
        return -1.0 if self.report is None else self.report.coverage(self.report.expected)

    @property
    def share_of_source(self) -> float:
        """Of the checkpoint that is used, in whole percent."""
        return 0.0 if self.report is None else round(self.report.share_of_source(), 2)

    def command(self, options: argparse.Namespace) -> str:
        """The misfm_plan that does it."""
        plans = [] if options.p == "nnUNetPlans" else ["-p", options.p]
        partial = [] if self.share == 1 else ["-min_coverage", f"{math.floor(1000 * self.share) / 1000:g}"]
        weights = ["-pretrained_weights", options.checkpoint]
        dataset = ["-d", options.d, "-c", *self.configurations]
        return shlex.join(["misfm_plan", *dataset, *plans, *weights, *self.options, *partial])


def _attempts(options: argparse.Namespace, folder: Path, source: Source) -> Iterator[Attempt]:
    """What was asked for, then what else may use more of the checkpoint."""
    from nnunetv2_misfm.plans.files import read_dataset_json, read_plans
    from nnunetv2_misfm.transfer.planning import check_fit, finetuning_plans

    base, dataset = read_plans(folder, options.p, [options.c]), read_dataset_json(folder)
    networks = [options.network] if options.network else [None, "pretrained"]
    for mixed in [options.mix_input_channels] if options.mix_input_channels else [None, True]:
        for network in networks:
            given = ["-network", network] if network else []
            given += ["--encoder_only"] if options.encoder_only else []
            given += ["--mix_input_channels"] if mixed else []
            request = _request(options, base, dataset, network, mixed)
            try:
                plans, remarks = finetuning_plans(base, request, source)
                report = check_fit(plans, options.c, dataset, source, min_coverage=0.0)
            except UserError as error:
                yield Attempt(tuple(given), request.configurations, error=error)
            else:
                yield Attempt(tuple(given), request.configurations, report, tuple(remarks))


def _request(
    options: argparse.Namespace,
    base: Mapping[str, Any],
    dataset: Mapping[str, Any],
    network: str | None,
    mix_input_channels: bool | None,
) -> PlanRequest:
    from nnunetv2_misfm.commands.setting_options import given
    from nnunetv2_misfm.plans.checks import channel_names
    from nnunetv2_misfm.plans.run_settings import FinetuningSettings
    from nnunetv2_misfm.plans.settings import read_settings
    from nnunetv2_misfm.transfer.planning import PlanRequest

    settings = given(options, FinetuningSettings)
    if mix_input_channels:
        settings["mix_input_channels"] = True
    return PlanRequest(
        plans_name="misfm_inspect",
        configurations=_with_earlier_stages(base, options.c),
        network=network,
        settings=read_settings(FinetuningSettings, settings, "The run settings"),
        channels=channel_names(dataset),
        dataset=options.d,
    )


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
