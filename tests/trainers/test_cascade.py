"""A cascade from pretraining to an ensemble, with the commands nnU-Net's users run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunet_dataset import CASES, NAME, make_dataset, plans, use_folders
from nnunetv2.ensembling.ensemble import entry_point_ensemble_folders
from nnunetv2.evaluation.find_best_configuration import find_best_configuration_entry_point
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.postprocessing.remove_connected_components import entry_point_apply_postprocessing
from nnunetv2.run.run_training import run_training_entry

from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.start_up import add_plugin_folder

SHORT = ["-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1"]
COMMANDS: dict[str, Callable[[], None]] = {
    "nnUNetv2_train": run_training_entry,
    "nnUNetv2_find_best_configuration": find_best_configuration_entry_point,
    "nnUNetv2_predict": predict_entry_point,
    "nnUNetv2_ensemble": entry_point_ensemble_folders,
    "nnUNetv2_apply_postprocessing": entry_point_apply_postprocessing,
}


@pytest.mark.end_to_end
def test_a_cascade_is_trained_ensembled_and_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessed = make_dataset(tmp_path)
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(cascade_plans()), encoding="utf-8")
    use_folders(tmp_path, monkeypatch)
    add_plugin_folder()
    features = ["-features_per_stage", "4", "4", "8", "16", "32"]
    misfm_pretrain(["-d", "4", "-device", "cpu", "-num_epochs", "1", *features, *SHORT])
    results = tmp_path / "nnUNet_results" / NAME
    checkpoint = results / "VolumeFusionTrainer__nnUNetMisFMPretrainPlans__3d_fullres/fold_all/checkpoint_final.pth"
    both = ["3d_lowres", "3d_cascade_fullres"]
    misfm_plan(["-d", "4", "-c", *both, "-num_epochs", "1", *SHORT, "-pretrained_weights", str(checkpoint)])

    # Every case needs a prediction of the first stage by a network that has not seen it.
    halves = [{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[3:], "val": CASES[:3]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(halves), encoding="utf-8")
    for configuration, fold in (("3d_lowres", 0), ("3d_lowres", 1), ("3d_cascade_fullres", 0)):
        run(
            monkeypatch,
            f"nnUNetv2_train 4 {configuration} {fold} -tr MisFMTrainer -p nnUNetMisFMPlans -device cpu --npz",
        )
    stem = trained(results, "3d_cascade_fullres")["encoder.stems.0.project.weight"]
    assert stem.shape[1] == 3, "the image and the one-hot labels of the first stage"
    pretrained = torch.load(checkpoint, weights_only=True)["network_weights"]["encoder.stems.0.project.weight"]
    assert torch.allclose(stem[:, :1], pretrained, atol=0.05), "two steps do not move a transferred kernel far"

    run(
        monkeypatch,
        f"nnUNetv2_find_best_configuration 4 -c {' '.join(both)} -tr MisFMTrainer -p nnUNetMisFMPlans -f 0 -np 1",
    )
    found = json.loads((results / "inference_information.json").read_text(encoding="utf-8"))
    assert len(found["all_results"]) == 3, "both configurations and their ensemble"

    images = tmp_path / "images"
    images.mkdir()
    image = tmp_path / "nnUNet_raw" / NAME / "imagesTr" / "case_0_0000.nii.gz"
    (images / image.name).write_bytes(image.read_bytes())
    common = f"-d 4 -f 0 -tr MisFMTrainer -p nnUNetMisFMPlans -device cpu -npp 0 -nps 0 --disable_tta -i {images}"
    low, high, mean, final = (tmp_path / name for name in ("low", "high", "mean", "final"))
    run(monkeypatch, f"nnUNetv2_predict {common} -c 3d_lowres -o {low} --save_probabilities")
    cascade = f"nnUNetv2_predict {common} -c 3d_cascade_fullres -prev_stage_predictions {low}"
    run(monkeypatch, f"{cascade} -o {high} --save_probabilities")
    run(monkeypatch, f"nnUNetv2_ensemble -i {low} {high} -o {mean} -np 1")
    best = found["best_model_or_ensemble"]
    run(
        monkeypatch,
        f"nnUNetv2_apply_postprocessing -i {mean} -o {final} -np 1 -pp_pkl_file {best['postprocessing_file']} "
        f"-plans_json {best['some_plans_file']} -dataset_json {low / 'dataset.json'}",
    )
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(final / "case_0.nii.gz")))
    assert segmentation.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(image))).shape
    assert set(np.unique(segmentation)) <= {0, 1, 2}


def cascade_plans() -> dict[str, Any]:
    """Plans with a low resolution and the cascade on top of it, in the layout of nnU-Net's planner."""
    content = plans()
    configurations = content["configurations"]
    configurations["3d_lowres"] = {
        **configurations["3d_fullres"],
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [1.5, 1.5, 1.5],
        "patch_size": [16, 24, 16],
        "next_stage": "3d_cascade_fullres",
    }
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return content


def trained(results: Path, configuration: str) -> dict[str, torch.Tensor]:
    """The weights of fold 0."""
    file = results / f"MisFMTrainer__nnUNetMisFMPlans__{configuration}" / "fold_0" / "checkpoint_final.pth"
    weights: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["network_weights"]
    return weights


def run(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Run one of nnU-Net's commands in this process."""
    name, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    COMMANDS[name]()
