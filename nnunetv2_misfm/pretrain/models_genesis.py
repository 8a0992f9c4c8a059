"""Models Genesis: a crop is flipped, shuffled locally, bent in its intensities and painted over, and to be restored.

Image tensors are (B, C, X, Y, Z) in plans axis order, so X is the depth. Drawing what is done to a crop (numpy
generator in, plain values out) is separate from doing it (tensors in, tensors out).

Order, rates and laws are those of the authors' code (MrGiovanni/ModelsGenesis, `pytorch/utils.py` and `config.py`),
and so is the loss, the squared error over all voxels. Its windows and boxes are parts of the patch already, so the same
number of windows changes the same share of any patch. What differs:

- It works on CT between -1000 and 1000 HU, brought to [0, 1]. Here each channel of a crop is brought to [0, 1] by its
  own range, and back, so any normalisation will do; of a z-score its curves would leave nothing below the mean.
- Flips are along the volume's three axes. The authors' code draws among the first three of (C, X, Y, Z): a third of its
  flips change nothing, and none is along Z.
- Several channels share flips, windows and boxes, or one would show what another hides. Curves and noise are their own.
- Sides of windows may always be two voxels, and the border that painting keeps is narrower where a patch has no room.
- The target has mean 0 and standard deviation 1 (`reconstruction.py` says why), in place of the range [0, 1].
- The optimisation is nnssl's for this task, SGD at 1e-2 with momentum .99 and nnU-Net's decay, in place of SGD at 1
  with momentum .9, which is for targets in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.plans.settings import Settings, setting
from nnunetv2_misfm.pretrain.augment import flipped, intensity_range
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask, Target, standardised
from nnunetv2_misfm.pretrain.settings import AugmentSettings

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.batches import CropBatch
    from nnunetv2_misfm.pretrain.crop_reading import Crop
    from nnunetv2_misfm.pretrain.crops import SampleReader

# Fixed in the authors' code; lengths are parts of the patch's side, along each axis on its own.
_WINDOW_SIDE = 1 / 10  # of a shuffled window, at most
_IN_PAINTED_SIDE = (1 / 6, 1 / 3)
_OUT_PAINTED_AWAY = (3 / 7, 4 / 7)  # what a box that out-painting spares is shorter than the patch
_MOST_BOXES, _ANOTHER_BOX = 5, 0.95
_BORDER = 3  # voxels that in-painting spares and out-painting covers
_MOST_FLIPS = 3
# Knots of a curve, and entries of the table that stands for it: its error is 4e-7 of the range on average.
_CURVE_KNOTS, _CURVE_TABLE = 4096, 1024


class ModelsGenesisSettings(Settings):
    """How often each of the four changes is made, under the names of the authors' configuration."""

    flip_rate: float = setting(0.4, "probability of a flip, and then of each further flip", low=0, high=1)
    local_rate: float = setting(0.5, "probability of local shuffling", low=0, high=1)
    num_windows: int = setting(
        10000, "number of small windows in which local shuffling moves voxels", low=1, high=65536
    )
    nonlinear_rate: float = setting(0.9, "probability of bending intensities along a Bezier curve", low=0, high=1)
    paint_rate: float = setting(0.9, "probability of painting noise over parts of a crop", low=0, high=1)
    outpaint_rate: float = setting(
        0.8, "probability that the noise is painted around boxes rather than into them", low=0, high=1
    )


