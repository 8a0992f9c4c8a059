"""misfm_plan: from a pretrained checkpoint and a dataset of nnU-Net to the plans of a fine-tuning."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.commands.devices import usable_gpus
from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.commands.setting_options import add_setting_options, given
from nnunetv2_misfm.errors import PlanError, UserError, exit_with_message
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import (
    channel_names,
    check_channels,
    check_labels,
    check_replaceable,
    configuration_3d,
)
from nnunetv2_misfm.plans.compare import is_complete, what_changes
from nnunetv2_misfm.plans.files import dataset_number, folds, preprocessed_dataset, read_dataset_json, read_plans
from nnunetv2_misfm.plans.network_entry import ENCODER, NETWORKS, STEM
from nnunetv2_misfm.plans.run_settings import (
    DEFAULT_BASELINE_PLANS,
    DEFAULT_FINETUNING_PLANS,
    PRETEXT_TASKS,
    SCHEDULE_WITH_WEIGHTS,
    SEGMENTATION,
    FinetuningSettings,
)
from nnunetv2_misfm.plans.settings import read_settings
from nnunetv2_misfm.transfer.report import FRESH

if TYPE_CHECKING:
    from nnunetv2_misfm.checkpoints.source import Source
    from nnunetv2_misfm.transfer.planning import PlanRequest
    from nnunetv2_misfm.transfer.report import TransferReport

_FEW_ITERATIONS = 2000


def plan_main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_plan."""
    exit_with_message("misfm_plan", lambda: plan(arguments))


def plan(arguments: list[str] | None = None) -> None:
    """Write the plans file and provide its data.

    Args:
        arguments: of the command.

    Raises:
        UserError: for everything in the options, the dataset or the checkpoint that cannot be used.
    """
    options = _parser().parse_args(arguments)
    # nnU-Net takes seconds to import; --help and wrong flags should not wait for it.
    from nnunetv2_misfm.checkpoints.source import read_source
    from nnunetv2_misfm.transfer.memory_target import fit_to_memory
    from nnunetv2_misfm.transfer.planning import finetuning_plans, pin_trainer

    _check(options)
    target = TargetDataset(options)
    source = read_source(options.pretrained_weights) if options.pretrained_weights else None
    request = target.request(options, source)
    plans, remarks = finetuning_plans(target.base, request, source)
    remarks += _about_the_weights(request, source)
    if options.gpu_memory_target is not None:
        for name in request.configurations:
            sizes = fit_to_memory(plans, name, target.dataset_json, options.gpu_memory_target)
            remarks.append(sizes)
    remarks += target.remarks_on_fit(plans, request, source)
    if target.replaced is not None:
        remarks += what_changes(target.path, target.replaced, plans, options.c)
    pin_trainer(plans)
    write_json(plans, target.path)
    for remark in remarks:
        print(f"Note: {remark}")
    for hint in _hints(options, request):
        print(f"Hint: {hint}")
    print(f"Plans {'written' if target.replaced is None else 'replaced'}: {target.path}")
    if not options.no_pp:
        target.provide_data(plans, options.np)
    for name in options.c if options.no_pp else ():
        print(f"Preprocess with: nnUNetv2_preprocess -d {options.d} -plans_name {target.plans_name} -c {name}")
    print("Train with:")
    for command in target.training_commands(plans):
        print(f"  {command}")
    if not usable_gpus():
        print("There is no usable GPU here: to train on this machine, add -device cpu.")


