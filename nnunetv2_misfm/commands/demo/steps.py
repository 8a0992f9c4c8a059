"""The steps of the demo, each through the function behind the command a user would type."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)

from nnunetv2_misfm.checkpoints.checkpoint import DESCRIPTION, LEARNT, read_checkpoint
from nnunetv2_misfm.commands.compare.cli import run_and_report
from nnunetv2_misfm.commands.compare.options import read_options
from nnunetv2_misfm.commands.compare.page import Section
from nnunetv2_misfm.commands.compare.results import Written
from nnunetv2_misfm.commands.compare.workspace import Workspace
from nnunetv2_misfm.commands.demo.phantoms import LABELS, write_case, write_unlabelled
from nnunetv2_misfm.commands.demo.progress import step
from nnunetv2_misfm.commands.devices import best_device
from nnunetv2_misfm.commands.earlier_run import run_folder
from nnunetv2_misfm.commands.pretrain import pretrain
from nnunetv2_misfm.commands.threads import in_this_process
from nnunetv2_misfm.cpu_threads import training_threads
from nnunetv2_misfm.files import read_json, write_json
from nnunetv2_misfm.pages import figures
from nnunetv2_misfm.plans.files import FINAL
from nnunetv2_misfm.pretrain.planning import plain_unet_stages
from nnunetv2_misfm.pretrain.vox2vec import Vox2Vec
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.units import format_duration

_POOL_ID, _POOL_NAME = "998", "MisFMDemoPool"
_DATASET_ID, _DATASET = "999", "Dataset999_MisFMDemo"
_PLANS = "nnUNetDemoPlans"
_FEATURES = [8, 16, 32, 64]
_STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]


class Demo:
    """One run of the demo.

    Args:
        folder: with nnU-Net's three folders in it, which the environment names already.
        device: "cuda", "cpu" or None for the best there is.
        seed: of the phantoms and of everything random.
    """

    def __init__(self, folder: Path, device: str | None, seed: int):
        self.folder = folder
        self.device = device or best_device()
        self.seed = seed
        self.log = folder / "demo.log"
        self.volumes = folder / "volumes"
        self.raw = folder / "nnUNet_raw" / _DATASET
        self.preprocessed = folder / "nnUNet_preprocessed" / _DATASET
        add_plugin_folder()
        torch.set_num_threads(training_threads())

    def make_volumes(self, unlabelled: int, labelled: int) -> None:
        """Bare volumes for pretraining, and a small labelled dataset in nnU-Net's raw format."""
        with step("Making phantoms", self.log, 1, "$^"):
            write_unlabelled(self.volumes, unlabelled, self.seed)
            for index in range(labelled):
                folders = self.raw / "imagesTr", self.raw / "labelsTr"
                write_case(*folders, f"phantom_{index:03d}", (self.seed, 1, index))
        dataset = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": labelled, "file_ending": ".nii.gz"}
        write_json(dataset, self.raw / "dataset.json")

    def plan_with_nnunet(self, patch_size: Sequence[int], batch_size: int) -> None:
        """What nnUNetv2_plan_and_preprocess -d 999 -c 3d_fullres does, and plans with a small network beside it."""
        # nnU-Net's planner takes the number of data workers, 0 here, for a number of threads.
        one_worker = patch.dict(os.environ, nnUNet_n_proc_DA="1")
        messages = r"(Dataset999|Plans were saved|Configuration:)"
        with one_worker, in_this_process(), step("nnU-Net plans, preprocesses", self.log, 3, messages):
            extract_fingerprints([int(_DATASET_ID)], num_processes=1, show_progress_bar=False)
            plan_experiments([int(_DATASET_ID)])
            preprocess([int(_DATASET_ID)], configurations=["3d_fullres"], num_processes=[1], show_progress_bar=False)
        plans = read_json(self.preprocessed / "nnUNetPlans.json", "Start the demo again.")
        entry = plans["configurations"]["3d_fullres"]
        entry["architecture"]["arch_kwargs"] |= plain_unet_stages(_FEATURES, _STRIDES)
        entry |= {"patch_size": list(patch_size), "batch_size": batch_size}
        write_json(plans | {"plans_name": _PLANS}, self.preprocessed / f"{_PLANS}.json")

    def pretrain(self, epochs: int, iterations: int, options: Sequence[str]) -> Path:
        """misfm_pretrain on the bare volumes; returns the results folder."""
        with step("Preparing and pretraining", self.log, epochs, r".* Epoch time"):
            pretrain(
                ["-i", str(self.volumes), "-d", _POOL_ID, "-n", _POOL_NAME, "-plans_from", _DATASET_ID, "-p", _PLANS]
                + ["-pretext", Vox2Vec.name, "-network", "plan", "-np", "1"]
                + ["-device", self.device, "-seed", str(self.seed)]
                + ["-num_epochs", str(epochs), "-num_iterations_per_epoch", str(iterations), *options]
            )
        return run_folder(Vox2Vec.name, f"Dataset{_POOL_ID}_{_POOL_NAME}", _PLANS, "3d_fullres")

    def compare(self, pretrained: Path, options: Sequence[str], hours_so_far: float) -> Written:
        """misfm_compare of the pretrained weights with random ones, and its page."""
        weights = str(pretrained / FINAL)
        words = ["-d", _DATASET_ID, "-p", _PLANS, "-pretrained_weights", f"{Vox2Vec.name}={weights}", "--from_scratch"]
        words += ["-o", str(self.folder / "comparison"), "-device", self.device, *options]
        read = read_options(words)
        workspace = Workspace(read.folder, read.dataset, read.configuration, read.plans)
        workspace.prepare()
        return run_and_report(
            read,
            words,
            workspace,
            title="misfm_demo: pretraining on scans without labels, then five labelled ones",
            more=_about_pretraining(pretrained, hours_so_far),
        )


def _about_pretraining(pretrained: Path, hours: float) -> list[Section]:
    """What the page says of the pretraining."""
    content = read_checkpoint(pretrained / FINAL)
    log, learnt = content["logging"], content[DESCRIPTION]["training"][LEARNT]
    curve = figures.curve({"training": log["train_losses"], "validation": log["val_losses"]}, "epoch", "loss")
    return [
        Section(
            "What was pretrained",
            "vox2vec shows the network two crops of a volume that overlap, each with a contrast of its own, and asks "
            "which voxel of the one is which voxel of the other. That cannot be told from brightness, so it learns "
            "what lies around a voxel. The volumes were made on the spot: trunks whose organs differ in size, "
            "outline, place and contrast, with neighbours as bright as the two that have labels. Making and "
            f"preparing all volumes and pretraining took {format_duration(hours)}; random weights need no pretraining. "
            "Both arms are the same network, frozen, and the same linear classifier of its features, fitted to the "
            "same labelled volumes. "
            "Nothing is fine-tuned: in the minutes of a demo a network hardly begins to find organs that small, "
            "pretrained or not. What a fine-tuning gains on your data is what misfm_compare without --probe measures.",
            svg=curve,
        ),
        Section(
            "The pretext task",
            f"{Vox2Vec.picture_caption} In the end: {learnt}.",
            picture=figures.png_file(pretrained / Vox2Vec.picture_name),
        ),
    ]
