"""The `nnssl_adaptation_plan` of a checkpoint, which nnU-Net's main branch reads to fine-tune it.

Its commands nnUNetv2_preprocess_like_nnssl, nnUNetv2_plan_like_dynamic and nnUNetv2_train_pretrained know it; the keys
are those of nnssl's `AdaptationPlan` (adaptation_planning/adaptation_plan.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_misfm.plans.checks import configuration_3d

_CONFIGURATION_KEYS = ("spacing", "patch_size", "batch_size", "normalization_schemes", "use_mask_for_norm")


def nnssl_adaptation_plan(network: Any, plans: Mapping[str, Any], configuration: str) -> dict[str, Any] | None:
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