class TargetDataset:
    """The labelled dataset, its plans, and those that are to be written beside them."""

    def __init__(self, options: argparse.Namespace):
        from nnunetv2_misfm.transfer.planning import check_is_new_name

        self.configurations: list[str] = options.c
        self.folder = preprocessed_dataset(options.d)
        self.base = read_plans(self.folder, options.p, options.c)
        self.dataset_json = read_dataset_json(self.folder)
        check_labels(self.dataset_json, self.folder / "dataset.json")
        for name in (one for one in self.configurations if one in self.base["configurations"]):
            check_channels(self.base, name, self.dataset_json)
        # A name of its own: under one name the baseline would train in the results folder of the fine-tuned run.
        default_name = DEFAULT_BASELINE_PLANS if options.from_scratch else DEFAULT_FINETUNING_PLANS
        self.plans_name = options.overwrite_plans_name or default_name
        check_is_new_name(self.plans_name, self.base)
        self.path = self.folder / f"{self.plans_name}.json"
        self.replaced = check_replaceable(self.path, SEGMENTATION, options.c)

    def request(self, options: argparse.Namespace, source: Source | None) -> PlanRequest:
        """What the options ask for."""
        from nnunetv2_misfm.transfer.planning import PlanRequest

        scratch = options.from_scratch or source is None
        settings = {**({} if scratch else {"schedule": SCHEDULE_WITH_WEIGHTS}), **given(options, FinetuningSettings)}
        return PlanRequest(
            plans_name=self.plans_name,
            configurations=tuple(options.c),
            network=options.network,
            settings=read_settings(FinetuningSettings, settings, "The run settings"),
            arch_kwargs={"features_per_stage": options.features_per_stage} if options.features_per_stage else {},
            spacing=_spacing(options.spacing),
            ct_intensities=options.ct_intensities,
            patch_size=tuple(options.patch_size) if options.patch_size else None,
            batch_size=options.batch_size,
            from_scratch=scratch,
            kept=self._kept(),
            channels=channel_names(self.dataset_json),
            dataset=options.d,
        )

    def _kept(self) -> dict[str, Any]:
        """Configurations of the plans that are replaced which stay: planned before, or added by their owner."""
        there = {} if self.replaced is None else self.replaced["configurations"]
        own = [name for name in self.configurations if name in there and name not in self.base["configurations"]]
        if own:
            raise PlanError(
                f"{', '.join(own)} cannot be planned from {self.base['plans_name']}, which has no such configuration. "
                f"It was added to {self.path} and stays there whatever is planned: leave it out of -c."
            )
        return {name: entry for name, entry in there.items() if name not in self.configurations}

    def remarks_on_fit(self, plans: Mapping[str, Any], request: PlanRequest, source: Source | None) -> Iterator[str]:
        """Build the planned networks, which says what is wrong with one before anything is written.

        Returns:
            Remarks on what the weights give them, and on configurations that stay and start from the same weights now.

        Raises:
            UserError: if a network cannot be built, or the weights do not fit it.
        """
        from nnunetv2_misfm.transfer.planning import check_fit

        for name in request.configurations:
            report = check_fit(plans, name, self.dataset_json, source)
            _check_frozen(request, name, report)
            if report is not None and not request.from_scratch:
                yield from (*report.notes, f"{name}: the weights give {report.share()}.")
        for name in request.kept:
            if source is not None and not request.from_scratch and is_complete(plans, name):
                entry = configuration_3d(plans, name)
                try:
                    check_fit({**plans, "configurations": {name: entry}}, name, self.dataset_json, source)
                except UserError as error:
                    yield f"{name}, which stays, cannot start from these weights; plan it under another name. {error}"

    def provide_data(self, plans: Mapping[str, Any], num_processes: int) -> None:
        """Link or preprocess the arrays of the new plans, and say which."""
        from nnunetv2_misfm.transfer.arrays import provide_data

        for name in self.configurations:
            print(provide_data(self.folder, plans, self.base, name, num_processes))

    def training_commands(self, plans: Mapping[str, Any]) -> Iterator[str]:
        """One for each configuration; the next stage of a cascade needs predictions of all cases, so of all folds."""
        there = folds(self.folder, self.dataset_json["numTraining"])
        number = dataset_number(self.folder.name)
        for name in self.configurations:
            for fold in there if plans["configurations"][name].get("next_stage") else there[:1]:
                yield f"nnUNetv2_train {int(number)} {name} {fold} -tr MisFMTrainer -p {self.plans_name}"


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.np < 1:
        problems.append(f"-np {options.np} must be at least 1")
    if options.gpu_memory_target is not None and (options.patch_size or options.batch_size):
        problems.append("-gpu_memory_target chooses patch and batch size; leave -patch_size and -batch_size out")
    if problems:
        raise PlanError("; ".join(problems) + ".")


def _check_frozen(request: PlanRequest, name: str, report: TransferReport | None) -> None:
    """Raise a PlanError if an encoder that never trains would be random, all of it or a layer."""
    if request.settings.schedule != "decoder_only":
        return
    if report is None or request.from_scratch:
        raise PlanError("-schedule decoder_only keeps the encoder as it is, which is random without weights.")
    encoder = [entry for entry in report.entries if entry.part in (STEM, ENCODER)]
    if not encoder:
        raise PlanError("-schedule decoder_only needs a network that names its encoder (docs/own_networks.md).")
    fresh = [entry for entry in encoder if entry.status == FRESH]
    if fresh:
        raise PlanError(
            f"{name}: -schedule decoder_only keeps the encoder as it is, but {len(fresh)} of its parameters would be "
            f"random, such as {fresh[0].name} ({fresh[0].reason}). Choose another -schedule."
        )


