"""Fine-tuning, validation and prediction with regions and with an ignore label, as nnU-Net defines them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunet_dataset import NAME, make_dataset, use_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder

CPU = torch.device("cpu")
SHORT = ["-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1"]
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "inner": 1}, "regions_class_order": [2, 1]}
IGNORE = {"labels": {"background": 0, "inner": 1, "ignore": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("description", "num_outputs", "scored", "predicted"),
    [
        pytest.param(REGIONS, 2, {"(1, 2)", "1"}, {0, 1, 2}, id="regions"),
        pytest.param(IGNORE, 2, {"1"}, {0, 1}, id="ignore label"),
    ],
)
def test_a_pretrained_network_learns_other_kinds_of_labels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    description: dict[str, Any],
    num_outputs: int,
    scored: set[str],
    predicted: set[int],
) -> None:
    make_dataset(tmp_path, **description)
    use_folders(tmp_path, monkeypatch)
    add_plugin_folder()
    features = ["-features_per_stage", "4", "4", "8", "16", "32"]
    misfm_pretrain(["-d", "4", "-device", "cpu", "-num_epochs", "1", *features, *SHORT])
    results = tmp_path / "nnUNet_results" / NAME
    checkpoint = results / "VolumeFusionTrainer__nnUNetMisFMPretrainPlans__3d_fullres/fold_all/checkpoint_final.pth"
    misfm_plan(["-d", "4", "-num_epochs", "1", *SHORT, "-pretrained_weights", str(checkpoint)])
    run = get_trainer_from_args(NAME, "3d_fullres", 0, "MisFMTrainer", "nnUNetMisFMPlans", False, CPU)
    run.run_training()
    assert run.bare_network.state_dict()["decoder.seg_layers.3.weight"].shape[0] == num_outputs
    assert all(np.isfinite(run.logger.get_value("train_losses", step=None)))
    run.perform_actual_validation()
    folder = results / "MisFMTrainer__nnUNetMisFMPlans__3d_fullres"
    summary = json.loads((folder / "fold_0/validation/summary.json").read_text(encoding="utf-8"))
    assert set(summary["mean"]) == scored

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False, perform_everything_on_device=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    image = tmp_path / "nnUNet_raw" / NAME / "imagesTr" / "case_0_0000.nii.gz"
    (tmp_path / "out").mkdir()
    predictor.predict_from_files_sequential([[str(image)]], str(tmp_path / "out"), overwrite=True)
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "case_0.nii.gz")))
    assert set(np.unique(segmentation)) <= predicted
