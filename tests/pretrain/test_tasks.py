"""What every pretext task has to do for the rest of the package to serve it."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from run_plans import run_plans
from torch import nn

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.commands.setting_options import add_setting_options, given
from nnunetv2_misfm.plans.compare import what_a_run_must_keep
from nnunetv2_misfm.plans.network_entry import DECODER, ENCODER, STEM
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS, PretrainingSettings
from nnunetv2_misfm.plans.settings import read_settings, write_settings
from nnunetv2_misfm.pool.settings import PoolSettings
from nnunetv2_misfm.pretrain.augment import CropAugmentation, apply_augmentation, voxels_inside
from nnunetv2_misfm.pretrain.batches import CropBatch, crop_loader
from nnunetv2_misfm.pretrain.crop_reading import read_crop
from nnunetv2_misfm.pretrain.crops import CropSamples, validation_samples
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.task import PretextNetwork, PretextTask, Scores
from nnunetv2_misfm.pretrain.tasks import PretextSettings, default_settings, task_class, task_classes

PATCH = (16, 16, 16)
CHANNELS = 2
CPU = torch.device("cpu")
every_task = pytest.mark.parametrize("name", PRETEXT_TASKS)


def pretext(name: str, **block: Any) -> PretextSettings:
    return PretextSettings.read({"task": name, **block}, "The test")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes of blurred noise with two channels."""
    folder = tmp_path_factory.mktemp("pool")
    for index in range(4):
        noise = torch.from_numpy(np.random.default_rng(index).standard_normal((1, CHANNELS, 24, 28, 26)))
        volume = nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)[0] * 5
        blosc2.asarray(np.ascontiguousarray(volume.float().numpy()), urlpath=str(folder / f"{index}.b2nd"), mode="w")
    return folder


def samples(name: str, folder: Path, patch_size: tuple[int, int, int] = PATCH) -> CropSamples:
    chosen = pretext(name)
    names = [str(index) for index in range(4)]
    return CropSamples(folder, names, patch_size, chosen.task(), chosen.augmentation, 1, CHANNELS)


def first_batch(name: str, folder: Path, batch_size: int = 2, **options: Any) -> CropBatch:
    return next(crop_loader(samples(name, folder), batch_size, 4, **options))


def network_for(task: PretextTask) -> PretextNetwork:
    torch.manual_seed(0)
    network = PCTNet(
        input_channels=CHANNELS,
        num_classes=task.num_outputs(CHANNELS),
        features_per_stage=[4, 4, 4, 8, 16],
        strides=strides_of(0),
        deep_supervision=task.deep_supervision,
    )
    return PretextNetwork(network, task, CHANNELS)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a target, whatever it is made of."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else None
    if parts is None:
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors(part)]


@every_task
def test_a_batch_gives_an_input_a_loss_and_gradients(name: str, pool: Path) -> None:
    task = pretext(name).task()
    x, target = task.make(first_batch(name, pool), CPU)
    assert x.shape == (2 * task.inputs_per_sample, CHANNELS, *PATCH) and x.dtype == torch.float32
    assert x.isfinite().all()
    model = network_for(task)
    loss = task.loss(model(x, target), target)
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    learns = {STEM: "encoder.stem", ENCODER: "encoder.stage", DECODER: "decoder.up"}
    parameters = dict(model.network.named_parameters())
    for part, start in learns.items():
        found = [key for key, value in parameters.items() if key.startswith(start) and value.grad is not None]
        assert bool(found) == (part in task.trains), (part, found)


