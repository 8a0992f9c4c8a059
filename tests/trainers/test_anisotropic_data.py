"""Anisotropic images, from nnU-Net's own planning to prediction: the stem is chosen by the plan, and kept for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.start_up import add_plugin_folder

NAME = "Dataset008_Anisotropic"
SPACING_XYZ = (2.0, 2.0, 8.0)


def write_phantoms(raw: Path, count: int) -> None:
    """Bright balls of 30 mm in slices of 8 mm."""
    z, y, x = np.meshgrid(np.arange(14) * 8.0, np.arange(64) * 2.0, np.arange(56) * 2.0, indexing="ij")
    for number in range(count):
        generator = np.random.default_rng(number)
        centre = generator.uniform((40, 40, 40), (70, 80, 70))
        ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 30**2
        image = 100 * ball + generator.normal(0, 20, ball.shape)
        for folder, ending, array in (("imagesTr", "_0000", image.astype(np.float32)), ("labelsTr", "", ball * 1)):
            written = sitk.GetImageFromArray(array.astype(np.uint8) if ending == "" else array)
            written.SetSpacing(SPACING_XYZ)
            (raw / folder).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(written, str(raw / folder / f"case_{number}{ending}.nii.gz"))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}}
    (raw / "dataset.json").write_text(
        json.dumps({**description, "numTraining": count, "file_ending": ".nii.gz"}), encoding="utf-8"
    )


@pytest.mark.end_to_end
def test_slices_of_8_mm_take_the_stem_of_degree_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "0")
    add_plugin_folder()
    write_phantoms(tmp_path / "nnUNet_raw" / NAME, 5)
    extract_fingerprints([8], num_processes=1, show_progress_bar=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner takes it for its number of threads
    plan_experiments([8])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    preprocess([8], configurations=["3d_fullres"], num_processes=[1], show_progress_bar=False)

    planned_by_nnunet = tmp_path / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(planned_by_nnunet.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["batch_size"] = 2  # what it plans for a GPU takes minutes
    planned_by_nnunet.write_text(json.dumps(plans), encoding="utf-8")
    run = get_trainer_from_args(NAME, "3d_fullres", 0, "MisFMTrainer", "nnUNetPlans", False, torch.device("cpu"))
    run.num_epochs, run.num_iterations_per_epoch, run.num_val_iterations_per_epoch = 1, 1, 1
    run.run_training()
    folder = Path(os.environ["nnUNet_results"]) / NAME / "MisFMTrainer__nnUNetPlans__3d_fullres"
    planned = json.loads((folder / "plans.json").read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    print(json.dumps({key: planned[key] for key in ("spacing", "patch_size", "architecture")}))
    assert planned["spacing"] == [8.0, 2.0, 2.0]
    assert planned["architecture"]["network_class_name"] == "nnunetv2_misfm.architectures.PCTNet"
    assert planned["architecture"]["arch_kwargs"]["strides"] == strides_of(2)
    assert list(run.bare_network.encoder.stems) == ["2"]

    # Another patch size for the sliding window, with the same weights.
    plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["patch_size"] = [8, 40, 48]
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False, use_mirroring=False
    )
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    (tmp_path / "out").mkdir()
    image = tmp_path / "nnUNet_raw" / NAME / "imagesTr" / "case_0_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], str(tmp_path / "out"), overwrite=True)
    predicted = sitk.ReadImage(str(tmp_path / "out" / "case_0.nii.gz"))
    assert predicted.GetSize() == (56, 64, 14)
