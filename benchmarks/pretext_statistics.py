"""What the pretext tasks do to a crop, beside what the code that they are after does to the same crop.

    python benchmarks/pretext_statistics.py --nnssl nnssl --genesis ModelsGenesis --pymic PyMIC --vox2vec vox2vec

The checkouts (MIC-DKFZ/nnssl, MrGiovanni/ModelsGenesis, HiLab-git/PyMIC, mishgon/vox2vec) are imported from where they
are; what they need (batchgenerators, deprecated, imageio, loguru, pandas, pytorch-msssim, scikit-image; h5py, imops)
must be installed. What mishgon/vox2vec only needs to find its data sets is not.

A figure is taken from each draw; both codes draw equally often. Two samples of draws are compared by the
Kolmogorov-Smirnov test.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import random
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fusion_speed import PATCH, make_volume
from pretext_speed import VolumeReader
from provenance import device_name, provenance
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp, rankdata

from nnunetv2_misfm.pretrain.masked_autoencoder import MaskSettings, sample_mask
from nnunetv2_misfm.pretrain.models_genesis import ModelsGenesisSettings, corrupt, flip_crops, sample_corruption
from nnunetv2_misfm.pretrain.patch_swap import PatchSwapSettings, apply_swaps, sample_swaps
from nnunetv2_misfm.pretrain.vox2vec import Vox2Vec, Vox2VecSettings, change_intensities, sample_changes

RESULTS = Path(__file__).parent / "results" / "pretext_statistics.md"
MASKED_PATCH, GENESIS_PATCH, VOX2VEC_PATCH = (160, 160, 160), (64, 64, 32), (128, 128, 32)  # the sources'
LOW_HU, HIGH_HU = -1350.0, 1000.0  # the widest window of mishgon/vox2vec
MOST_IN_PAINTED = 0.3  # share of voxels; in-painting reaches 5/27, out-painting starts above .4

Figures = dict[str, float]  # what is measured of one draw
Draw = Callable[[int], Figures]


@dataclass(frozen=True)
class Comparison:
    """One corruption.

    Attributes:
        task: and the code that it is compared with.
        published: what the source says, by the name of the figure.
        ours, theirs: figures of draw i; theirs may leave some out.
    """

    task: str
    published: dict[str, str]
    ours: Draw
    theirs: Draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("nnssl", "genesis", "pymic", "vox2vec"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="checkout")
    parser.add_argument("--draws", type=int, default=300, help="of each corruption (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for comparison in (
        masks(options.nnssl),
        *genesis(options.genesis),
        swaps(options.pymic),
        pairs(options.pymic),
        intensities(options.vox2vec),
    ):
        rows += compared(comparison, options.draws)
        print("\n".join(rows[-len(comparison.published) :]), flush=True)
    checkouts = {
        "nnssl": options.nnssl,
        "ModelsGenesis": options.genesis,
        "PyMIC": options.pymic,
        "vox2vec": options.vox2vec,
    }
    options.output.write_text(make_report(rows, options.draws, checkouts), encoding="utf-8")


def compared(comparison: Comparison, draws: int) -> list[str]:
    """A row of the table for each published figure."""
    ours, theirs = ([draw(index) for index in range(draws)] for draw in (comparison.ours, comparison.theirs))
    rows = []
    for name, published in comparison.published.items():
        samples = [[figures[name] for figures in of_code if name in figures] for of_code in (theirs, ours)]
        agree = f"{ks_2samp(*samples).pvalue:.2f}" if all(samples) else "—"
        cells = " | ".join(summary(sample) for sample in samples)
        rows.append(f"| {comparison.task} | {name} | {published} | {cells} | {agree} |")
    return rows


def summary(sample: Sequence[float]) -> str:
    if not sample:
        return "—"
    if set(sample) <= {0.0, 1.0}:
        return f"{100 * np.mean(sample):.1f} %"
    return f"{np.mean(sample):.3f} ± {np.std(sample):.3f}"


def seed_everything(index: int) -> None:
    random.seed(index)
    np.random.seed(index)
    torch.manual_seed(index)


# ---------------------------------------------------------------- masked autoencoder


def masks(checkout: Path) -> Comparison:
    if not hasattr(typing, "override"):  # nnssl asks for Python 3.12 for this decorator alone
        typing.override = lambda method: method  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout / "src"))
    from nnssl.training.nnsslTrainer.masked_image_modeling.BaseMAETrainer import BaseMAETrainer

    def figures(hidden: np.ndarray) -> Figures:
        corner = hidden[tuple(slice(0, n // 2) for n in hidden.shape)]
        return {
            "voxels hidden": float(hidden.mean()),
            "side of a block, voxels": MASKED_PATCH[0] / hidden.shape[0],
            "hidden in the first octant": float(corner.mean()),
        }

    def theirs(index: int) -> Figures:
        seed_everything(index)
        return figures(BaseMAETrainer.mask_creation(1, MASKED_PATCH, 0.75)[0, 0].numpy() == 0)

    def ours(index: int) -> Figures:
        return figures(sample_mask(MASKED_PATCH, MaskSettings(), np.random.default_rng(index)))

    published = {"voxels hidden": ".75", "side of a block, voxels": "16", "hidden in the first octant": "uniform: .75"}
    return Comparison("masked_autoencoder, nnssl", published, ours, theirs)


# ---------------------------------------------------------------- Models Genesis


def flipping(crop: np.ndarray, x: np.ndarray, y: np.ndarray) -> Figures:
    return {"flipped": float((y != crop).any())}


def shuffling(crop: np.ndarray, x: np.ndarray, y: np.ndarray) -> Figures:
    changed = float((x != y).mean())
    return {"shuffled": float(changed > 0), **({"voxels moved, if shuffled": changed} if changed else {})}


def bending(crop: np.ndarray, x: np.ndarray, y: np.ndarray) -> Figures:
    if np.abs(x - y).max() < 1e-6:
        return {"bent": 0.0}
    falls = float(np.corrcoef(x.ravel(), y.ravel())[0, 1] < 0)
    return {"bent": 1.0, "decreasing, if bent": falls, "mean change of intensity, if bent": float(np.abs(x - y).mean())}


def painting(crop: np.ndarray, x: np.ndarray, y: np.ndarray) -> Figures:
    changed = float((x != y).mean())
    if changed == 0:
        return {"painted": 0.0}
    around = changed > MOST_IN_PAINTED
    kind = "voxels painted around boxes" if around else "voxels painted into boxes"
    return {"painted": 1.0, "around boxes, if painted": float(around), kind: changed}


GENESIS_STEPS = (
    (flipping, ("flip_rate",), {"flipped": ".4, and each further flip; .632 unflipped in the end"}),
    (shuffling, ("local_rate",), {"shuffled": ".5", "voxels moved, if shuffled": "10,000 windows of up to a tenth"}),
    (
        bending,
        ("nonlinear_rate",),
        {"bent": ".9", "decreasing, if bent": ".5", "mean change of intensity, if bent": "two free control points"},
    ),
    (
        painting,
        ("paint_rate", "outpaint_rate", "inpaint_rate"),
        {
            "painted": ".9",
            "around boxes, if painted": ".8",
            "voxels painted into boxes": "up to 5 boxes of a sixth to a third",
            "voxels painted around boxes": "all but 1 to 5 boxes of 3/7 to 4/7",
        },
    ),
)


def genesis(checkout: Path) -> Iterator[Comparison]:
    sys.path.insert(0, str(checkout / "pytorch"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # their settings make folders
        from config import models_genesis_config
        from utils import generate_pair
    crop = np.random.default_rng(0).random(GENESIS_PATCH)

    for measure, rates, published in GENESIS_STEPS:
        # One step at a time, at its published rate.
        steps = ("flip_rate", "local_rate", "nonlinear_rate", "paint_rate")
        off = {name: 0.0 for name in steps if name not in rates}
        config = types.SimpleNamespace(
            **{name: getattr(models_genesis_config, name) for name in (*steps, "inpaint_rate")}, save_samples=None
        )
        vars(config).update(off)
        settings = ModelsGenesisSettings(**off)

        def theirs(index: int, measure: Any = measure, config: Any = config) -> Figures:
            seed_everything(index)
            x, y = next(generate_pair(crop[None, None].copy(), 1, config))
            return measure(crop, x[0, 0], y[0, 0])

        def ours(index: int, measure: Any = measure, settings: Any = settings) -> Figures:
            drawn = [sample_corruption(GENESIS_PATCH, settings, np.random.default_rng(index), 1)]
            target = flip_crops(torch.from_numpy(crop)[None, None], drawn)
            return measure(crop, corrupt(target, drawn)[0, 0].numpy(), target[0, 0].numpy())

        yield Comparison("models_genesis, its authors", published, ours, theirs)


# ---------------------------------------------------------------- patch swapping


def swaps(checkout: Path) -> Comparison:
    sys.path.insert(0, str(checkout))
    from pymic.transform.intensity import PatchSwaping

    swapping = PatchSwaping(
        {"patchswaping_block_range": [20, 40], "patchswaping_block_size": [8, 16, 16], "task": None}
    )
    crop = np.random.default_rng(0).permutation(int(np.prod(PATCH))).reshape(1, *PATCH)

    def figures(swapped: np.ndarray) -> Figures:
        lost = float(np.mean(np.bincount(swapped.ravel(), minlength=crop.size) == 0))
        return {"voxels changed": float((swapped != crop).mean()), "values lost": lost}

    def theirs(index: int) -> Figures:
        seed_everything(index)
        return figures(swapping({"image": crop.copy()})["image"])

    def ours(index: int) -> Figures:
        drawn = sample_swaps(PATCH, PatchSwapSettings(), np.random.default_rng(index))
        swapped = torch.from_numpy(crop.copy())[None]
        apply_swaps(swapped, [drawn])
        sizes = {f"side of a block along {axis}, voxels": float(n) for axis, n in zip("XYZ", drawn.size, strict=True)}
        return {**figures(swapped[0].numpy()), "pairs of blocks": float(len(drawn.first)), **sizes}

    published = {
        "pairs of blocks": "20 to 40",
        "side of a block along X, voxels": "8",
        "side of a block along Y, voxels": "16",
        "side of a block along Z, voxels": "16",
        "voxels changed": "",
        "values lost": "none: blocks change places",
    }
    return Comparison("patch_swap, PyMIC", published, ours, theirs)


# ---------------------------------------------------------------- vox2vec


def pairs(checkout: Path) -> Comparison:
    from pymic.transform.crop4vox2vec import sample_views

    task = Vox2Vec(Vox2VecSettings())
    volume = make_volume(0)[None]

    def figures(shift: np.ndarray, number: int) -> Figures:
        shared = {
            f"overlap along {axis}": float(1 - abs(moved) / n)
            for axis, moved, n in zip("XYZ", shift, PATCH, strict=True)
        }
        return {**shared, "pairs of voxels": float(number)}

    def theirs(index: int) -> Figures:
        seed_everything(index)
        _, _, first, second = sample_views(volume, (48, 96, 96), PATCH, 1024)
        return figures((first - second)[0], len(first))

    def ours(index: int) -> Figures:
        (first, second), views = task.sample(VolumeReader(volume, task.name, index))
        return figures(np.subtract(second.start, first.start), views.points.shape[1])

    published = {f"overlap along {axis}": ".75 to 1" for axis in "XYZ"}
    return Comparison("vox2vec, PyMIC", {**published, "pairs of voxels": "up to 1024"}, ours, theirs)


class Anything:
    """What stands in for a base class, a decorator or a function that nothing here uses."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self