@dataclass(frozen=True, eq=False)
class Boxes:
    """Cuboids within a patch: `starts` and `sizes` are (N, 3) whole numbers, in voxels."""

    starts: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A cubic Bezier curve from (0, 0) to (1, 1), which never falls: its control points lie in the unit square.

    Attributes:
        control_points: the two free ones, (x, y) in 0..1.
        decreasing: the values of y are gone through backwards, so that 0 becomes 1 and 1 becomes 0.
    """

    control_points: tuple[tuple[float, float], tuple[float, float]]
    decreasing: bool


@dataclass(frozen=True, eq=False)
class Corruption:
    """What is done to one crop, in this order; None means not done.

    Attributes:
        flips: for each axis; the target is flipped too.
        windows: within each, voxels of the crop change places; a later window covers an earlier one.
        curves: one for each channel.
        boxes: of in-painting, or of what out-painting spares.
        out_painting: noise fills all but the boxes, instead of the boxes.
        shuffle_seed, noise_seed: of the order of voxels and of the noise; the same on the same type of device.
    """

    flips: tuple[bool, bool, bool] = (False, False, False)
    windows: Boxes | None = None
    curves: tuple[Curve, ...] | None = None
    boxes: Boxes | None = None
    out_painting: bool = False
    shuffle_seed: int = 0
    noise_seed: int = 0


def sample_corruption(
    shape: Sequence[int], settings: ModelsGenesisSettings, generator: np.random.Generator, num_channels: int
) -> Corruption:
    """Draw what is done to one crop of `shape` voxels (X, Y, Z)."""
    patch = np.asarray(shape)

    def drawn(rate: float) -> bool:
        return bool(generator.random() < rate)

    flips = _sample_flips(settings.flip_rate, generator)
    windows = _sample_windows(patch, settings.num_windows, generator) if drawn(settings.local_rate) else None
    curves = None
    if drawn(settings.nonlinear_rate):
        curves = tuple(_sample_curve(generator) for _ in range(num_channels))
    boxes, out_painting = None, False
    if drawn(settings.paint_rate):
        out_painting = drawn(settings.outpaint_rate)
        boxes = _sample_spared_boxes(patch, generator) if out_painting else _sample_painted_boxes(patch, generator)
    shuffle_seed, noise_seed = generator.integers(2**63, size=2).tolist()
    return Corruption(flips, windows, curves, boxes, out_painting, shuffle_seed, noise_seed)


@torch.no_grad()
def flip_crops(crops: Tensor, corruptions: Sequence[Corruption]) -> Tensor:
    """The flipped crops, which are the target.

    Args:
        crops: (B, C, X, Y, Z).
        corruptions: B of them.
    """
    return torch.stack([flipped(crop, one.flips) for crop, one in zip(crops, corruptions, strict=True)])


@torch.no_grad()
def corrupt(crops: Tensor, corruptions: Sequence[Corruption]) -> Tensor:
    """All that is done to crops after the flips: the input from the target.

    Nothing here waits for a GPU.

    Args:
        crops: (B, C, X, Y, Z), floating point.
        corruptions: B of them, drawn for patches of (X, Y, Z).
    """
    # Without the rarest voxels: one hot voxel would set the range.
    low, high = intensity_range(crops)
    corrupted = crops.clone()
    for index, (crop, corruption) in enumerate(zip(corrupted, corruptions, strict=True)):
        if corruption.windows is not None:
            _shuffle(crop, corruption.windows, corruption.shuffle_seed)
        if corruption.curves is not None:
            _bend(crop, low[index], high[index] - low[index], corruption.curves)
        if corruption.boxes is not None:
            _paint(crop, low[index], high[index] - low[index], corruption)
    return corrupted


def curve_table(curve: Curve) -> np.ndarray:
    """The curve's y at evenly spaced x from 0 to 1."""
    t = np.linspace(0, 1, _CURVE_KNOTS)
    bernstein = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    first, second = curve.control_points
    x, y = np.array([(0, 0), first, second, (1, 1)]).T @ bernstein
    return np.interp(np.linspace(0, 1, _CURVE_TABLE), x, y[::-1] if curve.decreasing else y)


def _sample_flips(rate: float, generator: np.random.Generator) -> tuple[bool, bool, bool]:
    """Up to three flips, each along an axis drawn anew: two along the same one undo each other."""
    count = _successes(_MOST_FLIPS, rate, generator)
    odd = np.bincount(generator.integers(3, size=count), minlength=3) % 2 == 1
    return bool(odd[0]), bool(odd[1]), bool(odd[2])


def _successes(most: int, rate: float, generator: np.random.Generator) -> int:
    """How many of up to `most` draws succeed before the first one that fails."""
    return int(np.cumprod(generator.random(most) < rate).sum())


