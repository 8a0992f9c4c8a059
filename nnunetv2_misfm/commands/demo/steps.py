"""The steps of the demo, each through the function behind the command a user would type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from tqdm import tqdm

from nnunetv2_misfm.commands.demo.phantoms import LABELS, write_case, write_unlabelled
from nnunetv2_misfm.commands.demo.progress import step
from nnunetv2_misfm.commands.demo.report import Arm
from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.commands.threads import in_this_process
from nnunetv2_misfm.cpu_threads import training_threads
from nnunetv2_misfm.start_up import add_plugin_folder

_POOL_ID, _POOL_NAME = "998", "MisFMDemoPool"
_DATASET_ID, _DATASET = "999", "Dataset999_MisFMDemo"


class Demo:
    """One run of the demo.

    Args:
        folder: with nnU-Net's three folders in it, which the environment names already.
        device: "cuda", "cpu" or None for the best there is.
    """

    def __init__(self, folder: Path, device: str | None):
        self.folder = folder
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.log = folder / "demo.log"
        self.volumes = folder / "volumes"
        self.raw = folder / "nnUNet_raw" / _DATASET
        self.results = folder / "nnUNet_results" / _DATASET
        add_plugin_folder()
        torch.set_num_threads(training_threads())

    def make_volumes(self, unlabelled: int, training: int, test: int) -> None:
        """Bare volumes for pretraining, and a small labelled dataset in nnU-Net's raw format."""
        write_unlabelled(self.volumes, unlabelled, seed=0)
        for index in tqdm(range(training + test), desc=f"{'Making phantoms':<28}", leave=True):
            images, labels = ("imagesTr", "labelsTr") if index < training else ("imagesTs", "labelsTs")
            write_case(self.raw / images, self.raw / labels, f"phantom_{index:03d}", (1, index))
        dataset = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": training, "file_ending": ".nii.gz"}
        (self.raw / "dataset.json").write_text(json.dumps(dataset, indent=4))

    def pretrain(self, epochs: int, iterations: int, options: list[str]) -> Path:
        """misfm_pretrain on the bare volumes; returns the checkpoint."""
        with step("Preparing and pretraining", self.log, epochs, r".* Epoch time"):
            misfm_pretrain(
                ["-i", str(self.volumes), "-d", _POOL_ID, "-n", _POOL_NAME, "-modality", "ct", "-np", "1"]
                + ["-num_epochs", str(epochs), "-num_iterations_per_epoch", str(iterations)]
                + ["-num_val_iterations_per_epoch", "2", "-initial_lr", "0.003", "-device", self.device, *options]
            )
        pool = self.folder / "nnUNet_results" / f"Dataset{_POOL_ID}_{_POOL_NAME}"
        return pool / "VolumeFusionTrainer__nnUNetPlans__3d_fullres" / "fold_all" / "checkpoint_final.pth"

    def plan_with_nnunet(self) -> None:
        """What nnUNetv2_plan_and_preprocess -d 999 -c 3d_fullres does."""
        # nnU-Net's planner takes the number of data workers, 0 here, for a number of threads.
        one_worker = patch.dict(os.environ, nnUNet_n_proc_DA="1")
        messages = r"(Dataset999|Plans were saved|Configuration:)"
        with one_worker, in_this_process(), step("nnU-Net plans, preprocesses", self.log, 3, messages):
            extract_fingerprints([int(_DATASET_ID)], num_processes=1, show_progress_bar=False)
            plan_experiments([int(_DATASET_ID)])
            preprocess([int(_DATASET_ID)], configurations=["3d_fullres"], num_processes=[1], show_progress_bar=False)

    def plan_finetuning(self, checkpoint: Path, epochs: int, iterations: int, options: list[str]) -> None:
        """misfm_plan twice: with the pretrained weights, and the same without them."""
        common = ["-d", _DATASET_ID, "-c", "3d_fullres", "-pretrained_weights", str(checkpoint), "-np", "1", *options]
        common += ["-num_epochs", str(epochs), "-num_iterations_per_epoch", str(iterations)]
        # Ten times the published learning rate: runs this short need larger steps.
        common += ["-num_val_iterations_per_epoch", "2", "-initial_lr", "0.01"]
        with in_this_process(), step("Planning the fine-tunings", self.log, 2, r"Train with"):
            # The default's two ramps would take a quarter of the epochs.
            misfm_plan([*common, "-schedule", "default"])
            misfm_plan([*common, "--from_scratch"])

    def finetune_and_test(self, name: str, plans: str, epochs: int) -> Arm:
        """nnUNetv2_train, nnUNetv2_predict and the evaluation of one arm."""
        device = torch.device(self.device)
        with in_this_process(), step(f"Fine-tuning {name}", self.log, epochs, r".* Epoch time"):
            run_training(_DATASET_ID, "3d_fullres", 0, "MisFMTrainer", plans, device=device)
        model = self.results / f"MisFMTrainer__{plans}__3d_fullres"
        predictions = self.folder / f"predictions_{plans}"
        predictions.mkdir(exist_ok=True)
        images = sorted((self.raw / "imagesTs").glob("*_0000.nii.gz"))
        with step(f"Predicting {name}", self.log, len(images), r"\s*Predicting "):
            # Without mirroring, which takes eight times as long and changes little here.
            predictor = nnUNetPredictor(
                device=device,
                use_mirroring=False,
                perform_everything_on_device=device.type == "cuda",
                allow_tqdm=False,
            )
            predictor.initialize_from_trained_model_folder(str(model), (0,))
            predictor.predict_from_files_sequential(
                [[str(image)] for image in images], str(predictions), overwrite=True
            )
        return Arm(name, model / "fold_0", predictions, self._dice(predictions))

    def _dice(self, predictions: Path) -> dict[str, float]:
        labels = [label for label in LABELS.values() if label > 0]
        cases = [
            compute_metrics(str(truth), str(predictions / truth.name), SimpleITKIO(), labels)["metrics"]
            for truth in sorted((self.raw / "labelsTs").glob("*.nii.gz"))
        ]
        names = {label: name for name, label in LABELS.items()}
        return {names[label]: float(np.mean([case[label]["Dice"] for case in cases])) for label in labels}
