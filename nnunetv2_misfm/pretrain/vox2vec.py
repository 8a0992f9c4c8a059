"""vox2vec: two overlapping crops of a volume, each changed in its own way; a voxel's vectors in both are to be alike.

Image tensors are (B, C, X, Y, Z) in plans axis order, so X is the depth.

Published by Goncharov et al. (MICCAI 2023). Figures are those of the authors' code (mishgon/vox2vec,
`vox2vec/pretrain/data.py` and `model.py`), in the form that PyMIC gives them (`pymic/transform/crop4vox2vec.py`,
`self_vox2vec.py`): a network's encoder in place of a feature pyramid, crops that share three quarters of each axis, and
voxels that are told from others of the same two crops, not of the batch. What differs:

- Intensities are in parts of each channel's range in the crop, in place of Hounsfield units, so any normalisation will
  do. Each channel has a window of its own.
- Which voxels are of the body is told by that range too, see `shared_voxels.py`, not by -500 HU and filling.
- The projection has LayerNorm in place of BatchNorm: a voxel's vector does not depend on which others were drawn, and
  several processes do what one does.
- The optimiser is AdamW in place of Adam, and the learning rate is halved after each fifth of a run, as in the other
  tasks.

The decoder is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.network_entry import ENCODER, STEM
from nnunetv2_misfm.plans.run_settings import PretrainingSettings
from nnunetv2_misfm.plans.settings import Settings, setting
from nnunetv2_misfm.pretrain.augment import blur, intensity_range
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.shared_voxels import sample_points
from nnunetv2_misfm.pretrain.task import PretextTask, Scores, not_moving

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.batches import CropBatch
    from nnunetv2_misfm.pretrain.crop_reading import Crop
    from nnunetv2_misfm.pretrain.crops import SampleReader

# Strengths of the authors' code; noise and window ends as parts of their widest window, -1350 to 1000 HU.
_BLUR_SIGMA = (0.25, 1.5)  # voxels, in plane
_SHARPENING_SIGMA, _SHARPENING_NARROW_SIGMA, _SHARPENING = (0.5, 1.0), 0.5, (10.0, 30.0)
_NOISE_STD = (0.0, 30 / 2350)
_WINDOW_START, _WINDOW_STOP = (0.0, 350 / 2350), (1650 / 2350, 1.0)
_IN_PLANE = (2, 3)  # axes Y and Z of (C, X, Y, Z)
_MUCH_MORE = 3  # times as often as by chance
_SLICES_SHOWN = 32  # in a picture: voxels within this part of the depth are drawn into one slice


class Vox2VecSettings(Settings):
    """How pairs of crops are made, and how voxels are compared."""

    min_overlap: tuple[float, float, float] = setting(
        (0.75, 0.75, 0.75),
        "least share of the patch that the two crops have in common, along each axis",
        above=0,
        high=1,
    )
    num_points: int = setting(1024, "greatest number of voxels that are compared in a pair of crops", low=2)
    sharpness_rate: float = setting(0.5, "probability of blurring or sharpening a crop", low=0, high=1)
    noise_rate: float = setting(0.5, "probability of Gaussian noise on a crop", low=0, high=1)
    window_rate: float = setting(0.8, "probability of showing a crop in another intensity window", low=0, high=1)
    temperature: float = setting(0.1, "temperature of the InfoNCE loss", above=0)
    embedding_size: int = setting(128, "length of a voxel's projected vector", low=1)


@dataclass(frozen=True)
class ViewChanges:
    """What is done to the intensities of one crop, in this order; None means not done.

    Attributes:
        sigma: of a Gaussian filter in plane, in voxels.
        sharpening: how much of the difference to a narrower filter is added then.
        noise_std: as a part of each channel's range.
        noise_seed: the same noise on the same type of device.
        windows: for each channel, the parts (low, high) of its range that become the ends of its range.
    """

    sigma: float | None = None
    sharpening: float | None = None
    noise_std: float | None = None
    noise_seed: int = 0
    windows: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True, eq=False)
class Views:
    """What two crops of a volume have in common, and how each is changed.

    Attributes:
        points: (2, N, 3) whole numbers: the same N voxels of the volume in the first and in the second patch.
        changes: of the first and of the second.
    """

    points: np.ndarray
    changes: tuple[ViewChanges, ViewChanges]


@dataclass(frozen=True, eq=False)
class Matches:
    """The same voxels in both views of B pairs.

    Attributes:
        points: (2 B, N, 3) places: of the B first views, then of the B second ones.
        there: (B, N), False for places that hold no voxel, because another pair has more.
    """

    points: Tensor
    there: Tensor


def overlap_voxels(patch_size: Sequence[int], settings: Vox2VecSettings) -> tuple[int, int, int]:
    """How many voxels of the patch two crops share at least, for each axis."""
    x, y, z = (int(np.ceil(n * part - 1e-9)) for n, part in zip(patch_size, settings.min_overlap, strict=True))
    return x, y, z


def sample_changes(settings: Vox2VecSettings, generator: np.random.Generator, num_channels: int) -> ViewChanges:
    """Draw what is done to the intensities of one crop."""

    def drawn(rate: float) -> bool:
        return bool(generator.random() < rate)

    def between(ends: tuple[float, float]) -> float:
        return float(generator.uniform(*ends))

    sigma = sharpening = noise_std = windows = None
    if drawn(settings.sharpness_rate):
        if drawn(0.5):
            sigma = between(_BLUR_SIGMA)
        else:
            sigma, sharpening = between(_SHARPENING_SIGMA), between(_SHARPENING)
    if drawn(settings.noise_rate):
        noise_std = between(_NOISE_STD)
    if drawn(settings.window_rate):
        windows = tuple((between(_WINDOW_START), between(_WINDOW_STOP)) for _ in range(num_channels))
    return ViewChanges(sigma, sharpening, noise_std, int(generator.integers(2**63)), windows)


@torch.no_grad()
def change_intensities(patches: Tensor, changes: Sequence[ViewChanges]) -> Tensor:
    """Blur or sharpen, add noise and choose a window.

    Args:
        patches: (B, C, X, Y, Z), floating point.
        changes: B of them.
    """
    low, high = intensity_range(patches)
    changed = patches.clone()
    for index, (patch, drawn) in enumerate(zip(changed, changes, strict=True)):
        start, spread = (v[index].view(-1, 1, 1, 1) for v in (low, high - low))
        if drawn.sigma is not None:
            blurred = blur(patch, drawn.sigma, _IN_PLANE)
            if drawn.sharpening is not None:
                narrow = blur(blurred, _SHARPENING_NARROW_SIGMA, _IN_PLANE)
                blurred = blurred.add_(blurred - narrow, alpha=drawn.sharpening)
            patch.copy_(blurred)
        if drawn.noise_std is not None:
            generator = torch.Generator(patch.device).manual_seed(drawn.noise_seed)
            noise = torch.randn(patch.shape, generator=generator, device=patch.device, dtype=patch.dtype)
            patch.add_(noise.mul_(spread), alpha=drawn.noise_std)
        if drawn.windows is not None:
            for channel, (a, b), c, s in zip(patch, drawn.windows, start, spread, strict=True):
                # The window's ends become the range's; a constant channel stays as it is.
                channel.sub_(c + a * s).mul_(1 / (b - a)).clamp_(min=0)
                torch.minimum(channel, s, out=channel).add_(c)
    return changed


def voxel_vectors(levels: Sequence[Tensor], points: Tensor, input_size: Sequence[int]) -> Tensor:
    """The vectors that the feature maps of all levels hold for some voxels, one after another.

    Args:
        levels: (B, C_l, X_l, Y_l, Z_l), of any strides.
        points: (B, N, 3) voxels of the input.
        input_size: (X, Y, Z) of the input that the levels were made of, which their sizes divide.

    Returns:
        (B, N, sum of C_l).
    """
    vectors = []
    for level in levels:
        size = level.shape[2:]
        stride = torch.tensor([n // m for n, m in zip(input_size, size, strict=True)], device=points.device)
        x, y, z = (points // stride).unbind(2)
        place = (x * size[1] + y) * size[2] + z
        vectors.append(level.flatten(2).gather(2, place[:, None].expand(-1, level.shape[1], -1)))
    return torch.cat(vectors, dim=1).transpose(1, 2)


class Projection(nn.Sequential):
    """Three linear layers from a voxel's vector to one of unit length."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(
            nn.Linear(in_features, in_features),
            nn.LayerNorm(in_features),
            nn.ReLU(),
            nn.Linear(in_features, in_features),
            nn.LayerNorm(in_features),
            nn.ReLU(),
            nn.Linear(in_features, out_features),
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.normalize(super().forward(vectors), dim=-1)