def _sample_windows(patch: np.ndarray, count: int, generator: np.random.Generator) -> Boxes:
    longest = np.maximum((patch * _WINDOW_SIDE + 1e-9).astype(int), np.minimum(patch, 2))
    sizes = generator.integers(1, longest, size=(count, 3), endpoint=True)
    return Boxes(generator.integers(0, patch - sizes, endpoint=True), sizes)


def _sample_curve(generator: np.random.Generator) -> Curve:
    x1, y1, x2, y2 = generator.random(4).tolist()
    return Curve(((x1, y1), (x2, y2)), bool(generator.random() < 0.5))


def _sample_painted_boxes(patch: np.ndarray, generator: np.random.Generator) -> Boxes:
    count = _successes(_MOST_BOXES, _ANOTHER_BOX, generator)
    return _place(_sample_sides(patch, _IN_PAINTED_SIDE, count, generator), patch, generator)


def _sample_spared_boxes(patch: np.ndarray, generator: np.random.Generator) -> Boxes:
    count = 1 + _successes(_MOST_BOXES - 1, _ANOTHER_BOX, generator)
    return _place(patch - _sample_sides(patch, _OUT_PAINTED_AWAY, count, generator), patch, generator)


def _sample_sides(
    patch: np.ndarray, parts: tuple[float, float], count: int, generator: np.random.Generator
) -> np.ndarray:
    """Lengths between two parts of the patch, in whole voxels: (count, 3)."""
    shortest, longest = ((patch * part + 1e-9).astype(int) for part in parts)
    return generator.integers(shortest, longest, size=(count, 3), endpoint=True)


