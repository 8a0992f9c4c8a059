"""Volume Fusion: labels and coefficients, the two geometries, their settings."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_misfm.plans.settings import SettingsError, read_settings, write_settings
from nnunetv2_misfm.pretrain.batches import crop_loader
from nnunetv2_misfm.pretrain.crops import validation_samples
from nnunetv2_misfm.pretrain.volume_fusion import (
    UNTOLD,
    Fusion,
    FusionSettings,
    VolumeFusion,
    fuse,
    fusion_labels,
    sample_fusion,
)

PAPER_PATCH = (64, 128, 128)
BOXES = FusionSettings()
BLOCKS = FusionSettings(geometry="blocks")

patches = st.tuples(*[st.integers(1, 70)] * 3)


def hand_made(*cuboids: tuple[tuple[int, int, int], tuple[int, int, int], int]) -> Fusion:
    starts, sizes, classes = zip(*cuboids, strict=True)
    return Fusion(np.array(starts), np.array(sizes), np.array(classes))


def test_labels_of_a_hand_made_fusion_in_axis_order():
    fusion = hand_made(((1, 2, 3), (1, 2, 3), 2))
    labels = fusion_labels(fusion, (3, 5, 7), "cpu")
    expected = torch.zeros((3, 5, 7), dtype=labels.dtype)
    expected[1, 2:4, 3:6] = 2
    assert torch.equal(labels, expected)


def test_later_cuboids_lie_on_top():
    labels = fusion_labels(hand_made(((0, 0, 0), (3, 1, 1), 4), ((1, 0, 0), (1, 1, 1), 0)), (4, 1, 1), "cpu")
    assert labels.flatten().tolist() == [4, 0, 4, 0]


def test_fused_voxels_of_a_hand_made_fusion():
    fusion = hand_made(*(((x, 0, 0), (1, 1, 1), x) for x in range(5)))
    foreground, background = torch.full((1, 1, 5, 1, 1), 8.0), torch.full((1, 1, 5, 1, 1), -4.0)
    fused, labels = fuse(foreground, background, [fusion], 5)
    assert fused.flatten().tolist() == [-4.0, -1.0, 2.0, 5.0, 8.0]
    assert labels.flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("settings", [BOXES, BLOCKS])
def test_label_and_coefficient_agree_at_every_voxel(settings):
    fusions = [sample_fusion((20, 30, 25), settings, np.random.default_rng(i)) for i in range(3)]
    ones = torch.ones((3, 2, 20, 30, 25))
    fused, labels = fuse(ones, torch.zeros_like(ones), fusions, 5)
    assert labels.shape == (3, 1, 20, 30, 25)
    assert torch.equal(fused * 4, labels.expand_as(fused).float())


def test_coefficients_0_and_1_copy_exactly():
    foreground, background = torch.randn((2, 1, 1, 2, 3, 3), generator=torch.Generator().manual_seed(0)) * 1e4
    fused, _ = fuse(foreground, background, [hand_made(((0, 0, 0), (1, 3, 3), 2))], 3)
    assert torch.equal(fused[0, :, 0], foreground[0, :, 0])
    assert torch.equal(fused[0, :, 1], background[0, :, 1])


@pytest.mark.parametrize(
    ("settings", "patch", "background", "others"),
    [
        (BOXES, PAPER_PATCH, 0.50, 0.125),
        (FusionSettings(background_boxes=True), PAPER_PATCH, 0.59, 0.1025),
        # From the published rule: the mean over all block sizes of int(0.7 N) blocks' share of the patch.
        (BLOCKS, PAPER_PATCH, 0.462, 0.1345),
        (BLOCKS, (128, 128, 128), 0.428, 0.143),
    ],
)
def test_class_shares_are_the_published_ones(settings, patch, background, others):
    counts = torch.zeros(5)
    for seed in range(1000):
        labels = fusion_labels(sample_fusion(patch, settings, np.random.default_rng(seed)), patch, "cpu")
        counts += torch.from_numpy(np.bincount(labels[::2, 1::2, ::2].numpy().ravel(), minlength=5))
    shares = (counts / counts.sum()).tolist()
    assert shares == pytest.approx([background] + [others] * 4, abs=0.015)


@pytest.mark.parametrize("settings", [BOXES, BLOCKS])
@given(patch=patches, seed=st.integers(0, 2**32))
def test_cuboids_are_inside_any_patch_and_never_empty(settings, patch, seed):
    fusion = sample_fusion(patch, settings, np.random.default_rng(seed))
    assert (fusion.sizes >= 1).all() and (fusion.starts >= 0).all()
    assert (fusion.starts + fusion.sizes <= np.array(patch)).all()
    assert ((fusion.classes >= 1) & (fusion.classes <= 4)).all()


@given(patch=patches.filter(lambda p: min(p) > 1), seed=st.integers(0, 2**32))
def test_a_patch_of_blocks_has_foreground_and_background(patch, seed):
    labels = fusion_labels(sample_fusion(patch, BLOCKS, np.random.default_rng(seed)), patch, "cpu")
    assert (labels == 0).any() and (labels > 0).any()


def test_blocks_are_the_exact_share_of_a_regular_grid():
    for seed in range(50):
        fusion = sample_fusion(PAPER_PATCH, BLOCKS, np.random.default_rng(seed))
        size = fusion.sizes[0]
        assert (fusion.sizes == size).all()
        assert (size >= 8).all() and (size <= 32).all()
        assert len(fusion.classes) == int(0.7 * (np.array(PAPER_PATCH) // size).prod())
        assert len(np.unique(fusion.starts, axis=0)) == len(fusion.starts)
        assert ((fusion.starts - fusion.starts[0]) % size == 0).all()


def test_box_sizes_cover_the_published_range_and_nothing_else():
    fusions = [sample_fusion(PAPER_PATCH, BOXES, np.random.default_rng(i)) for i in range(300)]
    sizes = np.concatenate([fusion.sizes for fusion in fusions])
    assert sizes.min(0).tolist() == [8, 8, 8] and sizes.max(0).tolist() == [40, 80, 80]
    counts = [len(fusion.classes) for fusion in fusions]
    assert min(counts) == 10 and max(counts) == 40


def test_sizes_in_voxels_per_axis():
    settings = FusionSettings(geometry="blocks", block_size_min=(5, 8, 8), block_size_max=(20, 32, 32))
    sizes = np.array([sample_fusion(PAPER_PATCH, settings, np.random.default_rng(i)).sizes[0] for i in range(500)])
    assert sizes.min(0).tolist() == [5, 8, 8] and sizes.max(0).tolist() == [20, 32, 32]


def test_a_box_may_have_coefficient_0_when_asked():
    fusion = sample_fusion(
        (9, 9, 9), FusionSettings(background_boxes=True, num_boxes=(99, 99)), np.random.default_rng(0)
    )
    assert set(fusion.classes.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("settings", [BOXES, BLOCKS])
def test_the_same_generator_gives_the_same_fusion(settings):
    first, again = (sample_fusion((30, 40, 50), settings, np.random.default_rng(7)) for _ in range(2))
    for name in ("starts", "sizes", "classes"):
        assert np.array_equal(getattr(first, name), getattr(again, name))


def test_pairs_follow_the_geometry_unless_set():
    assert BOXES.two_volumes and not BLOCKS.two_volumes
    assert FusionSettings(geometry="blocks", pairs="two_volumes").two_volumes
    assert not FusionSettings(pairs="same_volume").two_volumes


def test_settings_survive_json():
    settings = FusionSettings(geometry="blocks", block_size_max=(20, 32, 32), pairs="two_volumes")
    assert read_settings(FusionSettings, write_settings(settings), "fusion") == settings


def test_all_bad_settings_are_reported_together():
    values = {
        "geometry": "spheres",
        "num_fusion_classes": 1,
        "num_boxes": [40, 10],
        "box_size_max": [0.5, 1.5, 0.5],
        "block_size_min": 8,
        "background_boxes": "no",
        "foreground_ratio": 0,
        "pairs": "one_volume",
    }
    with pytest.raises(SettingsError) as error:
        read_settings(FusionSettings, values, "fusion")
    assert len(error.value.problems) == len(values)
    assert all(any(name in problem for problem in error.value.problems) for name in values)


def test_a_size_range_the_wrong_way_round_is_an_error():
    with pytest.raises(SettingsError, match=r"block_size_max = .* is below block_size_min = \(33.0, 8.0, 8.0\)"):
        read_settings(FusionSettings, {"block_size_min": [33, 8, 8]}, "fusion")


def test_batches_that_do_not_fit_together_are_an_error():
    image, fusion = torch.zeros((1, 1, 4, 4, 4)), hand_made(((0, 0, 0), (1, 1, 1), 4))
    with pytest.raises(ValueError, match="one shape"):
        fuse(image, torch.zeros((1, 1, 4, 4, 5)), [fusion], 5)
    with pytest.raises(ValueError, match="B fusions"):
        fuse(image, image, [fusion, fusion], 5)
    with pytest.raises(ValueError, match="class 4"):
        fuse(image, image, [fusion], 4)


def small_batch(num_fusion_classes: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of two resolutions for two samples, and labels without a place that nothing tells."""
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn((2, num_fusion_classes, *size), generator=generator) for size in ((4, 8, 8), (4, 4, 4))]
    labels = torch.randint(0, num_fusion_classes, (2, 1, 4, 8, 8), generator=generator, dtype=torch.int16)
    return outputs, labels


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_nnunets_with_padding_ignored(padded: bool) -> None:
    """As much of each sample: then the mean over samples is that over voxels."""
    task = VolumeFusion(FusionSettings(num_fusion_classes=3))
    (output, _), labels = small_batch()
    if padded:
        labels[0, :, :2] = UNTOLD
        labels[1, ..., 4:] = UNTOLD
    dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
    options = {"weight_ce": 0.5, "weight_dice": 0.5, "dice_class": MemoryEfficientSoftDiceLoss}
    nnunets = DC_and_CE_loss(dice, {}, ignore_label=UNTOLD if padded else None, **options)
    assert task.loss([output], labels).item() == pytest.approx(nnunets(output, labels).item(), rel=1e-6)


