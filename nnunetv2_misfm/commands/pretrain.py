"""misfm_pretrain: from bare volumes, or a dataset nnU-Net has preprocessed, to a pretrained checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.commands.devices import check_device
from nnunetv2_misfm.commands.earlier_run import EarlierRun, run_folder
from nnunetv2_misfm.commands.launch import launch
from nnunetv2_misfm.commands.pretrain_options import PretrainOptions, read_options
from nnunetv2_misfm.commands.processes import Processes
from nnunetv2_misfm.cpu_threads import keep_cores_free
from nnunetv2_misfm.environment import processes_on_this_machine
from nnunetv2_misfm.errors import exit_with_message
from nnunetv2_misfm.plans.files import FINAL, nnunet_folder

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.task import PretextTask

_AXES_THAT_TELL = 2  # of three; one alone leaves voxels alike that lie in a plane
_MOSTLY_PADDING = 0.5  # a smaller share of a patch that the median volume fills is told

# nnU-Net takes seconds to import: --help and wrong options should not wait for it, so the functions below import what
# needs it.


def main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_pretrain."""
    keep_cores_free()
    exit_with_message("misfm_pretrain", lambda: pretrain(arguments))


def pretrain(arguments: list[str] | None = None) -> None:
    """Prepare the data if volumes were given, plan, and train.

    Raises:
        UserError: for everything in the options, folders or plans that cannot be used.
    """
    processes = Processes()
    options = read_options(arguments, under_torchrun=processes.several)
    nnunet_folder("nnUNet_results")
    if not (options.only_prepare or options.dry_run):
        check_device(options.device, max(options.num_gpus, processes_on_this_machine()))
    num_processes = max(options.num_gpus, processes.count)
    planned = processes.first_does(lambda: plan_and_prepare(options, num_processes))
    if planned is None:
        return
    task, dataset, plans = planned
    from nnunetv2_misfm.pretrain.tasks import task_class

    with processes.training(options.device):
        # nnU-Net finds the trainer by the name of its class; what follows is in trainers/pretraining_trainer.py.
        launch(
            task_class(task).trainer(),
            dataset,
            plans,
            options.configuration,
            options.device,
            options.num_gpus,
            options.continue_training,
        )
    if processes.rank == 0:
        weights = run_folder(task, dataset, plans, options.configuration) / FINAL
        print(f"Pretrained weights: {weights}")
        file = quote(str(weights))
        print(f"Plan a fine-tuning with: misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights {file}")
        print(f"Whether -network pretrained fits that dataset better says: misfm_inspect {file} -d DATASET_ID")


def plan_and_prepare(options: PretrainOptions, num_processes: int) -> tuple[str, str, str] | None:
    """Plan the run and provide its data.

    Args:
        options: of the command.
        num_processes: that will share each batch.

    Returns:
        The names of the task, of the dataset and of the plans to train, or None if there is nothing to train now.

    Raises:
        UserError: for everything in the options, folders or plans that cannot be used.
    """
    from nnunetv2_misfm.commands.pretrain_source import run_request, source_of
    from nnunetv2_misfm.plans.network_entry import checked_network
    from nnunetv2_misfm.trainers.distributed import check_batch_size

    source = source_of(options)
    run = EarlierRun(run_folder(source.task, source.dataset_name, source.plans_name, options.configuration))
    prepares_only = options.only_prepare or options.dry_run
    if not prepares_only:
        run.check_ready(may_exist=options.continue_training or options.overwrite)
    request = run_request(options, source.task, source.earlier)
    plans = source.plan(request)
    if plans is None:  # other parts have still to look at their volumes
        return None
    if options.num_parts == 1 or not source.earlier:  # a part leaves plans that are there as they are
        entry = plans["configurations"][options.configuration]
        channels = len(entry["normalization_schemes"])
        checked_network(entry, channels, request.pretext.task().num_outputs(channels))
        if not prepares_only:
            check_batch_size(entry["batch_size"], num_processes)
    if options.continue_training:
        # Before anything is written, by the plans of the run; the trainer looks at its checkpoint too.
        run.check_same(plans, options.configuration)
    prepared = source.provide(plans)
    if prepared is None:  # nothing was to be prepared, or other parts have still to do theirs
        return None
    if options.only_prepare:
        device = "" if options.device == "cuda" else f" -device {options.device}"
        command = f"misfm_pretrain -d {source.dataset_name} -p {source.plans_name} -c {options.configuration}{device}"
        print(f"Train with: {command}")
        return None
    print(describe_choices(options, prepared))
    if options.continue_training and run.is_finished(prepared):
        print(f"{run.folder} is finished; give a larger -num_epochs to go on.")
        return None
    return source.task, source.dataset_name, source.plans_name