@every_task
def test_a_few_steps_make_the_loss_smaller(name: str, pool: Path) -> None:
    task = pretext(name).task()
    x, target = task.make(first_batch(name, pool), CPU)
    model = network_for(task)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = task.loss(model(x, target), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_task
def test_making_a_batch_draws_nothing(name: str, pool: Path) -> None:
    task, batch = pretext(name).task(), first_batch(name, pool)
    before = torch.get_rng_state()
    first, second = (task.make(batch, CPU) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@every_task
def test_a_sample_depends_on_its_number_alone(name: str, pool: Path) -> None:
    """Not on processes that read, on the batch it is in, or on where a run was continued."""
    task = pretext(name).task()
    whole = [
        task.make(batch, CPU)[0] for batch, _ in zip(crop_loader(samples(name, pool), 4, 2), range(3), strict=False)
    ]
    resumed = task.make(next(crop_loader(samples(name, pool), 4, 2, start_epoch=1)), CPU)[0]
    assert torch.equal(whole[2], resumed) and not torch.equal(whole[0], whole[2])
    dataset = samples(name, pool)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[0, 1, 0].crops[0].voxels, again[0, 1, 0].crops[0].voxels)


@every_task
def test_counts_of_all_processes_make_the_scores_of_one(name: str, pool: Path) -> None:
    task = pretext(name).task()
    model = network_for(task).eval()

    def counts(rank: int, world_size: int) -> dict[str, Any]:
        x, target = task.make(first_batch(name, pool, 4, rank=rank, world_size=world_size), CPU)
        with torch.no_grad():
            return task.count(model(x, target), target)

    one, parts = counts(0, 1), [counts(rank, 2) for rank in range(2)]
    scores = [task.scores(sums) for sums in (one, {key: parts[0][key] + parts[1][key] for key in one})]
    assert isinstance(scores[0], Scores) and len(scores[0].parts) and scores[0].text
    assert scores[0].main == pytest.approx(scores[1].main, abs=1e-5)
    assert np.isfinite(scores[0].main)
    assert set(scores[0].values) == set(task.score_captions)
    for key, value in scores[0].values.items():
        assert value == pytest.approx(scores[1].values[key], abs=1e-5), key


@every_task
def test_the_picture_is_written(name: str, pool: Path, tmp_path: Path) -> None:
    task = pretext(name).task()
    x, target = task.make(first_batch(name, pool), CPU)
    network = network_for(task).eval()
    pictures = []
    for _ in range(2):
        with torch.no_grad():
            task.picture(tmp_path / "picture.png", x, target, network(x, target))
        pictures.append((tmp_path / "picture.png").read_bytes())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] != pictures[1], "it shows what the network says"


@every_task
@pytest.mark.parametrize("patch_size", [(1, 1, 1), (3, 20, 9)])
def test_any_patch_size_and_a_degree_of_anisotropy(name: str, pool: Path, patch_size: tuple[int, int, int]) -> None:
    task = pretext(name).task()
    x, _ = task.make(next(crop_loader(samples(name, pool, patch_size), 2, 1, anisotropy=(1,))), CPU)
    assert x.shape[2:] == patch_size and x.isfinite().all()


@every_task
def test_images_without_contrast_are_safe(name: str, tmp_path: Path) -> None:
    blosc2.asarray(np.full((CHANNELS, 20, 20, 20), 0.5, np.float32), urlpath=str(tmp_path / "0.b2nd"), mode="w")
    task = pretext(name).task()
    fixed = validation_samples(tmp_path, ["0"], PATCH, task, 1, CHANNELS)
    x, target = task.make(next(crop_loader(fixed, 2, 1)), CPU)
    assert all(tensor.isfinite().all() for tensor in tensors((x, target)) if tensor.is_floating_point())
    outputs = network_for(task).eval()(x, target)
    assert task.loss(outputs, target).isfinite()
    assert np.isfinite(task.scores(task.count(outputs, target)).main)


@every_task
def test_the_block_of_the_plans_is_read_back(name: str) -> None:
    chosen = pretext(name)
    assert chosen.kind is task_class(name) and chosen.kind.name == name
    assert set(chosen.kind.trains) <= {STEM, ENCODER, DECODER}
    assert pretext(**{"name": name, **{k: v for k, v in chosen.block().items() if k != "task"}}) == chosen
    # A setting that an older version did not write has the default of the task.
    older = {key: value for key, value in chosen.block().items() if key not in ("optimizer", "initial_lr")}
    older["augmentation"] = {}
    assert PretextSettings.read(older, "x") == chosen
    plans = [run_plans(block) for block in (chosen.block(), older)]
    assert what_a_run_must_keep(plans[0], plans[1], "3d_fullres", **default_settings(name)) == []


