"""Sources by targets: what arrives of each kind of checkpoint in each kind of dataset, through plans of ours.

`pytest -m matrix -s` prints the table. The published files are read from the numerical reference where it is at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_misfm.checkpoints.checkpoint import WEIGHTS, CheckpointInfo, write_checkpoint
from nnunetv2_misfm.checkpoints.source import Source, read_source
from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.plans.network_entry import architecture_entry
from nnunetv2_misfm.plans.run_settings import FinetuningSettings
from nnunetv2_misfm.pretrain.planning import plain_unet_entry
from nnunetv2_misfm.transfer.planning import PlanRequest, check_fit, finetuning_plans
from nnunetv2_misfm.transfer.transfer import TransferReport

pytestmark = pytest.mark.matrix
FEATURES = [4, 4, 8, 16, 32]
PARTS = ("stem", "encoder", "decoder", "segmentation layers")


def unet(spacing: tuple[float, ...], patch: tuple[int, ...], residual: bool = False, width: int = 4) -> dict[str, Any]:
    """nnU-Net's network for a dataset, narrow."""
    entry = plain_unet_entry(spacing, patch)
    arguments = entry["arch_kwargs"]
    arguments["features_per_stage"] = [min(40, width * 2**i) for i in range(arguments["n_stages"])]
    if residual:
        entry["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        arguments["n_blocks_per_stage"] = [1, 2, 2, 2, 2, 2, 2][: arguments["n_stages"]]
        arguments["n_conv_per_stage_decoder"] = [1] * (arguments["n_stages"] - 1)
        del arguments["n_conv_per_stage"]
    return entry


@dataclass(frozen=True)
class Target:
    """A dataset and the network nnU-Net planned for it."""

    channels: int
    classes: int
    patch: tuple[int, int, int]
    spacing: tuple[float, float, float]
    residual: bool = False


TARGETS = {
    "CT 1 ch, 2 classes, 40x56x40": Target(1, 2, (40, 56, 40), (1, 1, 1)),
    "MR 3 ch, 9 classes, 40x56x40": Target(3, 9, (40, 56, 40), (1, 1, 1)),
    "MR 1 ch, 9 classes, 28x192x160": Target(1, 9, (28, 192, 160), (5, 0.7, 0.7)),
    "MR 3 ch, 2 classes, 64x128x128": Target(3, 2, (64, 128, 128), (2, 1, 1)),
    "CT 1 ch, 9 classes, 64x128x128": Target(1, 9, (64, 128, 128), (1, 1, 1)),
    "CT 1 ch, 2 classes, ResEnc": Target(1, 2, (64, 128, 128), (1, 1, 1), residual=True),
    "MR 2 ch, 2 classes, 16x64x64": Target(2, 2, (16, 64, 64), (4, 1, 1)),
}


def target_plans(target: Target) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dataset's plans and dataset.json."""
    scheme = "CTNormalization" if target.channels == 1 else "ZScoreNormalization"
    window = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 1000.0}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(target.patch),
        "spacing": list(target.spacing),
        "normalization_schemes": [scheme] * target.channels,
        "use_mask_for_norm": [False] * target.channels,
        "architecture": unet(target.spacing, target.patch, target.residual),
    }
    plans = {
        "dataset_name": "Dataset007_Target",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): dict(window) for i in range(target.channels)},
        "configurations": {"3d_fullres": configuration},
    }
    labels = {"background": 0} | {f"organ_{i}": i for i in range(1, target.classes)}
    return plans, {"channel_names": {str(i): "x" for i in range(target.channels)}, "labels": labels}