def info_nce(first: Tensor, second: Tensor, there: Tensor, temperature: float) -> Tensor:
    """How badly each voxel's vector in one view is told from all others by its vector in the other view.

    The others are all other voxels of the pair, in both views.

    Args:
        first, second: (B, N, E) vectors of unit length, those of one voxel at the same place.
        there: (B, N), False for places that hold no voxel; each of the B pairs has at least one.
        temperature: what similarities are divided by.

    Returns:
        the mean over pairs of the mean over voxels and views of the cross entropy.
    """
    losses = []
    for own, other, here in zip(first, second, there, strict=True):
        # Pair by pair: the similarities of one fit into a processor's cache.
        views = torch.cat([own[here], other[here]])
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        similarity = (views @ views.mT / temperature).masked_fill(itself, -torch.inf)
        match = torch.arange(len(views), device=views.device).roll(len(views) // 2)
        losses.append(F.cross_entropy(similarity, match))
    return torch.stack(losses).mean()


def retrieved(first: Tensor, second: Tensor, there: Tensor) -> Tensor:
    """Which voxels of the first view are most like themselves among all of the second: (B, N); see `info_nce`."""
    similarity = (first @ second.mT).masked_fill(~there[:, None], -torch.inf)
    return (similarity.argmax(2) == torch.arange(first.shape[1], device=first.device)) & there


def _places_of(views: Sequence[Views], device: torch.device) -> Matches:
    most = max(pair.points.shape[1] for pair in views)
    points = np.zeros((2, len(views), most, 3), dtype=np.int64)
    there = np.zeros((len(views), most), dtype=bool)
    for index, pair in enumerate(views):
        number = pair.points.shape[1]
        points[:, index, :number] = pair.points
        there[index, :number] = True
    flat = torch.from_numpy(points).flatten(0, 1)
    return Matches(flat.to(device, non_blocking=True), torch.from_numpy(there).to(device, non_blocking=True))


def _voxels_to_show(target: Matches, pair: int, depth: int) -> tuple[tuple[int, int], np.ndarray]:
    """The slice of the first patch that most voxels of a pair are in, the slice of the second patch that they are in
    there, and which voxels lie in or near it."""
    number = int(target.there[pair].sum())
    first, second = (points[pair, :number, 0].cpu().numpy() for points in target.points.chunk(2))
    middle = int(np.bincount(first).argmax())
    near = np.flatnonzero(np.abs(first - middle) <= depth // _SLICES_SHOWN)
    return (middle, int(np.median(second[first == middle]))), near


def encoder_channels(network: nn.Module) -> list[int]:
    """Channels of the feature maps that a network's encoder gives.

    Raises:
        PlanError: if it has no encoder that tells.
    """
    channels = getattr(getattr(network, "encoder", None), "output_channels", None)
    if channels is None:
        raise PlanError(
            f"vox2vec compares what the levels of an encoder hold, and {type(network).__name__} has no encoder with "
            f"levels. Choose another -pretext, or -network pctnet."
        )
    return [int(number) for number in channels]


def encoder_maps(network: nn.Module, x: Tensor) -> tuple[list[Tensor], list[int]]:
    """The feature maps of a network's encoder, and the size (X, Y, Z) of the input that they divide."""
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper compiles the whole forward pass alone
    if hasattr(network, "encode"):  # one of ours, which pads inside
        return network.encode(x), network.padded_size(x.shape[2:])  # type: ignore[operator]
    return network.encoder(x), list(x.shape[2:])  # type: ignore[operator]


class Vox2Vec(PretextTask[Vox2VecSettings]):
    """The task."""

    name = "vox2vec"
    title = "vox2vec; shares in plans axis order"
    Settings = Vox2VecSettings
    trains = (STEM, ENCODER)
    inputs_per_sample = 2
    tells_places = True
    picture_caption = (
        "Each row is a pair of crops of one volume. The points are voxels that both crops show: green where the "
        "network finds the voxel of the first crop again in the second, red where it does not."
    )
    score_captions = {
        "retrieved": "The share of the voxels that are found again in the other crop.",
        "retrieved_by_chance": "The share that guessing would find.",
    }
    run_defaults = PretrainingSettings(num_epochs=320, initial_lr=3e-4)
    augmentation_defaults = AugmentSettings.off()
    _encoder_maps: Any = staticmethod(encoder_maps)

    def num_outputs(self, num_channels: int) -> int:
        """The least that a network is built with: its segmentation layers are left out."""
        return 1

    def sample(self, reader: SampleReader) -> tuple[Sequence[Crop], Views]:
        """Two crops of a volume, voxels that both have, and how each is changed."""
        generator = reader.generator
        augmentations = [reader.augmentation(), reader.augmentation()]
        first, second = reader.read(augmentations, overlap_voxels(reader.patch_size, self.settings))
        points = sample_points(first, second, reader.patch_size, self.settings.num_points, generator)
        changes = [sample_changes(self.settings, generator, reader.num_channels) for _ in range(2)]
        return [first, second], Views(points, (changes[0], changes[1]))

    def make(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, Matches]:
        """All first views, then all second ones, and the voxels that they share."""
        views = [
            change_intensities(patches, [pair.changes[which] for pair in batch.drawn])
            for which, patches in enumerate(batch.patches(device))
        ]
        return torch.cat(views), _places_of(batch.drawn, device)

    def head(self, network: nn.Module, num_channels: int) -> Projection:
        """The projection of a voxel's vector."""
        return Projection(sum(encoder_channels(network)), self.settings.embedding_size)

    def compile(self) -> None:
        """The encoder: of the network, only the way through all of it is compiled."""
        self._encoder_maps = torch.compile(encoder_maps)

    def forward(self, network: nn.Module, head: nn.Module | None, x: Tensor, target: Matches | None) -> Tensor:
        """(2 B, N, E) projected vectors of the voxels asked for."""
        assert head is not None
        if target is None:
            points = torch.zeros((len(x), self.settings.num_points, 3), dtype=torch.int64, device=x.device)
        else:
            points = target.points
        maps, size = self._encoder_maps(network, x)
        vectors: Tensor = head(voxel_vectors(maps, points, size))
        return vectors

    def loss(self, outputs: Tensor, target: Matches) -> Tensor:
        """See `info_nce`; in full precision, for similarities are divided by a small temperature."""
        with torch.autocast(outputs.device.type, enabled=False):
            first, second = outputs.float().chunk(2)
            return info_nce(first, second, target.there, self.settings.temperature)

    def count(self, outputs: Tensor, target: Matches) -> dict[str, Any]:
        """Voxels that are found again, and all; and, for chance, what guessing would find."""
        first, second = outputs.chunk(2)
        found = retrieved(first, second, target.there)
        return {"found": found.sum().item(), "voxels": target.there.sum().item(), "guessed": len(found)}

    def scores(self, sums: Mapping[str, Any]) -> Scores:
        """Share of the voxels that are most like themselves among all compared ones of the other crop."""
        found, guessed = sums["found"] / sums["voxels"], sums["guessed"] / sums["voxels"]
        return Scores(
            main=found,
            parts=[found],
            values={"retrieved": found, "retrieved_by_chance": guessed},
            text=f"{100 * found:.1f} % of voxels found again in the other crop ({100 * guessed:.1f} % by chance)",
        )

    def alarms(self, losses: Sequence[float], scores: Scores) -> list[str]:
        """A loss that stays while hardly more is found than by chance."""
        chance = float(scores.values["retrieved_by_chance"])  # type: ignore[arg-type]
        if scores.main > _MUCH_MORE * chance or not (still := not_moving(losses)):
            return []
        return [
            f"{still}, and voxels are found again hardly more often than by chance. Try another -initial_lr, or look "
            f"at {self.picture_name} for volumes without contrast."
        ]

    def picture(self, path: Path, x: Tensor, target: Matches, outputs: Tensor) -> None:
        """A row for each pair: a slice of either crop with its matched voxels, green if found again, red if not."""
        from nnunetv2_misfm.pretrain.picture import Panel, grey, write_panels

        vectors = outputs.chunk(2)
        found = retrieved(vectors[0], vectors[1], target.there).cpu().numpy()
        shown = [_voxels_to_show(target, pair, x.shape[2]) for pair in range(len(found))]
        panels = []
        for view, title in enumerate(("first crop", "second crop")):
            images = x.chunk(2)[view]
            # Each pair has a slice of its own.
            slices = torch.stack([image[:, [rows[view]]] for image, (rows, _) in zip(images, shown, strict=True)])
            points = target.points.chunk(2)[view].cpu().numpy()
            marks = [(points[pair, which, 1:], found[pair, which]) for pair, (_, which) in enumerate(shown)]
            panels.append(Panel(title, slices, grey, marks=marks))
        write_panels(path, panels)
