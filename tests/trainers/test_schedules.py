"""Learning-rate schedules: shapes, stages, and that they know nothing but the iteration."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.plans.run_settings import RUNS
from nnunetv2_misfm.trainers.schedules import StagedSchedule, parameter_groups, stage_at


def small_network(kind: type[torch.nn.Module] = PCTNet) -> torch.nn.Module:
    return kind(1, 2, features_per_stage=(4, 4, 8, 16, 32))


def rates(schedule: StagedSchedule) -> list[float]:
    return [group["lr"] for group in schedule.optimizer.param_groups]


def test_sawtooth_ramps_the_decoder_then_everything_then_decays() -> None:
    stages = [stage_at("sawtooth", epoch, 100, 1) for epoch in range(100)]
    assert all(stage.encoder_frozen for stage in stages[:5]) and not stages[5].encoder_frozen
    assert [round(stage.decoder_factor, 2) for stage in stages[:10]] == [0.2, 0.4, 0.6, 0.8, 1.0] * 2
    assert stages[10].decoder_factor == stages[10].encoder_factor == 1
    assert all(a.decoder_factor > b.decoder_factor for a, b in zip(stages[10:], stages[11:], strict=False))


def test_ramps_rise_with_each_iteration_so_that_a_short_run_begins_gently() -> None:
    # 4 epochs of 10 iterations: each ramp has 5 %, 2 of them.
    stages = [stage_at("sawtooth", epoch, 4, iteration / 10) for epoch in range(4) for iteration in range(1, 11)]
    assert [stage.encoder_factor for stage in stages[:5]] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [stage.decoder_factor for stage in stages[:5]] == pytest.approx([0.5, 1, 0.5, 1, 1])
    assert [stage.name for stage in stages].count("whole network") == 36
    assert {stage.encoder_factor for stage in stages[4:10]} == {1}  # poly falls with each epoch
    assert stages[10].encoder_factor == stages[19].encoder_factor == pytest.approx((1 - 0.6 / 3.6) ** 0.9)
    warmup = [stage_at("warmup", 0, 4, iteration / 10).decoder_factor for iteration in range(1, 11)]
    assert warmup == pytest.approx([0.5, 1, *[1] * 8])


def test_halving_halves_after_each_fifth() -> None:
    assert [stage_at("halving", epoch, 10, 1).encoder_factor for epoch in range(10)] == [
        1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625,
    ]  # fmt: skip


def test_poly_is_nnunets() -> None:
    assert stage_at("poly", 250, 1000, 1).decoder_factor == pytest.approx(0.75**0.9)


SCHEDULES = [name for run in RUNS for name in get_args(run.model_fields["schedule"].annotation)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_epochs", [1, 2, 3, 5, 20, 1000])
def test_the_decoder_always_trains(schedule: str, num_epochs: int) -> None:
    for epoch in range(num_epochs):
        stage = stage_at(schedule, epoch, num_epochs, 1)
        assert 0 < stage.decoder_factor <= 1 and 0 <= stage.encoder_factor <= 1


def test_groups_get_the_learning_rates_of_their_part() -> None:
    groups = parameter_groups(small_network())
    schedule = StagedSchedule(torch.optim.Adam(groups, lr=1.0), "decoder_only", 0.01, 10)
    schedule.step(3)
    assert rates(schedule) == [pytest.approx(0.01 * 0.7**0.9), 0]


@pytest.mark.parametrize("kind", [PCTNet, FMUNet])
def test_layer_decay_slows_each_stage_of_the_encoder_more_than_the_next(kind: type[torch.nn.Module]) -> None:
    network = small_network(kind)
    groups = parameter_groups(network, layer_decay=0.5)
    assert [group["lr_scale"] for group in groups] == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    schedule = StagedSchedule(torch.optim.Adam(groups, lr=1.0), "poly", 0.01, 10)
    assert rates(schedule) == [pytest.approx(0.01 * group["lr_scale"]) for group in groups]
    deepest = {id(p) for p in (network.encoder.stage4 if kind is PCTNet else network.encoder.stages[4]).parameters()}
    assert deepest and deepest <= {id(parameter) for parameter in groups[1]["params"]}


@pytest.mark.parametrize("kind", [PCTNet, FMUNet])
def test_segmentation_layers_can_learn_faster_than_the_decoder(kind: type[torch.nn.Module]) -> None:
    network = small_network(kind)
    groups = parameter_groups(network, seg_layers_lr_factor=10)
    schedule = StagedSchedule(torch.optim.Adam(groups, lr=1.0), "decoder_only", 0.01, 10)
    assert rates(schedule) == pytest.approx([0.01, 0, 0.1])
    named = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {named[id(p)] for p in groups[-1]["params"]} == {name for name in named.values() if "seg_layers" in name}
    assert sum(len(group["params"]) for group in groups) == len(named)
