"""Samples of crops: what they depend on, where they are read, and what happens to damaged files."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunetv2_misfm.pretrain.batches import CropBatch, crop_loader
from nnunetv2_misfm.pretrain.crops import CropReadError, CropSamples, Sample, validation_samples
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings, VolumeFusion

PATCH = (8, 12, 10)
BLOCKS = FusionSettings(geometry="blocks", block_size_min=(2, 2, 2), block_size_max=(4, 4, 4))


def write_case(folder: Path, name: str, volume: np.ndarray) -> None:
    blosc2.asarray(np.ascontiguousarray(volume), urlpath=str(folder / f"{name}.b2nd"), mode="w")


def make_pool(folder: Path, num_cases: int = 4, shape: Sequence[int] = (1, 20, 24, 22)) -> list[str]:
    """Cases of noise; case i has its intensities around 100 * i."""
    names = [f"case_{i}" for i in range(num_cases)]
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).standard_normal(shape)
        write_case(folder, name, (100 * i + noise).astype(np.float32))
    return names


def make_pairs(folder: Path, names: Sequence[str], fusion: FusionSettings | None = None, **changes) -> CropSamples:
    arguments = {
        "patch_size": PATCH,
        "task": VolumeFusion(fusion or FusionSettings()),
        "augment": AugmentSettings(),
        "seed": 3,
        "num_channels": 1,
        **changes,
    }
    return CropSamples(folder, names, **arguments)


def fused(batches: Sequence[CropBatch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [VolumeFusion(FusionSettings()).make(batch, torch.device("cpu")) for batch in batches]


def foreground(sample: Sample) -> torch.Tensor:
    return sample.crops[0].voxels


def fixed_pairs(folder: Path, names: Sequence[str]) -> CropSamples:
    return validation_samples(folder, names, PATCH, VolumeFusion(FusionSettings()), 3, 1)


def same(first: Sequence[tuple[torch.Tensor, ...]], second: Sequence[tuple[torch.Tensor, ...]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def cases_read(sample: Sample) -> list[int]:
    """Which cases the voxels come from, by their intensities."""
    return [round(float(crop.voxels.median()) / 100) for crop in sample.crops]


def test_both_crops_of_a_pair_are_inverted_or_neither(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    drawn = [[crop.augmentation for crop in pairs[0, i, 0].crops] for i in range(400)]
    assert all(first.invert == second.invert for first, second in drawn)
    assert sum(first.invert for first, _ in drawn) / 400 == pytest.approx(0.25, abs=0.06)
    assert all(first.noise_seed != second.noise_seed for first, second in drawn)


def test_batches_have_the_shapes_and_types_a_trainer_expects(tmp_path):
    names = make_pool(tmp_path, shape=(2, 20, 24, 22))
    batch = next(crop_loader(make_pairs(tmp_path, names, num_channels=2), 3, 5))
    data, target = fused([batch])[0]
    assert data.shape == (3, 2, *PATCH) and data.dtype == torch.float32
    assert target.shape == (3, 1, *PATCH) and set(target.unique().tolist()) <= {0, 1, 2, 3, 4}


def test_voxels_of_class_0_and_k_are_those_of_the_two_crops(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path), augment=AugmentSettings.off())
    sample = pairs[0, 0, 0]
    data, target = fused([next(crop_loader(pairs, 1, 1))])[0]
    assert torch.equal(data[0][target[0] == 0], sample.crops[1].voxels[target[0] == 0])
    assert torch.equal(data[0][target[0] == 4], foreground(sample)[target[0] == 4])


def test_crops_are_parts_of_their_volume_in_axis_order(tmp_path):
    shape = (20, 24, 22)
    write_case(tmp_path, "ramp", np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape))
    sample = make_pairs(tmp_path, ["ramp"], augment=AugmentSettings.off())[0, 0, 0]
    x, y, z = np.unravel_index(int(foreground(sample)[0, 0, 0, 0]), shape)
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    expected = volume[x : x + PATCH[0], y : y + PATCH[1], z : z + PATCH[2]]
    assert np.array_equal(foreground(sample)[0].numpy(), expected)


def test_every_place_of_a_volume_is_read(tmp_path):
    write_case(tmp_path, "ramp", np.arange(10 * 12 * 10, dtype=np.float32).reshape(1, 10, 12, 10))
    pairs = make_pairs(tmp_path, ["ramp"], augment=AugmentSettings.off())
    assert {int(foreground(pairs[0, i, 0])[0, 0, 0, 0]) // 120 for i in range(40)} == {0, 1, 2}


def test_the_number_of_workers_changes_nothing(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    results = [fused(list(islice(crop_loader(pairs, 2, 2, num_workers=n), 6))) for n in (0, 1, 2)]
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_no_sample_repeats_across_workers_and_epochs(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    data = torch.cat([data for data, _ in fused(list(islice(crop_loader(pairs, 2, 2, num_workers=2), 8)))])
    assert len(data.flatten(1).sum(1).unique()) == 16


@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_of_all_processes_make_the_same_batches(tmp_path, world_size):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    whole = fused(list(islice(crop_loader(pairs, 6, 2), 3)))
    slices = [
        fused(list(islice(crop_loader(pairs, 6, 2, rank=rank, world_size=world_size), 3))) for rank in range(world_size)
    ]
    joined = [tuple(torch.cat(parts) for parts in zip(*ranks, strict=True)) for ranks in zip(*slices, strict=True)]
    assert same(whole, joined)


def test_a_resumed_run_continues_with_the_same_batches(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    whole = fused(list(islice(crop_loader(pairs, 2, 3), 9)))
    resumed = fused(list(islice(crop_loader(pairs, 2, 3, start_epoch=2), 3)))
    assert same(whole[6:], resumed)


def test_another_seed_gives_other_samples(tmp_path):
    names = make_pool(tmp_path)
    first, second = (next(crop_loader(make_pairs(tmp_path, names, seed=seed), 2, 1)) for seed in (1, 2))
    assert not same(fused([first]), fused([second]))


def test_starting_a_loader_leaves_torch_random_numbers_alone(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    before = torch.get_rng_state()
    fused([next(crop_loader(pairs, 2, 1))])
    assert torch.equal(before, torch.get_rng_state())


def test_boxes_take_two_volumes_and_blocks_two_crops_of_one(tmp_path):
    names = make_pool(tmp_path)
    boxes = [cases_read(make_pairs(tmp_path, names)[0, i, 0]) for i in range(30)]
    blocks = [cases_read(make_pairs(tmp_path, names, fusion=BLOCKS)[0, i, 0]) for i in range(30)]
    assert all(first != second for first, second in boxes)
    assert all(first == second for first, second in blocks)
    assert {case for pair in boxes for case in pair} == {case for pair in blocks for case in pair} == {0, 1, 2, 3}


def test_a_pool_of_one_volume_gives_two_crops_of_it(tmp_path):
    sample = make_pairs(tmp_path, make_pool(tmp_path, 1), augment=AugmentSettings.off())[0, 0, 0]
    assert not torch.equal(foreground(sample), sample.crops[1].voxels)


@pytest.mark.parametrize("pairs", ["two_volumes", "same_volume"])
def test_a_volume_of_the_patchs_size_is_not_validated_on_itself(tmp_path, pairs):
    volume = np.random.default_rng(0).random((1, *PATCH)).astype(np.float32)
    blosc2.asarray(volume, urlpath=str(tmp_path / "0.b2nd"), mode="w")
    task = VolumeFusion(FusionSettings(pairs=pairs))
    batch = next(crop_loader(validation_samples(tmp_path, ["0"], PATCH, task, 3, 1), 2, 1))
    foreground, background = batch.patches(torch.device("cpu"))
    assert torch.equal(foreground, background.flip(4)) and not torch.equal(foreground, background)


def test_validation_samples_are_the_same_in_every_epoch_and_none_of_training(tmp_path):
    names = make_pool(tmp_path)
    pairs = fixed_pairs(tmp_path, names)
    first, second, third, fourth = fused(list(islice(crop_loader(pairs, 2, 2, anisotropy=(0, 1)), 4)))
    assert same([first, second], [third, fourth]) and not same([first], [second])
    training = make_pairs(tmp_path, names, augment=AugmentSettings.off())
    assert not torch.equal(foreground(training[0, 0, 0]), foreground(pairs[0, 0, 0]))


def test_validation_crops_are_not_augmented(tmp_path):
    sample = fixed_pairs(tmp_path, make_pool(tmp_path))[0, 0, 0]
    assert foreground(sample).shape == (1, *PATCH)
    augmentation = sample.crops[0].augmentation
    assert augmentation.gamma is None and not any(augmentation.flips)


def test_a_volume_smaller_than_the_crop_is_padded_with_each_channels_minimum(tmp_path):
    volume = np.random.default_rng(0).standard_normal((2, 5, 20, 4)).astype(np.float32)
    write_case(tmp_path, "small", volume)
    sample = make_pairs(tmp_path, ["small"], num_channels=2, augment=AugmentSettings.off())[0, 0, 0]
    assert foreground(sample).shape == (2, *PATCH)
    for channel in foreground(sample):
        padding = channel == channel.min()
        assert padding.sum() == channel.numel() - 5 * 12 * 4 + 1
        assert (~padding).any(dim=2).any(dim=1).sum() == 5


def test_a_scaled_crop_pads_no_more_than_an_unscaled_one(tmp_path):
    names = make_pool(tmp_path, 1, (1, 5, 13, 40))
    pairs = make_pairs(tmp_path, names, augment=AugmentSettings(scale=(1.5, 1.5)))
    assert pairs[0, 0, 0].crops[0].augmentation.read_size == (8, 13, 15)


def test_anisotropy_takes_turns_and_reads_deeper_crops(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path, shape=(1, 70, 24, 22)), augment=AugmentSettings.off())
    batches = list(islice(crop_loader(pairs, 1, 3, anisotropy=(0, 1, 2)), 3))
    assert [batch.anisotropy for batch in batches] == [0, 1, 2]
    assert [batch.augmentations[0].read_size[0] for batch in batches] == [8, 16, 32]
    assert all(data.shape[2:] == PATCH for data, _ in fused(batches))


def test_places_that_are_mostly_air_are_drawn_again(tmp_path):
    volume = np.full((1, 32, 12, 10), -1.0, np.float32)
    volume[:, 16:] = np.random.default_rng(0).standard_normal((1, 16, 12, 10))
    write_case(tmp_path, "half_air", volume)
    pairs = make_pairs(tmp_path, ["half_air"], augment=AugmentSettings.off())
    airy = [float((foreground(pairs[0, i, 0]) == -1).float().mean()) > 0.9 for i in range(100)]
    assert sum(airy) < 10  # a third of them without drawing again


def test_volumes_of_nothing_but_air_still_give_samples(tmp_path):
    write_case(tmp_path, "air", np.full((1, 20, 20, 20), -1.0, np.float32))
    data, _ = fused([next(crop_loader(make_pairs(tmp_path, ["air"]), 2, 1))])[0]
    assert torch.allclose(data, torch.full_like(data, -1.0), atol=1e-5)


@pytest.mark.parametrize("patch_size", [(1, 1, 1), (3, 40, 9), (40, 56, 40)])
def test_any_patch_size(tmp_path, patch_size):
    pairs = make_pairs(tmp_path, make_pool(tmp_path), patch_size=patch_size)
    data, _ = fused([next(crop_loader(pairs, 2, 1))])[0]
    assert data.shape == (2, 1, *patch_size) and data.isfinite().all()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbled":
        # Whole numbers, because voxels that do not compress are stored as they are, and damage to them shows nowhere.
        volume = np.random.default_rng(0).standard_normal((1, 20, 24, 22)).round()
        write_case(path.parent, path.stem, volume.astype(np.float32))
        content = path.read_bytes()
        third = len(content) // 3
        path.write_bytes(content[:third] + bytes(third) + content[2 * third :])
    elif how == "not finite":
        write_case(path.parent, path.stem, np.full((1, 20, 24, 22), np.nan, np.float32))
    elif how == "other channels":
        write_case(path.parent, path.stem, np.zeros((3, 20, 24, 22), np.float32))
    elif how == "other axes":
        write_case(path.parent, path.stem, np.zeros((20, 24, 22), np.float32))


@pytest.mark.parametrize(
    "how", ["missing", "cut off", "empty", "garbled", "not finite", "other channels", "other axes"]
)
def test_a_bad_file_is_named_once_and_replaced_the_same_way_every_time(tmp_path, how):
    names = make_pool(tmp_path, 25)
    damage(tmp_path / "case_2.b2nd", how)
    pairs = make_pairs(tmp_path, names)
    runs = []
    messages: list[str] = []
    for num_workers in (0, 2):
        loader = crop_loader(pairs, 4, 5, num_workers=num_workers, report=messages.append)
        runs.append(fused(list(islice(loader, 15))))
    assert same(*runs)
    assert len(messages) == 2 and all("case_2.b2nd" in message for message in messages)


def test_too_many_bad_files_are_an_error_that_names_them(tmp_path):
    names = make_pool(tmp_path, 10)
    for i in (1, 7):
        damage(tmp_path / f"case_{i}.b2nd", "cut off")
    loader = crop_loader(make_pairs(tmp_path, names), 4, 5, report=lambda message: None)
    with pytest.raises(CropReadError, match=r"2 of 10(.|\n)*case_1\.b2nd(.|\n)*") as error:
        list(islice(loader, 100))
    assert "case_7.b2nd" in str(error.value)


def test_a_wrong_folder_is_an_error_that_names_files_from_a_worker_too(tmp_path):
    pairs = make_pairs(tmp_path / "nowhere", ["a", "b"])
    messages = []
    for num_workers in (0, 1):
        with pytest.raises(CropReadError, match=r"nowhere.*a\.b2nd") as error:
            next(crop_loader(pairs, 2, 1, num_workers=num_workers))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("geometry", ["boxes", "blocks"])
def test_what_is_to_be_told_in_validation_can_be_told_in_volumes_no_larger_than_the_patch(tmp_path, geometry):
    names = make_pool(tmp_path, shape=(1, *PATCH))
    task = VolumeFusion(FusionSettings(geometry=geometry))
    for batch in islice(crop_loader(validation_samples(tmp_path, names, PATCH, task, 3, 1), 2, 4), 4):
        first, second = batch.patches("cpu")
        assert all(not torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_only_the_images_are_opened(tmp_path):
    names = make_pool(tmp_path)
    for name in names:
        (tmp_path / f"{name}.pkl").write_bytes(b"not a pickle")
        (tmp_path / f"{name}_seg.b2nd").write_bytes(b"not an array")
    assert len(fused(list(islice(crop_loader(make_pairs(tmp_path, names), 2, 2), 4)))) == 4


def test_a_pool_of_110000_cases_is_small_and_opens_nothing(tmp_path):
    names = [f"centre_{i % 7}_patient_{i:06d}" for i in range(110_000)]
    pairs = make_pairs(tmp_path / "nowhere", names)
    assert len(pickle.dumps(pairs)) < 5e6
    assert pairs.num_cases == 110_000
    assert pairs.file_of(54_321) == tmp_path / "nowhere" / f"{names[54_321]}.b2nd"


def test_samples_and_datasets_can_be_pickled(tmp_path):
    pairs = make_pairs(tmp_path, make_pool(tmp_path))
    sample, again = pairs[1, 2, 0], pickle.loads(pickle.dumps(pairs))[1, 2, 0]
    copy = pickle.loads(pickle.dumps(sample))
    assert torch.equal(foreground(sample), foreground(again)) and torch.equal(foreground(sample), foreground(copy))
    assert sample.crops[1].augmentation == again.crops[1].augmentation == copy.crops[1].augmentation


def test_a_name_that_is_not_text_is_found(tmp_path):
    names = ["a", os.fsdecode(b"caf\xe9_of_1990")]
    assert make_pairs(tmp_path, names).file_of(1) == tmp_path / f"{names[1]}.b2nd"


@pytest.mark.parametrize(
    "changes", [{"patch_size": (8, 8)}, {"patch_size": (0, 8, 8)}, {"num_channels": 0}, {"seed": -1}]
)
def test_impossible_pairs_are_an_error(tmp_path, changes):
    with pytest.raises(ValueError, match="samples need"):
        make_pairs(tmp_path, ["a"], **changes)


def test_nothing_is_read_before_the_first_batch_is_asked_for(tmp_path):
    """nnU-Net unpacks arrays of its old form after it has made the loaders."""
    names, messages = make_pool(tmp_path), []
    away = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    loader = crop_loader(make_pairs(tmp_path, names), 2, 2, num_workers=1, report=messages.append)
    for path in away:
        path.write_bytes(b"")
    time.sleep(1)
    for path, content in away.items():
        path.write_bytes(content)
    assert len(list(islice(loader, 2))) == 2 and messages == []


def test_an_empty_pool_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no cases"):
        make_pairs(tmp_path, [])


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 3, "world_size": 2}, {"rank": 1}, {"num_iterations": 0}, {"start_epoch": -1}, {"anisotropy": ()}],
)
def test_impossible_batches_are_an_error(tmp_path, changes):
    with pytest.raises(ValueError, match="batches"):
        crop_loader(make_pairs(tmp_path, ["a"]), **{"batch_size": 2, "num_iterations": 1, **changes})
