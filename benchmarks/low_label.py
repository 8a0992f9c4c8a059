"""Does pretraining help with few labels? Runs the commands that users run, on one dataset, arm by arm and seed by seed.

    python benchmarks/low_label.py --dataset .../Dataset004_Hippocampus --work FOLDER --setting cpu
        [--labelled 10] [--seeds 0 1 2 3 4] [--arms scratch boxes blocks encoder_only] [--minutes 150]

Every run leaves a small file in benchmarks/results/low_label/SETTING/ and is never done twice, so the study goes on
where it was stopped, also with other arms, seeds or numbers of labelled cases. low_label_report.py makes the table and
figure of what there is; it is called at the end.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from low_label_report import write_report
from provenance import processor

RESULTS = Path(__file__).parent / "results" / "low_label"
DATASET, POOL, WIDE_POOL = "Dataset704_LowLabel", "Dataset904_LowLabelPool", "Dataset905_LowLabelWidePool"
NUM_TEST, NUM_VALIDATION = 40, 20
LABELLED = (5, 10, 20, 0)  # 0 stands for all of them
MOST_SEEDS = 20


@dataclass(frozen=True)
class Setting:
    """How long and how large; the same for all arms."""

    device: str
    network: tuple[str, ...]
    batch_size: int
    pretraining: tuple[int, int]  # epochs, iterations of each
    finetuning: tuple[int, int, int]  # epochs, iterations and validation iterations of each
    predict: tuple[str, ...]


SETTINGS = {
    "cpu": Setting(
        device="cpu",
        network=("-features_per_stage", "8", "16", "32", "64", "128"),
        batch_size=2,
        pretraining=(30, 100),
        finetuning=(12, 25, 10),
        predict=("--disable_tta", "-npp", "1", "-nps", "1"),
    ),
    "gpu": Setting(
        device="cuda",
        network=(),
        batch_size=4,
        pretraining=(80, 250),
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


@dataclass(frozen=True)
class Arm:
    """What is trained: with which trainer, from which weights, with which options of misfm_plan."""

    pretraining: Pretraining | None = None
    plan: tuple[str, ...] = ()
    trainer: str = "MisFMTrainer"


BOXES = Pretraining("boxes", ("-geometry", "boxes"))
BLOCKS = Pretraining("blocks", ("-geometry", "blocks"))
ARMS = {
    "nnunet": Arm(trainer="LowLabelStockTrainer"),
    "scratch": Arm(),
    "boxes": Arm(BOXES),
    "blocks": Arm(BLOCKS),
    "encoder_only": Arm(BOXES, ("--encoder_only",)),
    "boxes_wide_pool": Arm(dataclasses.replace(BOXES, pool=WIDE_POOL)),
}
CORE = ("scratch", "boxes", "blocks", "encoder_only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset in nnU-Net's raw format")
    parser.add_argument("--more-volumes", type=Path, help="other volumes, for the arm boxes_wide_pool")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--labelled", type=int, nargs="+", default=[10], choices=LABELLED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(CORE))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new run after this time")
    options = parser.parse_args()
    study = Study(options.dataset, options.more_volumes, options.work.resolve(), options.setting)
    study.prepare()
    until = time.monotonic() + 60 * options.minutes
    for labelled in options.labelled:
        for seed in options.seeds:
            for arm in options.arms:
                if time.monotonic() < until:
                    study.run(arm, labelled, seed)
    print(write_report(RESULTS / options.setting, options.setting))


class Study:
    """One dataset in one setting."""

    def __init__(self, dataset: Path, more_volumes: Path | None, work: Path, setting: str):
        self.source = dataset.resolve()
        self.more_volumes = more_volumes
        self.name = setting
        self.setting = SETTINGS[setting]
        self.work = work
        self.raw = work / "nnUNet_raw" / DATASET
        self.preprocessed = work / "nnUNet_preprocessed" / DATASET
        self.results = work / "nnUNet_results"
        epochs, iterations, validation = self.setting.finetuning
        self.environment = {
            **os.environ,
            **{name: str(work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_extTrainer": str(Path(__file__).parent / "stock_trainer"),
            "LOW_LABEL_EPOCHS": str(epochs),
            "LOW_LABEL_ITERATIONS": str(iterations),
            "LOW_LABEL_VAL_ITERATIONS": str(validation),
        }
        if self.setting.device == "cpu":
            self.environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2", "nnUNet_compile": "0"}
            self.environment |= {"GOMP_SPINCOUNT": "3000"}
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (self.source / "labelsTr").glob("*.nii.gz"))
        by_hash = sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())
        self.test = by_hash[:NUM_TEST]
        self.validation = by_hash[NUM_TEST : NUM_TEST + NUM_VALIDATION]
        self.training = by_hash[NUM_TEST + NUM_VALIDATION :]

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
            self.command("nnUNetv2_plan_and_preprocess", "-d", "704", "-c", "3d_fullres", "-npfp", "2", "-np", "2")
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
        """Weights pretrained on a pool, made if they are not there."""
        plans = f"{pretraining.name}Plans"
        run = self.results / pretraining.pool / f"VolumeFusionTrainer__{plans}__3d_fullres" / "fold_all"
        checkpoint = run / "checkpoint_final.pth"
        if not checkpoint.is_file():
            epochs, iterations = map(str, self.setting.pretraining)
            folders = ["-i", str(self.work / "unlabelled")]
            if pretraining.pool == WIDE_POOL:
                if self.more_volumes is None:
                    raise SystemExit("the arm boxes_wide_pool needs --more-volumes")
                folders += ["-i", str(self.more_volumes)]
            number, name = pretraining.pool.removeprefix("Dataset").split("_", 1)
            continued = ["--c"] if (run / "checkpoint_latest.pth").is_file() else []
            self.command(
                *("misfm_pretrain", *folders, "-d", number, "-n", name, "-plans_from", "704"),
                *("-overwrite_plans_name", plans, "-device", self.setting.device),
                *("-num_epochs", epochs, "-num_iterations_per_epoch", iterations),
                *("-num_val_iterations_per_epoch", "10", "-batch_size", str(self.setting.batch_size)),
                *(*self.setting.network, *pretraining.options, *continued),
            )
        return checkpoint

    # ------------------------------------------------------------ one run

    def run(self, name: str, labelled: int, seed: int) -> None:
        """Train, predict the test cases and evaluate, unless that was done."""
        record = RESULTS / self.name / f"{name}_n{labelled or 'all'}_seed{seed}.json"
        if record.is_file():
            return
        folder, content = self.train(name, ARMS[name], labelled, seed)
        plans, fold = folder.parent.name.split("__")[1], folder.name.removeprefix("fold_")
        predictions = self.work / "predictions" / f"{plans}_{fold}"
        self.command(
            *("nnUNetv2_predict", "-i", str(self.raw / "imagesTs"), "-o", str(predictions), "-d", "704"),
            *("-c", "3d_fullres", "-f", fold, "-tr", ARMS[name].trainer, "-p", plans, "-device", self.setting.device),
            *self.setting.predict,
        )
        self.command(
            *("nnUNetv2_evaluate_folder", str(self.raw / "labelsTs"), str(predictions)),
            *("-djfile", str(self.raw / "dataset.json"), "-pfile", str(self.preprocessed / f"{plans}.json")),
            *("-np", "2"),
        )
        content |= dice(predictions / "summary.json", "test_dice")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(content, indent=1))
        shutil.rmtree(folder)

    def train(self, name: str, arm: Arm, labelled: int, seed: int) -> tuple[Path, dict[str, Any]]:
        """Plan and train one arm with the labelled cases of a seed.

        Returns:
            The folder of the trained fold, and what is to be recorded of the training.
        """
        print(f"--- {name}, {labelled or 'all'} labelled cases, seed {seed}", flush=True)
        plans, fold = f"{name}_{seed}", str(LABELLED.index(labelled) * MOST_SEEDS + seed)
        self._plan(arm, seed, plans)
        folder = self.results / DATASET / f"{arm.trainer}__{plans}__3d_fullres" / f"fold_{fold}"
        continued = ["--c"] if (folder / "checkpoint_latest.pth").is_file() else []
        self.command(
            *("nnUNetv2_train", "704", "3d_fullres", fold, "-tr", arm.trainer, "-p", plans),
            *("-device", self.setting.device, *continued),
        )
        logged = self._logged(folder)
        epochs = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=True)
        return folder, {
            "arm": name,
            "labelled": labelled or len(self.training),
            "seed": seed,
            "validation_curve": logged["mean_fg_dice"],
            **dice(folder / "validation" / "summary.json", "validation_dice"),
            "iterations_per_epoch": self.setting.finetuning[1],
            "training_seconds": round(sum(end - start for start, end in epochs)),
            "options": {
                "misfm_pretrain": " ".join(arm.pretraining.options) if arm.pretraining else None,
                "misfm_plan": " ".join(arm.plan),
            },
            "setting": dataclasses.asdict(self.setting),
            "device": processor() if self.setting.device == "cpu" else self.setting.device,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }

    def _plan(self, arm: Arm, seed: int, plans: str) -> None:
        epochs, iterations, validation = map(str, self.setting.finetuning)
        if arm.trainer == "LowLabelStockTrainer":
            # nnU-Net's own plans with the batch size of the other arms.
            content = json.loads((self.preprocessed / "nnUNetPlans.json").read_text())
            content["plans_name"] = plans
            content["configurations"]["3d_fullres"]["batch_size"] = self.setting.batch_size
            (self.preprocessed / f"{plans}.json").write_text(json.dumps(content))
            return
        # The baseline is planned for the same network, without weights.
        weights = ["--from_scratch"]
        if arm.pretraining is not None:
            weights = ["-pretrained_weights", str(self.checkpoint(arm.pretraining))]
        self.command(
            *("misfm_plan", "-d", "704", "-c", "3d_fullres", "-overwrite_plans_name", plans, *weights),
            *("-batch_size", str(self.setting.batch_size), "-seed", str(seed), "-num_epochs", epochs),
            *("-num_iterations_per_epoch", iterations, "-num_val_iterations_per_epoch", validation),
            *(*self.setting.network, *arm.plan),
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

    def command(self, *words: str) -> None:
        """Run a command as a user would; its output goes to the log in the work folder."""
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "low_label.log", "a") as log:
            print("$", *words, file=log, flush=True)
            program = Path(sys.executable).parent / words[0]
            done = subprocess.run([str(program), *words[1:]], env=self.environment, stdout=log, stderr=log)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)} failed; see {self.work / 'low_label.log'}")


def dice(summary: Path, key: str) -> dict[str, Any]:
    """The foreground Dice of a summary.json of nnU-Net, and the Dice of each label."""
    content = json.loads(summary.read_text())
    per_label = {label: values["Dice"] for label, values in content["mean"].items()}
    return {key: content["foreground_mean"]["Dice"], f"{key}_per_label": per_label}


if __name__ == "__main__":
    main()