def test_processes_that_share_a_batch_have_its_cross_entropy_together() -> None:
    """However much of a sample is padding; nnU-Net's Dice is gathered from all of them."""
    task = VolumeFusion(FusionSettings(num_fusion_classes=3))
    task._dice = lambda *given, **more: torch.zeros(())
    outputs, labels = small_batch()
    labels[0, ..., 1:] = UNTOLD
    alone = [task.loss([output[[i]] for output in outputs], labels[[i]]) for i in range(2)]
    assert torch.stack(alone).mean().item() == pytest.approx(task.loss(outputs, labels).item(), rel=1e-6)


def test_a_batch_of_nothing_but_padding_has_a_loss_scores_and_gradients() -> None:
    """As coarse maps of volumes of a slice or two may be."""
    task = VolumeFusion(FusionSettings(num_fusion_classes=3))
    outputs, labels = small_batch()
    labels[:] = UNTOLD
    outputs = [output.requires_grad_() for output in outputs]
    loss = task.loss(outputs, labels)
    loss.backward()
    assert loss.isfinite() and all(not output.grad.any() for output in outputs)
    assert np.isfinite(task.scores(task.count(outputs, labels)).main)


def test_what_a_network_says_of_padding_changes_nothing() -> None:
    task = VolumeFusion(FusionSettings(num_fusion_classes=3))
    outputs, labels = small_batch()
    labels[..., 4:] = UNTOLD
    other = [output.clone() for output in outputs]
    other[0][..., 4:] = 7.0
    other[1][..., 2:] = -3.0
    assert torch.equal(task.loss(outputs, labels), task.loss(other, labels))
    counts = task.count(other, labels)
    cropped = task.count([outputs[0][..., :4]], labels[..., :4])
    assert counts["voxels"] == 2 * 4 * 8 * 4
    assert all(np.array_equal(counts[name], cropped[name]) for name in cropped)


