"""Fine-tuning plans: which CT window they get, and that it and other differences of normalisation are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo
from nnunetv2_misfm.checkpoints.inspection import describe
from nnunetv2_misfm.checkpoints.source import Source
from nnunetv2_misfm.plans.normalisation import intensity_properties
from nnunetv2_misfm.transfer.images import keep_normalisation, take_window

WINDOWS = "foreground_intensity_properties_per_channel"
OWN = {"percentile_00_5": -900.0, "percentile_99_5": 200.0, "mean": -300.0, "std": 350.0, "min": -1024.0}
PRETRAINED = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 1000.0, "min": -1000.0}


@pytest.mark.parametrize("wanted", ["pretrained", "dataset"])
def test_the_ct_window_that_is_taken_is_said(wanted: str) -> None:
    window = dict(OWN)
    remark = take_window(window, PRETRAINED, wanted)
    assert window == (PRETRAINED if wanted == "pretrained" else OWN)
    assert "-1000 to 1000 HU" in remark and "-900 to 200 HU" in remark


def test_the_same_window_needs_no_word() -> None:
    assert take_window(dict(OWN), dict(OWN), "pretrained") == ""


def of_pretraining(preprocessing: dict[str, Any], pool: dict[str, Any] | None = None) -> Source:
    info = CheckpointInfo("volume_fusion", "a.B", {}, 1, 5, preprocessing, {"pool": pool} if pool else {})
    return Source(Path("w.pth"), {"a": torch.zeros(1)}, info=info, preprocessing=preprocessing, by_this_package=True)


def dataset_plans(scheme: str, masked: bool = False) -> dict[str, Any]:
    configuration = {"normalization_schemes": [scheme], "use_mask_for_norm": [masked]}
    return {
        "dataset_name": "Dataset004_X",
        "transpose_forward": [0, 1, 2],
        WINDOWS: {"0": dict(OWN)},
        "configurations": {"3d_fullres": configuration},
    }


@pytest.mark.parametrize("majority", ["ct", "mr"])
def test_of_a_mixed_pool_each_modality_was_normalised_as_such(majority: str) -> None:
    scheme = {"ct": "CTNormalization", "mr": "ZScoreNormalization"}[majority]
    preprocessing = {"normalization_schemes": [scheme], WINDOWS: {"0": intensity_properties(majority, (-500, 700))}}
    pool = {"settings": {"ct_window": [-500, 700]}, "modalities": {"ct": 50, "mr": 50}}
    source = of_pretraining(preprocessing, pool)
    plans = dataset_plans("CTNormalization")
    assert "-500 to 700 HU" in "".join(keep_normalisation(plans, source, "pretrained", ("CT",)))
    assert plans[WINDOWS]["0"]["percentile_99_5"] == 700 and plans[WINDOWS]["0"]["std"] == 600
    assert list(keep_normalisation(dataset_plans("ZScoreNormalization"), source, "pretrained", ("T1",))) == []
    (other,) = keep_normalisation(dataset_plans("NoNormalization"), source, "pretrained", ("CT",))
    assert "pretraining used" in other and "CTNormalization" in other and "ZScoreNormalization" in other


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_z_scores_of_the_body_alone_in_one_of_the_two_are_said(here: bool, there: bool) -> None:
    source = of_pretraining({"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [there]})
    said = list(keep_normalisation(dataset_plans("ZScoreNormalization", here), source, "pretrained", ("T1",)))
    if here == there:
        assert said == []
    else:
        side = "here" if here else "in pretraining"
        assert f"z-scores of the voxels other than 0 {side}" in said[0]


def test_a_window_of_ct_is_that_of_the_channel_of_ct() -> None:
    pet, ct = ({"percentile_00_5": low, "percentile_99_5": 30.0, "mean": 7.0, "std": 5.0} for low in (1.0, -900.0))
    schemes = ["ZScoreNormalization", "CTNormalization"]
    told = describe(of_pretraining({"normalization_schemes": schemes, WINDOWS: {"0": pet, "1": ct}}))
    assert "CT window of channel 1  -900 to 30 HU" in told and "1 to 30 HU, mean" not in told.replace("-900 to 30", "")
