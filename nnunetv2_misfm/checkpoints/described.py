"""What checkpoints of other projects say about themselves: nnU-Net's plans, nnssl's adaptation plan, the weights.

Nothing that is missing or malformed in a foreign file is an error here: then it is not known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nnunetv2_misfm.checkpoints.checkpoint import CHANNEL_NAMES, CheckpointInfo, plain, preprocessing_of
from nnunetv2_misfm.checkpoints.foreign import GENERIC_UNET_CLASS, RESIDUAL_UNET
from nnunetv2_misfm.checkpoints.nnssl import read_adaptation_plan
from nnunetv2_misfm.checkpoints.unet_weights import told_unet
from nnunetv2_misfm.plans.checks import INTENSITIES, WINDOW, channel_names, with_present_names
from nnunetv2_misfm.plans.network_entry import PLAIN_UNET, UNET_ARGUMENTS
from nnunetv2_misfm.plans.settings import is_number


def describe_unet(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], beside: Mapping[str, Any]
) -> CheckpointInfo | None:
    """The description of a foreign checkpoint with one of nnU-Net's U-Nets; None if its weights are not of one.

    What the weights tell, such as a norm that a trainer replaced, wins over the plans.

    Args:
        checkpoint: the file's content.
        weights: each under the first of its names.
        beside: nnssl's adaptation plan, which lies beside the file; empty if there is none.
    """
    told = told_unet(weights)
    if told is None:
        return None
    arguments = told.arch_kwargs
    nnunet, nnssl = _nnunet(checkpoint), read_adaptation_plan(checkpoint, beside)
    planned, preprocessing = nnunet or nnssl or ({}, {})
    lengths = {"strides": arguments["n_stages"], "n_conv_per_stage_decoder": arguments["n_stages"] - 1}
    # Trainers may build another kind of U-Net than their plans name.
    of_the_other_kind = {"n_conv_per_stage", "n_blocks_per_stage"} - set(arguments)
    planned = {
        name: value
        for name, value in planned.items()
        if name not in of_the_other_kind
        and (not isinstance(value, (list, tuple)) or len(value) == lengths.get(name, len(value)))
    }
    usual_convolutions = 1 if told.network_class_name == RESIDUAL_UNET else 2
    usual = {**UNET_ARGUMENTS, "n_conv_per_stage_decoder": [usual_convolutions] * (arguments["n_stages"] - 1)}
    arguments = {**usual, **planned, **arguments}
    trainer = str(checkpoint.get("trainer_name") or beside.get("trainer_name") or "")
    task = "segmentation" if nnunet is not None else "pretraining" if nnssl is not None else told.task
    training: dict[str, Any] = {"trainer": trainer} if trainer else {}
    epochs = checkpoint.get("current_epoch", checkpoint.get("epoch"))
    if isinstance(epochs, int):
        training["epochs_done"] = epochs
    return replace(told, task=task, arch_kwargs=arguments, preprocessing=well_formed(preprocessing), training=training)


def is_complete_unet(info: CheckpointInfo) -> bool:
    """Whether a checkpoint describes a U-Net of nnU-Net's wholly, so that `-network pretrained` can plan it."""
    return info.network_class_name in (PLAIN_UNET, RESIDUAL_UNET, GENERIC_UNET_CLASS) and "strides" in info.arch_kwargs


def told_preprocessing(checkpoint: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """What a foreign checkpoint, whatever network it holds, tells of the images that it was trained on.

    Args:
        checkpoint: the file's content.
        beside: nnssl's adaptation plan, which lies beside the file; empty if there is none.
    """
    return well_formed((_nnunet(checkpoint) or read_adaptation_plan(checkpoint, beside) or ({}, {}))[1])


def channels_of_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the image channels that a checkpoint of nnU-Net's layout was trained on, as far as it tells."""
    exported = checkpoint.get(CHANNEL_NAMES)
    if isinstance(exported, (list, tuple)):
        return tuple(str(name) for name in exported)
    made_by = checkpoint.get("init_args")
    return channel_names(made_by.get("dataset_json")) if isinstance(made_by, Mapping) else ()


def how_well_learnt(checkpoint: Mapping[str, Any]) -> str:
    """The last and the best score of a training, from nnU-Net's log of it; empty if there is none."""
    log, curves = checkpoint.get("logging"), checkpoint.get("plot_stuff")
    scores = log.get("mean_fg_dice") if isinstance(log, Mapping) else None
    if isinstance(curves, (list, tuple)) and len(curves) == 4:  # nnU-Net v1: three losses, then the score
        scores = curves[3]
    if not isinstance(scores, (list, tuple)) or not scores:
        return ""
    try:
        last, best = float(scores[-1]), max(float(score) for score in scores)
    except (TypeError, ValueError):
        return ""
    return f"score (nnU-Net's pseudo Dice) {last:.3f} in the last of {len(scores)} epochs, {best:.3f} at best"


def _nnunet(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Constructor arguments and preprocessing from nnU-Net's `init_args`, whose plans may be of the old format."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # takes seconds

    made_by = checkpoint.get("init_args")
    try:
        plans = with_present_names(dict(made_by["plans"]))  # type: ignore[index]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of old plans
            configuration = PlansManager(plans).get_configuration(made_by["configuration"]).configuration  # type: ignore[index]
        arguments = dict(configuration["architecture"]["arch_kwargs"])
    except Exception:  # whatever a foreign file makes nnU-Net stumble over
        return None
    return plain(arguments), plain(preprocessing_of(plans, configuration))


def well_formed(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan's preprocessing is of the kind that it should be."""
    known = {key: value for key, value in preprocessing.items() if _IS_WELL_FORMED.get(key, bool)(value)}
    windows = preprocessing.get(INTENSITIES)
    if isinstance(windows, Mapping):
        known[INTENSITIES] = {
            str(channel): window
            for channel, window in windows.items()
            if isinstance(window, Mapping) and all(is_number(window.get(name)) for name in WINDOW)
        }
    return known


def _is_list(value: object, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(of, value))


_IS_WELL_FORMED: dict[str, Callable[[Any], bool]] = {
    "spacing": lambda value: _is_list(value, lambda mm: is_number(mm) and mm > 0),
    "patch_size": lambda value: _is_list(value, is_number),
    "normalization_schemes": lambda value: _is_list(value, lambda scheme: isinstance(scheme, str)),
    "use_mask_for_norm": lambda value: _is_list(value, lambda one: isinstance(one, bool)),
    "transpose_forward": lambda value: _is_list(value, is_number) and sorted(value) == list(range(len(value))),
    INTENSITIES: lambda value: False,  # looked at one by one
}
