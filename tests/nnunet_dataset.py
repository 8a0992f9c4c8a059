"""A small labelled nnU-Net dataset, planned and preprocessed without worker processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.commands.threads import threads_for_processes
from nnunetv2_misfm.pretrain.planning import plain_unet_entry

NAME = "Dataset004_Small"
PLOT_PROGRESS = LocalLogger.plot_progress_png
"""What `use_folders` replaces."""
SHAPE = (24, 30, 26)
LABELS = {"background": 0, "inner": 1, "outer": 2}
CASES = [f"case_{index}" for index in range(6)]


def make_case(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (z, y, x) of two nested ellipsoids, and their labels."""
    generator = np.random.default_rng(index)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    centre = generator.uniform(-0.2, 0.2, 3)
    radius = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)))
    labels = np.where(radius < 0.35, 1, np.where(radius < 0.7, 2, 0)).astype(np.uint8)
    image = np.choose(labels, (50.0, 300.0, 180.0)) + generator.normal(0, 20, SHAPE)
    return image.astype(np.float32), labels


def labels_in(file: Path) -> np.ndarray:
    """The voxels of a segmentation."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def assert_predicted_as_validated(fold: Path, out: Path) -> None:
    """nnU-Net rebuilds the network of a results folder and predicts a case as the trainer did in its validation."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(fold.parent), (0,))
    out.mkdir()
    validated = next((fold / "validation").glob("*.nii.gz"))
    image = Path(os.environ["nnUNet_raw"], NAME, "imagesTr", validated.name.replace(".nii.gz", "_0000.nii.gz"))
    predictor.predict_from_files_sequential([[str(image)]], str(out), overwrite=True)
    np.testing.assert_array_equal(labels_in(out / validated.name), labels_in(validated))


def plans(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> dict[str, Any]:
    """Ordinary plans with a 3D and a 2D configuration, as nnU-Net's planner writes them."""
    arguments = {"order_z": 0, "force_separate_z": None}
    fullres = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [24, 32, 24],
        "median_image_size_in_voxels": list(map(float, SHAPE)),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **arguments},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **arguments},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **arguments},
        "architecture": plain_unet_entry(spacing, (24, 32, 24)),
        "batch_dice": False,
    }
    flat = {**fullres, "data_identifier": "nnUNetPlans_2d", "patch_size": [32, 24], "spacing": [1.0, 1.0]}
    properties = {"mean": 100.0, "median": 100.0, "std": 80.0, "min": 0.0, "max": 400.0}
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": list(SHAPE),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d": flat, "3d_fullres": fullres},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {**properties, "percentile_00_5": 10.0, "percentile_99_5": 350.0}
        },
    }


def make_dataset(root: Path, **description: Any) -> Path:
    """Write the raw and the preprocessed dataset below nnUNet_raw and nnUNet_preprocessed in `root`.

    Args:
        root: where to.
        description: entries of dataset.json, other labels for example.

    Returns:
        The dataset's folder in nnUNet_preprocessed.
    """
    raw, preprocessed = root / "nnUNet_raw" / NAME, root / "nnUNet_preprocessed" / NAME
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed / "nnUNetPlans_3d_fullres"):
        folder.mkdir(parents=True)
    (preprocessed / "gt_segmentations").mkdir()
    dataset: dict[str, Any] = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    dataset |= description
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    (preprocessed / "dataset_fingerprint.json").write_text(
        '{"median_relative_size_after_cropping": 1.0}', encoding="utf-8"
    )
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans()), encoding="utf-8")
    manager = PlansManager(plans())
    configuration = manager.get_configuration("3d_fullres")
    preprocessor = DefaultPreprocessor(verbose=False)
    for index, case in enumerate(CASES):
        image, labels = make_case(index)
        image_file, label_file = raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(image), str(image_file))
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(label_file))
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(preprocessed / "gt_segmentations" / label_file.name))
        target = str(preprocessed / "nnUNetPlans_3d_fullres" / case)
        preprocessor.run_case_save(target, [str(image_file)], str(label_file), manager, configuration, dataset)
    return preprocessed


def use_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name nnU-Net's three folders in `root`; nothing runs in other processes.

    nnU-Net exports and evaluates in pools of processes, each of which takes seconds to import what it needs: threads
    take their place.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(root / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "0")
    monkeypatch.setattr("multiprocessing.get_context", threads_for_processes)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 10)  # of pictures of samples
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda logger, folder: None)  # nnU-Net draws every epoch
    monkeypatch.setattr("nnunetv2_misfm.pages.figures.svg", lambda draw, width, height: "<svg></svg>")  # and we ours
