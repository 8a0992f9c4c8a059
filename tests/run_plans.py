"""Plans of a pretraining run, with just what its checks and comparisons read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def run_plans(block: Mapping[str, Any]) -> dict[str, Any]:
    """Plans whose `misfm` block is `block`."""
    architecture = {"network_class_name": "a.Net", "arch_kwargs": {}, "_kw_requires_import": []}
    configuration = {
        "architecture": architecture,
        "patch_size": [8, 8, 8],
        "batch_size": 2,
        "spacing": [1, 1, 1],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }
    window = {"mean": 100.0, "std": 80.0, "percentile_00_5": 10.0, "percentile_99_5": 350.0}
    return {
        "dataset_name": "Dataset001_A",
        "plans_name": "P",
        "transpose_forward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "foreground_intensity_properties_per_channel": {"0": window},
        "configurations": {"3d_fullres": configuration},
        "misfm": dict(block),
    }