def describe_choices(options: PretrainOptions, plans: Mapping[str, Any]) -> str:
    """Lines that tell what will be trained: network and sizes, what was given, and what else is not the default."""
    from nnunetv2_misfm.plans.run_settings import BLOCK
    from nnunetv2_misfm.pretrain.planning import enough_samples
    from nnunetv2_misfm.pretrain.tasks import settings_of, task_class, too_short

    entry, block = plans["configurations"][options.configuration], plans[BLOCK]
    network = entry["architecture"]["network_class_name"].rpartition(".")[2]
    features = entry["architecture"]["arch_kwargs"].get("features_per_stage")
    sizes = f"patch size {entry['patch_size']}, batch size {entry['batch_size']}"
    network += f" with {features} features" if features else ""
    lines = [f"{plans['plans_name']}: {block['task']}, {network}, {sizes}"]
    # No two settings share a name, whatever group they are in.
    asked = {**options.run, **options.of_tasks[block["task"]], **options.augmentation}
    given, kept = [], []
    settings = {name: (value, default) for _, name, value, default in settings_of(block)}
    for name, (value, default) in settings.items():
        if name in asked:
            given.append(f"{name} {value}")
        elif value != default:
            kept.append(f"{name} {value}")
    lines.append(f"Given: {', '.join(given) or 'nothing'}. Kept from earlier plans: {', '.join(kept) or 'nothing'}.")
    lines += _about_patch(entry, task_class(block["task"]))
    if few := too_short(block["task"], settings["num_epochs"][0] * settings["num_iterations_per_epoch"][0]):
        lines.append(few)
    enough = enough_samples(entry["architecture"], entry["patch_size"])
    if entry["batch_size"] < enough:
        lines.append(
            f"Batch size {entry['batch_size']} leaves BatchNorm few values in the deepest feature map of patch size "
            f"{entry['patch_size']}; the weights help fine-tuning more with -batch_size {enough}."
        )
    return "\n".join(lines)


def _about_patch(entry: Mapping[str, Any], task: type[PretextTask]) -> Iterator[str]:
    """What is to be said of a patch that is as large as the volumes; nothing where plans do not tell their size."""
    patch, median = entry["patch_size"], entry.get("median_image_size_in_voxels")
    if not median:
        return
    of_volumes = f"the median volume, {[round(n) for n in median]} voxels"
    filled = math.prod(min(1.0, most / n) for most, n in zip(median, patch, strict=True))
    if filled < _MOSTLY_PADDING:
        yield (
            f"Patch size {patch} is larger than {of_volumes}: {1 - filled:.0%} of such a patch is padding. Give a "
            f"smaller -patch_size, or leave it out for a new pool."
        )
    held = sum(most <= n for most, n in zip(median, patch, strict=True))
    if task.tells_places and held >= _AXES_THAT_TELL:
        yield (
            f"Patch size {patch} holds {of_volumes}, along {held} axes, so {task.name} can tell its voxels by how far "
            f"they are from the border. Give a smaller -patch_size."
        )
