"""What pretraining brings with few labels on three public sets: each pretext task, probed and fine-tuned.

    python benchmarks/three_sets.py probe --data FOLDER --work FOLDER [--sets heart ...] [--common TASK ...]
        [--own TASK ...] [--own_long TASK ...]
    python benchmarks/three_sets.py compare --data FOLDER --work FOLDER [--network pctnet] [--labelled 5 10] [--seeds 5]
        [--first_seed 5] [--iterations 300] [--rates 3e-3 1e-2 --tuning_seeds 3] [--own_schedules]

FOLDER of --data holds the sets in nnU-Net's raw format; results/three_sets.md says where they come from. nnU-Net plans
and preprocesses them; tasks pretrain a small network on the images that misfm_compare neither tests nor validates on,
without their labels: those of --common on all sets together, those of --own on each set alone, those of --own_long on
it for four times as long. Then misfm_compare fits a linear classifier to the features (probe) or fine-tunes the network
(compare). Goes on where it was stopped. What it finds is kept in results/three_sets, of which three_sets_table.py makes
a table and a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunetv2_misfm.commands.compare.splits import split_cases
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS
from nnunetv2_misfm.pretrain.planning import plain_unet_stages

RESULTS = Path(__file__).parent / "results" / "three_sets"  # what misfm_compare found
FEATURES = [8, 16, 32, 64]
POOL_PLANS = "PoolPlans"
OWN_SCHEDULES = "own-schedules"  # ends the names of such results


@dataclass(frozen=True)
class LabelledSet:
    """One of the public sets, at one spacing.

    Attributes:
        folder: its name in nnU-Net's raw format.
        name: of its folder of images without labels.
        patch: patch of the small network, in plans axis order.
        strides: downsampling of its stages.
        num_test: patients that every run is tested on.
        own_pool: number of the dataset of its own images.
        patients: what finds a case's patient; None if each case is one.
        spacing: in mm, in the order of the images' axes; None for nnU-Net's.
    """

    folder: str
    name: str
    patch: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]
    num_test: int
    own_pool: int
    patients: str | None = None
    spacing: tuple[str, str, str] | None = None

    @property
    def id(self) -> str:
        return str(int(self.folder.removeprefix("Dataset").partition("_")[0]))

    @property
    def plans(self) -> str:
        """Plans with the small network."""
        return "TinyPlans" if self.spacing else "SmallPlans"


ISOTROPIC = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
THICK_SLICES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2))
PATIENT = r"patient\d+"
ATRIUM, HEART = ("Dataset005_LeftAtrium", "atrium"), ("Dataset006_ACDC", "heart")
SETS = {
    "hippocampus": LabelledSet("Dataset004_Hippocampus", "hippocampus", (32, 32, 32), ISOTROPIC, 40, 914),
    "atrium": LabelledSet(*ATRIUM, (24, 48, 48), ISOTROPIC, 20, 905),
    "heart": LabelledSet(*HEART, (8, 64, 64), THICK_SLICES, 10, 906, PATIENT),
    # Twice as coarse: a patch holds the whole organ, so a small network is done in minutes.
    "atrium-2.5mm": LabelledSet(*ATRIUM, (24, 40, 48), ISOTROPIC, 20, 915, None, ("2.5", "2.5", "2.5")),
    "heart-3mm": LabelledSet(*HEART, (8, 64, 64), THICK_SLICES, 10, 916, PATIENT, ("10", "3", "3")),
}


@dataclass(frozen=True)
class Pool:
    """Images to pretrain on.

    Attributes:
        name: "common", "own" or "own_long", which ends the names of its arms.
        images: their folder, below the one of all sets.
        dataset: of nnU-Net that is made of them.
        like: the set whose small plans give spacing, normalisation and network.
        crops: patch size.
        batch: batch size.
        epochs: of pretraining, as a multiple of the network's.
    """

    name: str
    images: str
    dataset: str
    like: str
    crops: tuple[int, int, int]
    batch: int
    epochs: int

    @property
    def options(self) -> tuple[str, ...]:
        """Of misfm_pretrain."""
        return ("-patch_size", *map(str, self.crops), "-batch_size", str(self.batch))


COMMON = Pool("common", ".", "Dataset900_Common", "atrium", (32, 32, 32), 8, 1)


def own_pool(name: str) -> Pool:
    """A set's own images, in crops of the fine-tuning's size."""
    labelled = SETS[name]
    return Pool("own", labelled.name, f"Dataset{labelled.own_pool}_{labelled.name}", name, labelled.patch, 4, 3)


def long_pool(name: str) -> Pool:
    """The same images for four times as many iterations."""
    own = own_pool(name)
    return replace(own, name="own_long", epochs=4 * own.epochs)


# What differs from the tasks' defaults, which are for long runs: boxes a small network learns in minutes.
FEW_LARGE_BOXES = ("-num_boxes", "3", "10", "-box_size_min", *3 * ("0.25",), "-box_size_max", *3 * ("0.75",))
ITERATIONS, VALIDATION = 50, 8  # of an epoch of pretraining
PRETRAINING = ("-optimizer", "adamw", "-initial_lr", "3e-3", "-schedule", "poly")
TASK_OPTIONS = {"volume_fusion": FEW_LARGE_BOXES, "vox2vec": ("-initial_lr", "1e-3")}
EPOCH = 50  # iterations of fine-tuning


@dataclass(frozen=True)
class Network:
    """What is pretrained and fine-tuned.

    Attributes:
        short, title: for the figure and the tables.
        options: of misfm_pretrain.
        epochs: of pretraining, of ITERATIONS each.
        other_epochs: of tasks that have another number of them.
    """

    short: str
    title: str
    options: tuple[str, ...]
    epochs: int
    other_epochs: Mapping[str, int] = field(default_factory=dict)


PCT_FEATURES = [8, 16, 32, 64, 128]
NETWORKS = {
    "unet": Network("U-Net", f"U-Net, {FEATURES} features", ("-network", "plan"), 10),
    "pctnet": Network(
        "PCT-Net",
        f"PCT-Net, {PCT_FEATURES} features",
        ("-network", "pctnet", "-features_per_stage", *map(str, PCT_FEATURES)),
        20,
        {"vox2vec": 12},  # whose steps take longer
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pretrain", "probe", "compare"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    tasks = {"nargs": "*", "choices": PRETEXT_TASKS, "metavar": "TASK"}
    parser.add_argument("--common", **tasks, default=list(PRETEXT_TASKS), help="pretrained on all sets (default: all)")
    parser.add_argument("--own", **tasks, default=[], help="pretrained on the set's own images alone (default: none)")
    parser.add_argument("--own_long", **tasks, default=[], help="the same for four times as long (default: none)")
    parser.add_argument("--network", choices=NETWORKS, default="unet", help="(default: %(default)s)")
    parser.add_argument("--labelled", nargs="+", default=["10"], help="patients (default: %(default)s)")
    parser.add_argument("--seeds", default="5", help="draws of them (default: %(default)s)")
    parser.add_argument("--first_seed", default="0", help="to repeat with fresh draws (default: %(default)s)")
    parser.add_argument(
        "--iterations", type=int, default=1000, help=f"of fine-tuning, a multiple of {EPOCH} (default: %(default)s)"
    )
    parser.add_argument("--rates", nargs="+", default=["3e-3"], help="of all arms (default: %(default)s)")
    parser.add_argument("--tuning_seeds", default="1", help="draws to choose of several with (default: %(default)s)")
    parser.add_argument("--own_schedules", action="store_true", help="as that of misfm_compare")
    parser.add_argument(
        "--nnunet", nargs="+", default=[], metavar="RATE", help="an arm with nnU-Net's own trainer, at such rates"
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", default="1", help="runs at once (default: %(default)s)")
    options = parser.parse_args()
    if options.iterations % EPOCH:
        parser.error(f"--iterations {options.iterations} is not a multiple of {EPOCH}")
    if options.nnunet and len(options.nnunet) != len(options.rates):
        parser.error("give as many rates to --nnunet as to --rates")
    use_folders(options.work)
    for name in SETS if options.common else options.sets:  # the common pool is of all
        prepare(SETS[name], options.data, options.work)
    common = [pretrained(task, COMMON, options) for task in options.common]
    for name in options.sets:
        own = [pretrained(task, own_pool(name), options) for task in options.own]
        own += [pretrained(task, long_pool(name), options) for task in options.own_long]
        if options.what != "pretrain":
            compare(name, [*common, *own], options)


def use_folders(work: Path) -> None:
    """nnU-Net's folders, for this process and those it starts."""
    for name in ("raw", "preprocessed", "results"):
        folder = work.resolve() / f"nnUNet_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)