def test_labels_are_untold_where_both_crops_are_padding_and_only_there(tmp_path: Path) -> None:
    shapes = {"wide": (1, 16, 16, 10), "flat": (1, 10, 16, 16)}  # in patches of 16: padded along different axes
    for name, shape in shapes.items():
        blosc2.asarray(
            np.random.default_rng(0).uniform(5, 6, shape).astype(np.float32), urlpath=f"{tmp_path}/{name}.b2nd"
        )
    task = VolumeFusion(FusionSettings())
    cpu = torch.device("cpu")
    for cases, most in ((["wide"], 6 * 16 * 16), (["flat", "wide"], 6 * 6 * 16)):
        batch = next(crop_loader(validation_samples(tmp_path, cases, (16, 16, 16), task, 0, 1), 1, 1))
        first, second = (batch.in_volume(cpu, which) for which in (0, 1))
        assert first is not None and second is not None
        fused, labels = task.make(batch, cpu)
        assert torch.equal(labels == UNTOLD, ~first & ~second)
        assert 0 < (labels == UNTOLD).sum() <= most  # in one volume the second crop is mirrored, and so is its padding
        assert labels.max() > 0 and fused.isfinite().all()


def test_a_picture_shows_what_is_untold(tmp_path: Path) -> None:
    outputs, labels = small_batch()
    labels[..., 4:] = UNTOLD
    task = VolumeFusion(FusionSettings(num_fusion_classes=3))
    task.picture(tmp_path / "picture.png", torch.rand(2, 1, 4, 8, 8), labels, outputs)
    pixels = imread(tmp_path / "picture.png")
    third = pixels.shape[1] // 3  # of three columns, the labels are in the middle
    white = (pixels[..., :3] > 0.99).all(2)
    assert white[:, third : 2 * third].mean() > white[:, :third].mean() + 0.2
