"""The runs of low_label.py: a dataset's split, and one arm trained and tested with the labelled cases of one seed.

The split is fixed: 40 test cases that are in no fingerprint, plan, pool or training set; 20 validation cases for the
learning curves and for tuning; the other images, without their labels, for pretraining. The N labelled cases of a seed
are the same for all arms, and so are plans, batches, iterations and test cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import device_name

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "low_label"
DATASET, POOL, WIDE_POOL = "Dataset704_LowLabel", "Dataset904_LowLabelPool", "Dataset905_LowLabelWidePool"
NUM_TEST, NUM_VALIDATION = 40, 20
LABELLED = (5, 10, 20, 0)  # 0 stands for all of them
MOST_SEEDS = 20


@dataclass(frozen=True)
class Setting:
    """How long and how large; the same for all arms."""

    network: tuple[str, ...]
    batch_size: int
    pretraining: tuple[int, int, int]  # epochs, iterations of each, batch size
    finetuning: tuple[int, int, int]  # epochs, iterations and validation iterations of each
    predict: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


SETTINGS = {
    "small": Setting(
        network=("-network", "pctnet", "-features_per_stage", "8", "16", "32", "64", "128"),
        batch_size=2,
        pretraining=(16, 100, 8),
        finetuning=(12, 25, 10),
        predict=("--disable_tta", "-npp", "0", "-nps", "0"),
        environment=(
            ("nnUNet_n_proc_DA", "1"),
            ("nnUNet_def_n_proc", "1"),
            ("nnUNet_compile", "0"),
            ("GOMP_SPINCOUNT", "3000"),
        ),
    ),
    "full": Setting(
        network=("-network", "pctnet"),
        batch_size=4,
        pretraining=(80, 250, 4),
        finetuning=(100, 250, 25),
        predict=(),
    ),
}


@dataclass(frozen=True)
class Pretraining:
    """A checkpoint to start from, by the options of misfm_pretrain that make it."""

    name: str
    options: tuple[str, ...] = ()
    pool: str = POOL
    length: tuple[int, int, int] | None = None  # epochs, iterations of each, batch size, where not the setting's

    def all_options(self, setting: Setting) -> tuple[str, ...]:
        """The options with those of the length before them."""
        epochs, iterations, batch_size = map(str, self.length or setting.pretraining)
        length = ("-num_epochs", epochs, "-num_iterations_per_epoch", iterations, "-batch_size", batch_size)
        return length + self.options


@dataclass(frozen=True)
class Arm:
    """What is trained: with which trainer, from which weights, with which options of misfm_plan."""

    meaning: str  # for the reader of the tables
    pretraining: Pretraining | None = None
    plan: tuple[str, ...] = ()
    trainer: str = "MisFMTrainer"


# Crops of 32 voxels lie within most of the volumes, and a step takes .4 of the time.
SMALL_CROPS = ("-patch_size", "32", "32", "32", "-initial_lr", "3e-3")
FEW_LARGE_BOXES = ("-num_boxes", "3", "10", "-box_size_min", *3 * ("0.25",), "-box_size_max", *3 * ("0.75",))
BOXES = Pretraining("boxes", ("-geometry", "boxes", *SMALL_CROPS, *FEW_LARGE_BOXES))
BLOCKS = Pretraining("blocks", ("-geometry", "blocks", *SMALL_CROPS))
BATCHES_OF_2 = dataclasses.replace(BOXES, name="boxes_batch_2", length=(40, 100, 2))
ARMS = {
    "nnunet": Arm("nnU-Net's own network and trainer", trainer="LowLabelStockTrainer"),
    "scratch": Arm("PCT-Net that starts from random weights"),
    "boxes": Arm("PCT-Net pretrained with the geometry `boxes` on the training images, without their labels", BOXES),
    "blocks": Arm("the same with the geometry `blocks`", BLOCKS),
    "encoder_only": Arm("as `boxes`, with the pretrained decoder thrown away", BOXES, ("--encoder_only",)),
    "boxes_batch_2": Arm(
        "as `boxes`, but pretrained for 4,000 iterations with batch size 2 instead of 1,600 with 8, and fine-tuned at "
        "3e-3 instead of 5e-3 with ten times that rate for the segmentation layers",
        BATCHES_OF_2,
    ),
    "boxes_wide_pool": Arm("as `boxes`, with other volumes too", dataclasses.replace(BOXES, pool=WIDE_POOL)),
}
CORE = ("scratch", "boxes", "blocks", "encoder_only")


@dataclass(frozen=True)
class Run:
    """One arm with the labelled cases of one seed."""

    name: str
    arm: Arm
    labelled: int
    seed: int

    @property
    def title(self) -> str:
        return f"{self.name}_n{self.labelled or 'all'}_seed{self.seed}"

    @property
    def fold(self) -> str:
        return str(LABELLED.index(self.labelled) * MOST_SEEDS + self.seed)


class RunFailed(Exception):
    """A command of a run failed."""


class Study:
    """One dataset in one setting."""

    def __init__(self, dataset: Path, more_volumes: Path | None, work: Path, setting: str, device: str, jobs: int = 1):
        self.source = dataset.resolve()
        self.more_volumes = more_volumes
        self.name = setting
        self.setting = SETTINGS[setting]
        self.device = device
        self.jobs = jobs
        self.work = work.resolve()
        self.raw = self.work / "nnUNet_raw" / DATASET
        self.preprocessed = self.work / "nnUNet_preprocessed" / DATASET
        self.results = self.work / "nnUNet_results"
        epochs, iterations, validation = self.setting.finetuning
        self.environment = {
            **os.environ,
            **{name: str(self.work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_extTrainer": str(Path(__file__).parent / "stock_trainer"),
            "LOW_LABEL_EPOCHS": str(epochs),
            "LOW_LABEL_ITERATIONS": str(iterations),
            "LOW_LABEL_VAL_ITERATIONS": str(validation),
            **dict(self.setting.environment),
        }
        if jobs > 1:
            self.environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (self.source / "labelsTr").glob("*.nii.gz"))
        by_hash = sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())
        self.test = by_hash[:NUM_TEST]
        self.validation = by_hash[NUM_TEST : NUM_TEST + NUM_VALIDATION]
        self.training = by_hash[NUM_TEST + NUM_VALIDATION :]

    def perform(self, runs: Sequence[Run], do: Callable[[Run], None], until: float = float("inf")) -> list[str]:
        """Do something with every run, `jobs` at a time, starting none after `until` (of `time.monotonic`).

        Weights are pretrained first, and beside them what needs none.

        Returns:
            What failed.
        """
        needed = {run.arm.pretraining: None for run in runs if run.arm.pretraining is not None}
        failures: list[str] = []

        def attempt(run: Run) -> None:
            try:
                if run.arm.pretraining is not None:
                    pretrained[run.arm.pretraining].result()
                if time.monotonic() < until:
                    print(f"{time.strftime('%H:%M:%S')} {run.title}", flush=True)
                    do(run)
            except RunFailed as error:
                failures.append(str(error))

        with ThreadPoolExecutor(self.jobs) as pool:
            pretrained: dict[Pretraining, Future[Path]] = {
                pretraining: pool.submit(self.pretrain, pretraining) for pretraining in needed
            }
            waiting = {p for p in needed if not self.checkpoint(p).is_file()}
            in_order = sorted(runs, key=lambda run: run.arm.pretraining in waiting)
            attempts = [pool.submit(attempt, run) for run in in_order]
        for done in attempts:
            done.result()  # anything but a failed command is a mistake here, and must be seen
        return sorted(set(failures))

    # ------------------------------------------------------------ what all runs share

    def prepare(self) -> None:
        """The split, nnU-Net's plans and preprocessing, and the folds."""
        if not (self.raw / "dataset.json").is_file():
            self._copy(self.test, "imagesTs", "labelsTs")
            self._copy(self.training + self.validation, "imagesTr", "labelsTr")
            for case in self.training:
                images = self.work / "unlabelled"
                images.mkdir(exist_ok=True)
                shutil.copy(self.source / "imagesTr" / f"{case}_0000.nii.gz", images)
            description = json.loads((self.source / "dataset.json").read_text())
            description["numTraining"] = len(self.training) + len(self.validation)
            (self.raw / "dataset.json").write_text(json.dumps(description))
        if not (self.preprocessed / "splits_final.json").is_file():
            self.command(
                "prepare", "nnUNetv2_plan_and_preprocess", "-d", "704", "-c", "3d_fullres", "-npfp", "2", "-np", "2"
            )
            folds = [
                {"train": self.labelled_cases(labelled, seed), "val": self.validation}
                for labelled in LABELLED
                for seed in range(MOST_SEEDS)
            ]
            (self.preprocessed / "splits_final.json").write_text(json.dumps(folds))

    def _copy(self, cases: list[str], images: str, labels: str) -> None:
        for folder in (images, labels):
            (self.raw / folder).mkdir(parents=True, exist_ok=True)
        for case in cases:
            shutil.copy(self.source / "imagesTr" / f"{case}_0000.nii.gz", self.raw / images)
            shutil.copy(self.source / "labelsTr" / f"{case}.nii.gz", self.raw / labels)

    def labelled_cases(self, number: int, seed: int) -> list[str]:
        """The labelled training cases of a seed."""
        order = sorted(self.training, key=lambda case: hashlib.sha256(f"{seed} {case}".encode()).digest())
        return sorted(order[:number] if number else order)

    def checkpoint(self, pretraining: Pretraining) -> Path:
        """Where pretrained weights are, once they are made."""
        run = self.results / pretraining.pool / f"VolumeFusionTrainer__{pretraining.name}Plans__3d_fullres"
        return run / "fold_all" / "checkpoint_final.pth"

    def pretrain(self, pretraining: Pretraining) -> Path:
        """Weights pretrained on a pool, made if they are not there."""
        checkpoint = self.checkpoint(pretraining)
        if not checkpoint.is_file():
            folders = ["-i", str(self.work / "unlabelled")]
            if pretraining.pool == WIDE_POOL:
                if self.more_volumes is None:
                    raise RunFailed("the arm boxes_wide_pool needs --more-volumes")
                folders += ["-i", str(self.more_volumes)]
            number, name = pretraining.pool.removeprefix("Dataset").split("_", 1)
            continued = ["--c"] if checkpoint.with_name("checkpoint_latest.pth").is_file() else []
            self.command(
                *(f"pretrain_{pretraining.name}_{name}", "misfm_pretrain", *folders, "-d", number, "-n", name),
                *("-plans_from", "704", "-overwrite_plans_name", f"{pretraining.name}Plans", "-device", self.device),
                *("-num_val_iterations_per_epoch", "10", *self.setting.network),
                *(*pretraining.all_options(self.setting), *continued),
            )
        return checkpoint

    # ------------------------------------------------------------ one run

    def test_run(self, run: Run) -> None:
        """Train, predict the test cases and evaluate, unless that was done."""
        record = RECORDS / self.name / f"{run.title}.json"
        if record.is_file():
            return
        content = self.train(run)
        predictions = self.work / "predictions" / run.title
        self.command(
            *(run.title, "nnUNetv2_predict", "-i", str(self.raw / "imagesTs"), "-o", str(predictions), "-d", "704"),
            *("-c", "3d_fullres", "-f", run.fold, "-tr", run.arm.trainer, "-p", run.title, "-device", self.device),
            *self.setting.predict,
        )
        self.command(
            *(run.title, "nnUNetv2_evaluate_folder", str(self.raw / "labelsTs"), str(predictions)),
            *("-djfile", str(self.raw / "dataset.json"), "-pfile", str(self.preprocessed / f"{run.title}.json")),
            *("-np", "1"),
        )
        content |= dice(predictions / "summary.json", "test_dice")
        self.keep(record, content, run)

    def keep(self, record: Path, content: dict[str, Any], run: Run) -> None:
        """Write a finished run's record; its network is not needed any more."""
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(content, indent=1))
        shutil.rmtree(self._folder(run))

    def _folder(self, run: Run) -> Path:
        return self.results / DATASET / f"{run.arm.trainer}__{run.title}__3d_fullres" / f"fold_{run.fold}"

    def train(self, run: Run) -> dict[str, Any]:
        """Plan and train one arm with the labelled cases of a seed; returns what is to be recorded of it."""
        self._plan(run)
        folder = self._folder(run)
        continued = []
        if (folder / "checkpoint_final.pth").is_file():
            continued = ["--val"]  # stopped while it predicted the validation cases
        elif (folder / "checkpoint_latest.pth").is_file():
            continued = ["--c"]
        self.command(
            *(run.title, "nnUNetv2_train", "704", "3d_fullres", run.fold, "-tr", run.arm.trainer, "-p", run.title),
            *("-device", self.device, *continued),
        )
        logged = self._logged(folder)
        epochs = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=True)
        pretraining = run.arm.pretraining
        plans = json.loads((self.preprocessed / f"{run.title}.json").read_text())
        return {
            "arm": run.name,
            "labelled": run.labelled or len(self.training),
            "seed": run.seed,
            "validation_curve": logged["mean_fg_dice"],
            **dice(folder / "validation" / "summary.json", "validation_dice"),
            "iterations_per_epoch": self.setting.finetuning[1],
            "training_seconds": round(sum(end - start for start, end in epochs)),
            "options": {
                "misfm_pretrain": " ".join(pretraining.all_options(self.setting)) if pretraining else None,
                "misfm_plan": " ".join(run.arm.plan),
            },
            "pretrained_sha256": plans.get("pretrain_info", {}).get("sha256"),
            "setting": dataclasses.asdict(self.setting),
            "device": device_name(self.device),
            "runs_at_once": self.jobs,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }

    def _plan(self, run: Run) -> None:
        epochs, iterations, validation = map(str, self.setting.finetuning)
        if run.arm.trainer == "LowLabelStockTrainer":
            # nnU-Net's own plans with the batch size of the other arms.
            content = json.loads((self.preprocessed / "nnUNetPlans.json").read_text())
            content["plans_name"] = run.title
            content["configurations"]["3d_fullres"]["batch_size"] = self.setting.batch_size
            (self.preprocessed / f"{run.title}.json").write_text(json.dumps(content))
            return
        # The baseline is planned for the same network, without weights.
        weights = ["--from_scratch"]
        if run.arm.pretraining is not None:
            weights = ["-pretrained_weights", str(self.checkpoint(run.arm.pretraining))]
        self.command(
            *(run.title, "misfm_plan", "-d", "704", "-c", "3d_fullres", "-overwrite_plans_name", run.title, *weights),
            *("-batch_size", str(self.setting.batch_size), "-seed", str(run.seed), "-num_epochs", epochs),
            *("-num_iterations_per_epoch", iterations, "-num_val_iterations_per_epoch", validation),
            *(*self.setting.network, *run.arm.plan),
        )

    def _logged(self, folder: Path) -> dict[str, list[float]]:
        """What nnU-Net logged after each epoch of a finished run."""
        program = (
            "import json, sys, torch; c = torch.load(sys.argv[1], map_location='cpu', weights_only=False)['logging']; "
            "print(json.dumps({name: list(map(float, c[name])) for name in sys.argv[2:]}))"
        )
        names = ("mean_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps")
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder / "checkpoint_final.pth"), *names],
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout))

    def command(self, title: str, *words: str) -> None:
        """Run a command as a user would; its output goes to a log of its own in the work folder.

        Raises:
            RunFailed: if the command does.
        """
        path = self.work / "logs" / f"{title}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as log:
            print("$", *words, file=log, flush=True)
            program = Path(sys.executable).parent / words[0]
            done = subprocess.run([str(program), *words[1:]], env=self.environment, stdout=log, stderr=log)
        if done.returncode != 0:
            raise RunFailed(f"{words[0]} ended with {done.returncode}; see {path}")


def dice(summary: Path, key: str) -> dict[str, Any]:
    """The foreground Dice of a summary.json of nnU-Net, and the Dice of each label."""
    content = json.loads(summary.read_text())
    per_label = {label: values["Dice"] for label, values in content["mean"].items()}
    return {key: content["foreground_mean"]["Dice"], f"{key}_per_label": per_label}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the study and its tuning have in common."""
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new run after this time")