def prepare(labelled: LabelledSet, data: Path, work: Path) -> None:
    """nnU-Net's preprocessed data, plans with a small network beside nnU-Net's, and the images to pretrain on."""
    raw = Path(os.environ["nnUNet_raw"]) / labelled.folder
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / labelled.folder
    if not raw.exists():
        raw.symlink_to((data / labelled.folder).resolve(), target_is_directory=True)
    if not (preprocessed / f"{labelled.plans}.json").is_file():
        base = "nnUNetPlans"
        if not (preprocessed / f"{base}.json").is_file():
            command("nnUNetv2_plan_and_preprocess", "-d", labelled.id, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        if labelled.spacing:
            base = "LowPlans"
            spacing = ("-overwrite_target_spacing", *labelled.spacing, "-overwrite_plans_name", base)
            command("nnUNetv2_plan_experiment", "-d", labelled.id, *spacing)
            command("nnUNetv2_preprocess", "-d", labelled.id, "-c", "3d_fullres", "-plans_name", base, "-np", "2")
        plans = json.loads((preprocessed / f"{base}.json").read_text(encoding="utf-8"))
        small = json.dumps(small_plans(plans, labelled), indent=4)
        (preprocessed / f"{labelled.plans}.json").write_text(small, encoding="utf-8")
    copy_unlabelled(raw, work / "unlabelled" / labelled.name, labelled)


def small_plans(plans: dict, labelled: LabelledSet) -> dict:
    """nnU-Net's plans with a U-Net of four stages, kernels of 3x3x3 and a small patch."""
    plans = deepcopy(plans) | {"plans_name": labelled.plans}
    entry = plans["configurations"]["3d_fullres"]
    entry["architecture"]["arch_kwargs"] |= plain_unet_stages(FEATURES, labelled.strides)
    entry |= {"patch_size": list(labelled.patch), "batch_size": 2}
    return plans


def copy_unlabelled(raw: Path, target: Path, labelled: LabelledSet) -> None:
    """The images of the patients that misfm_compare neither tests nor validates on."""
    ending = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    cases = [path.name.removesuffix(ending) for path in (raw / "labelsTr").glob(f"*{ending}")]
    split = split_cases(cases, labelled.patients, labelled.num_test, None)
    target.mkdir(parents=True, exist_ok=True)
    for case in split.cases_of(split.training):
        for image in (raw / "imagesTr").glob(f"{case}_????{ending}"):
            if not (target / image.name).is_file():
                shutil.copy(image, target)


def pretrained(task: str, pool: Pool, options: argparse.Namespace) -> str:
    """The checkpoint of a task on a pool, made if it is not there, as NAME=FILE."""
    results = Path(os.environ["nnUNet_results"]) / pool.dataset
    number, _, name = pool.dataset.removeprefix("Dataset").partition("_")
    if not (Path(os.environ["nnUNet_preprocessed"]) / pool.dataset / f"{POOL_PLANS}.json").is_file():
        # Once for all tasks, which share its arrays.
        images = str(options.work / "unlabelled" / pool.images)
        command(
            *("misfm_pretrain", "-i", images, "-d", number, "-n", name, "--only_prepare", "-network", "plan"),
            *("-plans_from", SETS[pool.like].id, "-p", SETS[pool.like].plans, "-overwrite_plans_name"),
            *(POOL_PLANS, *pool.options),
        )
    network = NETWORKS[options.network]
    epochs = pool.epochs * network.other_epochs.get(task, network.epochs)
    plans = task if options.network == "unet" else f"{options.network}_{task}"
    plans += "_long" if pool.name == "own_long" else ""
    found = list(results.glob(f"*__{plans}__3d_fullres/fold_all/checkpoint_*.pth"))
    if not any(path.name == "checkpoint_final.pth" for path in found):
        command(
            *("misfm_pretrain", "-d", number, "-p", POOL_PLANS, "-pretext", task, "-overwrite_plans_name", plans),
            *("-num_epochs", str(epochs), "-num_iterations_per_epoch", str(ITERATIONS)),
            *("-num_val_iterations_per_epoch", str(VALIDATION), "-device", options.device),
            *(*network.options, *pool.options, *PRETRAINING, *TASK_OPTIONS.get(task, ())),
            *(["--c"] if found else []),
        )
    (final,) = results.glob(f"*__{plans}__3d_fullres/fold_all/checkpoint_final.pth")
    return f"{task}_{pool.name}={final}"


def compare(name: str, weights: Sequence[str], options: argparse.Namespace) -> None:
    labelled = SETS[name]
    work = options.work.resolve()
    output = work / f"{options.what}_{name}_{options.network}"
    arms = ["misfm_compare", "-d", labelled.id, "-p", labelled.plans, "-pretrained_weights", *weights, "--from_scratch"]
    draws = ("-seeds", options.seeds, "-first_seed", options.first_seed)
    cases = ("-num_labelled", *options.labelled, *draws, "-num_test", str(labelled.num_test))
    where = ("-device", options.device, "-jobs", options.jobs)
    patients = ("-patients", labelled.patients) if labelled.patients else ()
    if options.what == "probe":
        arms += ["--probe"]
    else:
        output = output.with_name(f"{output.name}_{options.iterations}_{'+'.join(options.labelled)}")
        epochs = ("-num_epochs", str(options.iterations // EPOCH), "-num_iterations_per_epoch", str(EPOCH))
        arms += ["-initial_lr", *options.rates, "-tuning_seeds", options.tuning_seeds, "--disable_tta"]
        arms += [*epochs, "-num_val_iterations_per_epoch", str(EPOCH // 8)]
        if options.own_schedules:
            arms += ["--own_schedules"]
            output = output.with_name(f"{output.name}_{OWN_SCHEDULES}")
        arms += ["--nnunet", "-nnunet_lr", *options.nnunet] if options.nnunet else []
    if options.first_seed != "0":
        output = output.with_name(f"{output.name}_from{options.first_seed}")
    command(*arms, *cases, *patients, *where, "-o", str(output))
    RESULTS.mkdir(exist_ok=True)
    summary = (output / "summary.json").read_text(encoding="utf-8").replace(str(work), "WORK")
    (RESULTS / f"{output.name}.json").write_text(summary, encoding="utf-8")


def command(*words: str) -> None:
    """Run a command as a user would; end with its status if it fails."""
    print("$", *words, flush=True)
    status = subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]]).returncode
    if status != 0:
        sys.exit(status)


if __name__ == "__main__":
    main()