@every_task
def test_the_settings_of_a_task_are_read_back(name: str) -> None:
    kind = task_class(name).Settings
    parser = argparse.ArgumentParser()
    add_setting_options(parser, "x", kind)
    assert given(parser.parse_args([]), kind) == {}
    assert read_settings(kind, write_settings(kind()), "x") == kind()


def test_no_two_settings_share_a_name() -> None:
    """Their options would, and nobody could tell which task one is for."""
    groups = [PoolSettings, PretrainingSettings, AugmentSettings, *(kind.Settings for kind in task_classes())]
    names = [name for group in groups for name in group.model_fields]
    assert sorted(names) == sorted(set(names))
    in_plans = [kind.group() for kind in task_classes()]
    assert sorted(in_plans) == sorted(set(in_plans))


def test_tasks_of_another_name_are_the_end_of_a_comparison() -> None:
    plans = [run_plans(pretext(name).block()) for name in ("volume_fusion", "masked_autoencoder")]
    changes = what_a_run_must_keep(*plans, "3d_fullres", **default_settings("masked_autoencoder"))
    assert changes == ["task: volume_fusion then, masked_autoencoder now"]


@pytest.mark.parametrize("name", ["masked_autoencoder", "models_genesis", "patch_swap"])
def test_telling_padding_from_the_image_is_no_score(name: str, tmp_path: Path) -> None:
    """Volumes smaller than the patch: an output that knows the padding and no more has learnt nothing."""
    volume = np.random.default_rng(0).uniform(5, 6, (1, 10, 12, 16)).astype(np.float32)
    blosc2.asarray(volume, urlpath=str(tmp_path / "0.b2nd"), mode="w")
    task = task_class(name)(read_settings(task_class(name).Settings, {}, ""))
    batch = next(crop_loader(validation_samples(tmp_path, ["0"], (16, 16, 16), task, 0, 1), 3, 1))
    _, target = task.make(batch, torch.device("cpu"))
    inside = batch.in_volume(torch.device("cpu"))
    assert inside.float().mean() == pytest.approx(10 * 12 / 16**2)
    if name == "models_genesis":  # which flips its target
        inside = target.counted
        assert inside.float().mean() == pytest.approx(10 * 12 / 16**2)
    padding = target.image[~inside.expand_as(target.image)]
    assert target.image[inside].min() >= padding.max()
    of_volumes = target.image[inside].reshape(3, -1)
    torch.testing.assert_close(of_volumes.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(of_volumes.std(1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
    knows_padding = torch.where(inside, 0.0, target.image)
    explained = task.scores(task.count(knows_padding, target)).values["variance_explained"]
    assert explained == pytest.approx(0, abs=0.02)
    assert task.scores(task.count(target.image, target)).main == 1
    # It is no loss either: nothing is gained by telling padding, and nothing lost by leaving it.
    assert task.loss(knows_padding, target) == task.loss(torch.zeros_like(target.image), target) > 0.5
    assert task.loss(torch.where(inside, target.image, 100.0), target) == 0


@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True)])
def test_what_is_padded_is_known_after_resizing_and_flips(flips: tuple[bool, bool, bool]) -> None:
    volume = np.ones((1, 5, 6, 20), np.float32)
    volume[0, 2, 3, 10] = 0  # the minimum, which pads
    crop = read_crop(volume, CropAugmentation((8, 8, 8), flips=flips), (16, 8, 4), np.random.default_rng(0))
    assert crop.augmentation.inside is not None
    inside = voxels_inside(crop.augmentation, (16, 8, 4), torch.device("cpu"))
    patch = apply_augmentation([crop.voxels], [crop.augmentation], (16, 8, 4))[0, 0]
    assert inside.sum() == pytest.approx(16 * 5 / 8 * 6 * 4, rel=0.2)
    assert (patch[~inside] < 0.8).all() and patch[inside].mean() > 0.9