class OfTheirDataSets(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of what mishgon/vox2vec needs for its data sets and networks only."""

    NAMES = ("amid", "connectome", "more_itertools", "joblib", "pytorch_lightning", "sklearn")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.NAMES else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (Anything,), {})  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def intensities(checkout: Path) -> Comparison:
    sys.path.insert(0, str(checkout))
    sys.modules["numpy.core.numeric"] = np.lib.array_utils  # numpy 2's name for what they use of it
    sys.meta_path.insert(0, OfTheirDataSets())
    from vox2vec.pretrain.data import sample_view

    smooth = gaussian_filter(np.random.default_rng(0).standard_normal(VOX2VEC_PATCH), 3)
    base = ((rankdata(smooth) - 1) / (smooth.size - 1)).reshape(smooth.shape).astype(np.float32)
    windows = ((LOW_HU, HIGH_HU), (-1000.0, 300.0), (LOW_HU, HIGH_HU))
    depth_first = torch.from_numpy(np.moveaxis(base, 2, 0).copy())[None, None]

    def figures(changed: np.ndarray, original: np.ndarray) -> Figures:
        return {"mean change of intensity": float(np.abs(np.clip(changed, 0, 1) - original).mean())}

    def theirs(index: int) -> Figures:
        seed_everything(index)
        anchor = np.zeros(3, int)
        hounsfield = LOW_HU + (HIGH_HU - LOW_HU) * base
        return figures(sample_view(hounsfield, anchor[None], anchor, VOX2VEC_PATCH, *windows)[0], base)

    def ours(index: int) -> Figures:
        drawn = sample_changes(Vox2VecSettings(), np.random.default_rng(index), 1)
        return {
            "blurred or sharpened": float(drawn.sigma is not None),
            "noise": float(drawn.noise_std is not None),
            "window": float(drawn.windows is not None),
            **figures(change_intensities(depth_first, [drawn]).numpy(), depth_first.numpy()),
        }

    published = {"blurred or sharpened": ".5", "noise": ".5", "window": ".8", "mean change of intensity": ""}
    return Comparison("vox2vec, its authors", published, ours, theirs)


def make_report(rows: list[str], draws: int, checkouts: dict[str, Path]) -> str:
    command = (
        "python benchmarks/pretext_statistics.py --nnssl nnssl --genesis ModelsGenesis --pymic PyMIC --vox2vec vox2vec"
    )
    return "\n".join(
        [
            "# What the pretext tasks do to a crop",
            "",
            f"{draws} draws of each code on the same crop: share of the draws for what happens or not, otherwise mean "
            f"± standard deviation; amounts as parts of the crop if not in voxels. p: Kolmogorov-Smirnov test of the "
            f"two samples of draws; a dash where their code does not show the figure.",
            "",
            "| task, source | figure | published | the source's code | ours | p |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Models Genesis' authors flip (C, X, Y, Z) along one of the first three axes, so that a third of the flips "
            "change nothing: 27 % of their crops are flipped, 37 % of ours, which are flipped along X, Y and Z.",
            "",
            "PyMIC's blocks of a pair may overlap, and each is copied from the unchanged crop, so that values are "
            "lost. Ours lie apart and are swapped one pair after another, as in the paper, so that none is.",
            "",
            *provenance(command, ("torch", "numpy", "scipy"), checkouts, device_name("cpu")),
            "",
        ]
    )


if __name__ == "__main__":
    main()