def _place(sizes: np.ndarray, patch: np.ndarray, generator: np.random.Generator) -> Boxes:
    sizes = np.maximum(sizes, 1)
    border = np.minimum(_BORDER, (patch - sizes) // 2)
    return Boxes(generator.integers(border, patch - sizes - border, endpoint=True), sizes)


def _shuffle(crop: Tensor, windows: Boxes, seed: int) -> None:
    """Move voxels of (C, X, Y, Z) within windows, in place.

    Every window takes the voxels of the unchanged crop in a random order. All windows are worked on at once: their
    voxels stand one window after another in a list, are sorted by window and a random number, and of the entries for
    one voxel of the crop the last one counts.
    """
    voxels, window = _voxels_of(windows, crop.shape[1:], crop.device)
    generator = torch.Generator(crop.device).manual_seed(seed)
    # A GPU sorts keys of 32 bits in half the time that 64 take, and on a CPU they leave room for what they order.
    # Next to 10,000 windows 17 bits are left for the random number.
    random_bits = 31 - len(windows.sizes).bit_length()
    keys = torch.empty_like(voxels).random_(2**random_bits, generator=generator).add_(window, alpha=2**random_bits)
    shuffled = _sorted_by(keys, voxels)
    flat = crop.flatten(1)
    entries = torch.arange(len(voxels), dtype=torch.int32, device=crop.device)
    last = torch.full_like(flat[0], -1, dtype=torch.int32).scatter_reduce_(0, voxels.long(), entries, "amax")
    stays = torch.arange(len(last), dtype=torch.int32, device=crop.device)
    source = torch.where(last < 0, stays, shuffled.index_select(0, last.clamp(min=0)))
    crop.copy_(flat.index_select(1, source).view_as(crop))


def _sorted_by(keys: Tensor, values: Tensor) -> Tensor:
    """Values ordered by their keys, both int32 from 0 on; where keys are equal, values have to rise, and still do."""
    if keys.device.type != "cpu":
        return values.index_select(0, keys.argsort(stable=True))
    # NumPy sorts pairs of key and value, each pair one number of 64 bits, in half the time of torch's argsort.
    pairs = (keys.numpy().astype(np.int64) << 32) | values.numpy()
    pairs.sort()
    return torch.from_numpy((pairs & 0xFFFFFFFF).astype(np.int32))


def _voxels_of(windows: Boxes, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in the flattened patch of all windows' voxels, window after window, and the window of each; int32."""
    starts, sizes = (
        torch.from_numpy(array.astype(np.int32)).to(device, non_blocking=True)
        for array in (windows.starts, windows.sizes)
    )
    # The numbers of slices, rows and voxels are known here, so that a GPU need not be asked for them.
    totals = windows.sizes.cumprod(axis=1).sum(axis=0).tolist()
    window = torch.arange(len(sizes), dtype=torch.int32, device=device)
    position = torch.zeros_like(window)
    for axis in range(3):
        # Windows become slices, slices rows, and rows voxels.
        position = position.mul_(shape[axis]).add_(starts[:, axis].index_select(0, window))
        parent, place = _numbered_runs(sizes[:, axis].index_select(0, window), totals[axis])
        position, window = place.add_(position.index_select(0, parent)), window.index_select(0, parent)
    return position, window


def _numbered_runs(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For runs of these lengths, `total` in all: the run that each entry is in, and its place in it from 0."""
    run = torch.repeat_interleave(lengths, output_size=total)
    starts = (lengths.cumsum(0) - lengths).int()
    return run, torch.arange(total, dtype=torch.int32, device=lengths.device).sub_(starts.index_select(0, run))


def _bend(crop: Tensor, low: Tensor, spread: Tensor, curves: Sequence[Curve]) -> None:
    """Bring each channel of (C, X, Y, Z) to 0..1, along its curve, and back, in place; `low` and `spread` are (C,)."""
    tables = torch.from_numpy(np.stack([curve_table(curve) for curve in curves])).to(crop)
    for channel, channel_low, channel_spread, table in zip(crop, low, spread, tables, strict=True):
        rises = table.diff()
        # A constant channel has no range: it becomes 0 here and its own value again below.
        scale = torch.where(channel_spread > torch.finfo(crop.dtype).tiny, len(rises) / channel_spread, 0.0)
        place = channel.sub_(channel_low).mul_(scale).clamp_(0, len(rises)).flatten()
        left = place.int().clamp_(max=len(rises) - 1)
        value = table.index_select(0, left) + (place - left) * rises.index_select(0, left)
        channel.copy_(value.mul_(channel_spread).add_(channel_low).view_as(channel))


def _paint(crop: Tensor, low: Tensor, spread: Tensor, corruption: Corruption) -> None:
    """Put uniform noise over each channel's range into the boxes of (C, X, Y, Z), or around them, in place."""
    assert corruption.boxes is not None
    inside = torch.zeros(crop.shape[1:], dtype=torch.bool, device=crop.device)
    stops = corruption.boxes.starts + corruption.boxes.sizes
    for (x0, y0, z0), (x1, y1, z1) in zip(corruption.boxes.starts.tolist(), stops.tolist(), strict=True):
        inside[x0:x1, y0:y1, z0:z1] = True
    generator = torch.Generator(crop.device).manual_seed(corruption.noise_seed)
    noise = torch.rand(crop.shape, generator=generator, device=crop.device, dtype=crop.dtype)
    noise.mul_(spread.view(-1, 1, 1, 1)).add_(low.view(-1, 1, 1, 1))
    crop.copy_(torch.where(inside, crop, noise) if corruption.out_painting else torch.where(inside, noise, crop))


class ModelsGenesis(ReconstructionTask[ModelsGenesisSettings]):
    """The task."""

    name = "models_genesis"
    title = "Models Genesis"
    Settings = ModelsGenesisSettings
    augmentation_defaults = AugmentSettings.off()

    def sample(self, reader: SampleReader) -> tuple[Sequence[Crop], Corruption]:
        """One crop, and what is done to it."""
        crops = reader.read([reader.augmentation()])
        return crops, sample_corruption(reader.patch_size, self.settings, reader.generator, reader.num_channels)

    def make(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, Target]:
        """The corrupted image, and the flipped one."""
        (crops,) = batch.patches(device)
        image = flip_crops(crops, batch.drawn)
        inside = batch.in_volume(device)
        inside = None if inside is None else flip_crops(inside, batch.drawn)
        return corrupt(image, batch.drawn), Target(standardised(image, inside), inside)