def write_source(folder: Path, name: str, entry: Mapping[str, Any], channels: int = 1, modality: str = "CT") -> Source:
    """A checkpoint as misfm_pretrain leaves it, with random weights."""
    network = get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], channels, 5, allow_init=False
    )
    info = CheckpointInfo(
        task="volume_fusion",
        network_class_name=entry["network_class_name"],
        arch_kwargs=dict(entry["arch_kwargs"]),
        input_channels=channels,
        num_classes=5,
        preprocessing={
            "patch_size": [64, 128, 128],
            "normalization_schemes": [f"{modality}Normalization"] * channels,
            "foreground_intensity_properties_per_channel": {
                "0": {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 1000.0}
            },
        },
        training={},
    )
    path = folder / f"{name.replace(' ', '_')}.pth"
    write_checkpoint({WEIGHTS: network.state_dict()}, info, path)
    return read_source(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sources")
    isotropic, patch = (1.0, 1.0, 1.0), (64, 128, 128)
    kinds: dict[str, tuple[dict[str, Any], int, str]] = {
        "PCTNet, stem 1": (architecture_entry("pctnet", 1, features_per_stage=FEATURES), 1, "CT"),
        "PCTNet, all stems": (architecture_entry("pctnet", 0, features_per_stage=FEATURES, stems=[0, 1, 2]), 1, "CT"),
        "PCTNet, CT and MR pool": (architecture_entry("pctnet", 0, features_per_stage=FEATURES), 1, "ZScore"),
        "PCTNet, 3 channels": (architecture_entry("pctnet", 0, features_per_stage=FEATURES), 3, "ZScore"),
        "FMUNet": (architecture_entry("fmunet", 1, features_per_stage=FEATURES), 1, "CT"),
        "PlainConvUNet": (unet(isotropic, patch), 1, "CT"),
        "ResEnc": (unet(isotropic, patch, residual=True), 1, "CT"),
    }
    found = {name: write_source(folder, name, *kind) for name, kind in kinds.items()}
    reference = Path(os.environ.get("MISFM_REFERENCE") or Path(__file__).parents[3] / "shared" / "reference")
    for name in ("pctnet_small_mode1", "fmunet_small_mode0"):
        if (reference / f"{name}.pt").is_file():
            found[f"published {name.split('_')[0]}.pt"] = read_source(reference / f"{name}.pt")
    return found


def outcome(source: Source, target: Target) -> TransferReport | str:
    """What misfm_plan makes of a source and a dataset: the account of the transfer, or the refusal."""
    plans, dataset = target_plans(target)
    settings = FinetuningSettings(schedule="sawtooth")
    request = PlanRequest("nnUNetMisFMPlans", ("3d_fullres",), None, settings)
    try:
        finetuning, _ = finetuning_plans(plans, request, source)
        json.dumps(finetuning)
        report = check_fit(finetuning, "3d_fullres", dataset, source)
    except UserError as error:
        return str(error)
    assert report is not None
    return report


def expected_to_fit(source: str, target: Target) -> bool:
    if source == "PCTNet, 3 channels":
        return target.channels in (1, 3) and target.channels != 1
    if source in ("PlainConvUNet", "ResEnc"):
        return target.residual == (source == "ResEnc")
    return True


def test_matrix(sources: dict[str, Source]) -> None:
    print(f"\n{'source':<24}{'target':<32}{'stem':>8}{'encoder':>9}{'decoder':>9}{'seg':>6}  adapted")
    wrong = []
    for source_name, source in sources.items():
        for target_name, target in TARGETS.items():
            result = outcome(source, target)
            if isinstance(result, str):
                print(f"{source_name:<24}{target_name:<32}refused: {result.splitlines()[0][:110]}")
                if expected_to_fit(source_name, target) or "Traceback" in result or len(result) < 40:
                    wrong.append((source_name, target_name, result))
                continue
            shares = [result.coverage([part]) for part in PARTS]
            adapted = {entry.reason for entry in result.entries if entry.status == "adapted"}
            print(
                f"{source_name:<24}{target_name:<32}"
                + "".join(f"{100 * share:>{width}.1f}" for share, width in zip(shares, (8, 9, 9, 6), strict=True))
                + f"  {'; '.join(sorted(adapted))[:90]}"
            )
            if not expected_to_fit(source_name, target) or result.coverage(PARTS[:3]) < 1 or shares[3] != 0:
                wrong.append((source_name, target_name, "covered", str(shares)))
    assert wrong == []
