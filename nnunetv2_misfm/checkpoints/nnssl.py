"""nnssl's adaptation plan, which tells what a checkpoint was pretrained with: written into ours, read from nnssl's.

Commands of nnU-Net's main branch read it to fine-tune (nnUNetv2_preprocess_like_nnssl, nnUNetv2_plan_like_dynamic,
nnUNetv2_train_pretrained). The keys are those of nnssl's `AdaptationPlan` (adaptation_planning/adaptation_plan.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_misfm.checkpoints.checkpoint import plain, preprocessing_of
from nnunetv2_misfm.plans.checks import configuration_3d

ADAPTATION = "nnssl_adaptation_plan"
"""Its place in nnssl's checkpoints and ours, beside the weights."""
ADAPTATION_FILE = "adaptation_plan.json"
"""Its file beside nnssl's checkpoints on the OpenMind pages."""
_CONFIGURATION_KEYS = ("spacing", "patch_size", "batch_size", "normalization_schemes", "use_mask_for_norm")
# Of nnssl's presets (architectures/architecture_registry.py), what no weights tell.
_PRESET_STRIDES = {
    "ResEncL": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "NoSkipResEncL": [[1, 1, 1], *[[2, 2, 2]] * 5],
}


def adaptation_plan(network: Any, plans: Mapping[str, Any], configuration: str) -> dict[str, Any] | None:
    """The block for a network that tells where its encoder and stem are, as nnU-Net's own do; None for others."""
    if not hasattr(network, "key_to_encoder"):
        return None
    planned = configuration_3d(plans, configuration)
    architecture = planned["architecture"]
    return {
        "architecture_plans": {
            "arch_class_name": architecture["network_class_name"],
            "arch_kwargs": dict(architecture["arch_kwargs"]),
            "arch_kwargs_requiring_import": list(architecture["_kw_requires_import"]),
        },
        "architecture_kwargs": dict(architecture["arch_kwargs"]),
        "pretrain_plan": {
            "dataset_name": plans["dataset_name"],
            "plans_name": plans["plans_name"],
            "transpose_forward": plans["transpose_forward"],
            "transpose_backward": plans["transpose_backward"],
            "image_reader_writer": plans["image_reader_writer"],
            "configurations": {configuration: {key: planned[key] for key in _CONFIGURATION_KEYS}},
        },
        "pretrain_num_input_channels": len(planned["normalization_schemes"]),
        "recommended_downstream_patchsize": list(planned["patch_size"]),
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": getattr(network, "key_to_lpe", None),
    }


def read_adaptation_plan(
    checkpoint: Mapping[str, Any], beside: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Constructor arguments and preprocessing from an adaptation plan; None if there is none that tells both.

    Args:
        checkpoint: the content of a file, which may hold it.
        beside: the file beside it; empty if there is none.
    """
    adaptation = checkpoint.get(ADAPTATION) or beside
    try:
        architecture, plans = adaptation["architecture_plans"], adaptation["pretrain_plan"]
        configuration = next(iter(plans["configurations"].values()))
        preset = str(architecture["arch_class_name"])
        arguments = dict(architecture.get("arch_kwargs") or {})
        if preset in _PRESET_STRIDES:
            arguments["strides"] = _PRESET_STRIDES[preset]
        return plain(arguments), plain(preprocessing_of(plans, configuration))
    except Exception:  # whatever the block of a foreign file lacks or has too much
        return None