def _about_the_weights(request: PlanRequest, source: Source | None) -> Iterator[str]:
    """Remarks on what the weights can be expected to do."""
    from nnunetv2_misfm.checkpoints.shrunk_weights import shrunk_weights
    from nnunetv2_misfm.pretrain.tasks import too_short

    if source is None or request.from_scratch:
        return
    yield from source.notes
    told = source.info
    if told is not None and told.task in PRETEXT_TASKS:
        epochs, iterations = (told.training.get(name) for name in ("epochs_done", "num_iterations_per_epoch"))
        if isinstance(epochs, int) and isinstance(iterations, int):
            yield from filter(None, [too_short(told.task, epochs * iterations)])
    if (shrunk := shrunk_weights(source.weights)) is not None:
        yield f"{source.path} starts from zero in {shrunk}: weight decay has shrunk its weights to nothing."


def _hints(options: argparse.Namespace, request: PlanRequest) -> Iterator[str]:
    """What options could do better for a run of this length."""
    if request.from_scratch:
        return
    iterations = request.settings.num_epochs * request.settings.num_iterations_per_epoch
    if iterations <= _FEW_ITERATIONS and options.initial_lr is None:
        usual = FinetuningSettings().num_epochs * FinetuningSettings().num_iterations_per_epoch
        yield (
            f"{iterations} iterations are few for the default learning rate, which is for {usual:,}; in studies with "
            f"300 to 2,000 iterations -initial_lr 3e-3 or 5e-3 did best."
        )


def _spacing(words: list[str]) -> str | tuple[float, float, float]:
    if words in (["dataset"], ["pretrained"]):
        return words[0]
    try:
        x, y, z = (float(word) for word in words)
    except ValueError:
        raise PlanError(f"-spacing {' '.join(words)} is neither dataset, pretrained nor three numbers in mm.") from None
    return x, y, z


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="misfm_plan",
        description="Write the plans for fine-tuning pretrained weights on an nnU-Net dataset, or for the baseline "
        "that starts from scratch. Plans of the same name are replaced, and options that are not given have their "
        "defaults again. It ends with the command that trains.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="ID or name of the dataset")
    add(
        "-c",
        nargs="+",
        default=["3d_fullres"],
        metavar="CONFIG",
        help="one or more 3D configurations (default: 3d_fullres)",
    )
    add("-p", default="nnUNetPlans", metavar="PLANS", help="the dataset's plans to start from (default: nnUNetPlans)")
    add(
        "-pretrained_weights",
        metavar="CKPT",
        help="checkpoint of misfm_pretrain, nnU-Net (v2 or v1) or nnssl, or a published MIS-FM file; it may also be "
        "hf:OWNER/NAME or an address on the Hugging Face Hub",
    )
    add(
        "--from_scratch",
        action="store_true",
        help="plan the fair baseline: the same network and data without the weights",
    )
    add(
        "-overwrite_plans_name",
        metavar="NAME",
        help=f"name of the new plans (default: {DEFAULT_FINETUNING_PLANS}; with --from_scratch "
        f"{DEFAULT_BASELINE_PLANS})",
    )
    add(
        "-network",
        choices=[*NETWORKS, "plan", "pretrained"],
        help="the network to train: pctnet, fmunet, that of the dataset's plans (plan), or that of the checkpoint "
        "with all its stages (pretrained); by default the checkpoint's if it is PCT-Net or FMUNet, plan if it is one "
        "of nnU-Net's, and pctnet without a checkpoint",
    )
    add_planning_options(parser)
    add(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="choose the patch and batch size that need this much GPU memory",
    )
    add("-np", type=int, default=2, metavar="N", help="number of processes, if data are preprocessed (default: 2)")
    add("--no_pp", action="store_true", help="write the plans only; nnUNetv2_preprocess can preprocess later")
    add_setting_options(parser, "the run", FinetuningSettings)
    return parser


def add_planning_options(group: argparse._ActionsContainer) -> None:
    """Options that misfm_compare has too, for all its arms."""
    add = group.add_argument
    add("-features_per_stage", nargs=5, type=int, metavar="N", help="channels of the network's five stages")
    add(
        "-spacing",
        nargs="+",
        default=["dataset"],
        metavar="MM",
        help="spacing to resample to: dataset (the default), pretrained (the checkpoint's), or three numbers in mm, "
        "slice axis first, as in nnU-Net's -overwrite_target_spacing",
    )
    add(
        "-ct_intensities",
        choices=("pretrained", "dataset"),
        default="pretrained",
        help="clip and scale CT as pretraining did (pretrained, the default), or as the dataset's plans do (dataset)",
    )
    add("-patch_size", nargs=3, type=int, metavar="N", help="patch size in plans axis order (default: the plan's)")
    add("-batch_size", type=int, metavar="N", help="batch size (default: the plan's)")
