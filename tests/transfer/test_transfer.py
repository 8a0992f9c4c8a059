"""Transfer: every parameter is accounted for, and what is adapted keeps its function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo
from nnunetv2_misfm.checkpoints.names import names_of
from nnunetv2_misfm.checkpoints.source import Source
from nnunetv2_misfm.checkpoints.state_dicts import find_weights
from nnunetv2_misfm.plans.run_settings import FinetuningSettings
from nnunetv2_misfm.transfer.report import Entry, TransferReport
from nnunetv2_misfm.transfer.transfer import TransferError, transfer

SMALL = {"features_per_stage": (4, 4, 8, 16, 32), "num_heads": (2, 2, 4), "window_size": 3}


def network(seed: int, input_channels: int = 1, num_classes: int = 5, anisotropy: int = 1, **changes: object) -> PCTNet:
    torch.manual_seed(seed)
    arguments = {"strides": strides_of(anisotropy), **SMALL, **changes}
    return PCTNet(input_channels, num_classes, **arguments).eval()  # type: ignore[arg-type]


def source_of(weights: Mapping[str, torch.Tensor], name: str = "source", **known: Any) -> Source:
    return Source(Path(name), dict(weights), **known)


def with_strides(strides: list[list[int]]) -> CheckpointInfo:
    return CheckpointInfo("segmentation", "PlainConvUNet", {"strides": strides}, 1, 3, {}, {})


ONE_IMAGE = {"normalization_schemes": ["CTNormalization"]}


def test_everything_but_the_segmentation_layers_arrives() -> None:
    source, target = network(0), network(1, num_classes=3)
    fresh = {name: p.clone() for name, p in target.named_parameters() if ".seg_layers." in name}
    weights, report = transfer(source_of(source.state_dict()), target)
    target.load_state_dict(weights)
    for name, parameter in target.named_parameters():
        expected = fresh[name] if name in fresh else dict(source.named_parameters())[name]
        assert torch.equal(parameter, expected), name
    assert report.coverage(["stem", "encoder", "decoder"]) == 1
    assert report.coverage(["segmentation layers"]) == 0


SOURCE = {name: value.clone() for name, value in network(0).state_dict().items()}


@given(data=st.data())
@settings(max_examples=30)
def test_whatever_a_source_lacks_starts_fresh_and_is_said(data: st.DataObject) -> None:
    missing = data.draw(st.sets(st.sampled_from(sorted(SOURCE))), label="missing")
    wrong = data.draw(st.sets(st.sampled_from(sorted(SOURCE))), label="of another shape")
    source = {name: value for name, value in SOURCE.items() if name not in missing}
    source |= {name: torch.zeros(3, 1, 4, 1, 5, 9) for name in wrong - missing}
    target = network(1)
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    weights, report = transfer(source_of(source), target, settings=FinetuningSettings(min_coverage=0))
    status = {entry.name: entry.status for entry in report.entries}
    assert list(status) == [name for name, _ in target.named_parameters()]
    for name, parameter in target.named_parameters():
        usable = name not in missing | wrong and ".seg_layers." not in name
        assert status[name] == ("transferred" if usable else "fresh"), name
        assert torch.equal(weights[name], (SOURCE if usable else fresh)[name]), name
        assert torch.equal(parameter, fresh[name]), "the target itself is left alone"


def test_batchnorm_statistics_arrive_too() -> None:
    source, target = network(0), network(1)
    source.train()(torch.randn(2, 1, 8, 32, 32))
    target.load_state_dict(transfer(source_of(source.state_dict()), target)[0])
    for (name, a), b in zip(source.named_buffers(), target.buffers(), strict=True):
        if ".seg_layers." not in name:
            assert torch.equal(a, b), name


def test_statistics_that_a_source_lacks_are_said() -> None:
    source, target = network(0), network(1, num_classes=2)
    weights = source.state_dict()
    assert not transfer(source_of(weights), target)[1].notes
    without = {name: value for name, value in weights.items() if not ("decoder." in name and "running_" in name)}
    (note,) = transfer(source_of(without), target)[1].notes
    assert "BatchNorm layers, such as decoder." in note and "start fresh" in note


def test_slopes_of_activations_take_no_norms_place() -> None:
    def with_slopes() -> PlainConvUNet:
        unet = PlainConvUNet(
            *(1, 2, [4, 8], torch.nn.Conv3d, 3, [[1] * 3, [2] * 3], 1, 3, 1, True, torch.nn.InstanceNorm3d),
            *({"eps": 1e-5, "affine": True},),
            nonlin=torch.nn.PReLU,
            nonlin_kwargs={},
        )
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.copy_(torch.randn_like(parameter))
        return unet

    source, target = with_slopes(), with_slopes()
    weights, report = transfer(source_of(find_weights({"network_weights": source.state_dict()}, "x").weights), target)
    assert report.coverage(report.expected) == 1
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(weights[f"encoder.{name}"], value)


def test_more_input_channels_keep_the_response_to_a_repeated_image() -> None:
    source, target = network(0), network(1, input_channels=3)
    target.load_state_dict(transfer(source_of(source.state_dict()), target)[0])
    x = torch.randn(1, 1, 8, 32, 32)
    with torch.no_grad():
        a = source.encoder(x, 1, False)
        b = target.encoder(x.repeat(1, 3, 1, 1, 1), 1, False)
    for mine, theirs in zip(a, b, strict=True):
        assert (mine - theirs).norm() / mine.norm() < 1e-5


def test_the_right_stem_of_a_universal_checkpoint_is_taken() -> None:
    source, target = network(0, anisotropy=0, stems=(0, 1, 2)), network(1, anisotropy=2)
    weights, report = transfer(source_of(source.state_dict()), target)
    assert torch.equal(weights["encoder.stems.2.project.weight"], source.encoder.stems["2"].project.weight)
    assert report.coverage(["stem", "encoder", "decoder"]) == 1


def test_too_little_coverage_is_an_error_that_names_the_mismatches() -> None:
    source = network(0, features_per_stage=(4, 8, 8, 16, 32))
    with pytest.raises(TransferError) as error:
        transfer(source_of(source.state_dict(), "source.pth"), network(1))
    message = str(error.value)
    assert "source.pth covers" in message and "[4, 4, 1, 3, 3]" not in message.splitlines()[0]
    assert "shape [8" in message and "-min_coverage" in message


def test_renamed_keys_never_end_as_a_silent_start_from_scratch() -> None:
    renamed = {f"net.{key}": value for key, value in network(0).state_dict().items()}
    with pytest.raises(TransferError, match="covers 0.00 %"):
        transfer(source_of(renamed), network(1))


def test_encoder_only_leaves_the_decoder_as_it_was() -> None:
    source, target = network(0), network(1)
    weights, report = transfer(source_of(source.state_dict()), target, settings=FinetuningSettings(encoder_only=True))
    assert torch.equal(weights["decoder.up2.merge.2.weight"], target.decoder.up2.merge[2].weight)
    assert report.coverage(["encoder", "stem"]) == 1 and report.coverage(["decoder"]) == 0


def test_a_lower_threshold_lets_a_partial_transfer_through() -> None:
    source = {k: v for k, v in network(0).state_dict().items() if k.startswith("encoder.")}
    _, report = transfer(source_of(source), network(1), settings=FinetuningSettings(min_coverage=0.3))
    assert 0.3 <= report.coverage(["stem", "encoder", "decoder"]) < 1


def test_the_target_is_not_changed() -> None:
    target = network(1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    transfer(source_of(network(0).state_dict()), target)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_parameters_that_nnunet_lists_twice_are_counted_once() -> None:
    torch.manual_seed(0)
    arguments = {"n_stages": 3, "features_per_stage": [4, 8, 16], "kernel_sizes": 3, "strides": [1, 2, 2]}
    arguments |= {"conv_op": nn.Conv3d, "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "conv_bias": True}
    arguments |= {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    source, target = PlainConvUNet(1, num_classes=5, **arguments), PlainConvUNet(1, num_classes=3, **arguments)
    weights, report = transfer(source_of(source.state_dict()), target)
    target.load_state_dict(weights)
    assert sum(entry.numel for entry in report.entries) == sum(p.numel() for p in target.parameters())
    assert torch.equal(
        target.decoder.encoder.stages[0][0].convs[0].conv.weight, source.encoder.stages[0][0].convs[0].conv.weight
    )


def test_only_all_is_100_percent() -> None:
    """Of 70 million parameters a layer that stays random is soon lost in rounding."""
    entries = (Entry("a", "encoder", "transferred", "", 999_999, (1,)), Entry("b", "encoder", "fresh", "why", 1, (1,)))
    report = TransferReport("source", entries, ("encoder",))
    assert report.share() == "99.99 % of encoder (encoder 99.99 %)"
    assert "99.99%" in report.table() and "100.00%" not in report.table()
    assert "100 % of encoder" in TransferReport("source", entries[:1], ("encoder",)).share()


class WithPositions(nn.Module):
    """A patch embedding with one value for each place in the patch, and a convolution."""

    def __init__(self, *places: int):
        super().__init__()
        self.encoder = nn.Conv3d(1, 4, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 4, *places))


def test_only_kernels_are_adapted_like_kernels() -> None:
    source, target = WithPositions(5, 5, 5), WithPositions(7, 7, 7)
    weights, report = transfer(source_of(source.state_dict()), target, FinetuningSettings(min_coverage=0))
    assert torch.equal(weights["encoder.weight"], source.encoder.weight)
    assert torch.equal(weights["positions"], target.positions)
    (entry,) = (entry for entry in report.entries if entry.name == "positions")
    assert (entry.status, entry.reason) == ("fresh", "shape [1, 4, 5, 5, 5] in the source")


def test_table_fits_a_terminal_and_names_every_part() -> None:
    _, report = transfer(source_of(network(0).state_dict(), "checkpoint_final.pth"), network(1))
    lines = report.table().splitlines()
    assert max(map(len, lines[:7])) <= 80
    assert [line.split("  ")[0] for line in lines[2:7]] == [
        "stem",
        "encoder",
        "decoder",
        "segmentation layers",
        "total",
    ]


def test_parts_by_name() -> None:
    names = names_of(network(0))
    assert names.part_of("encoder.stems.1.project.weight") == "stem"
    assert names.part_of("encoder.stage2.conv.0.weight") == "encoder"
    assert names.part_of("decoder.pre_seg2.0.weight") == "decoder"
    assert names.part_of("decoder.seg_layers.0.weight") == "segmentation layers"
    assert names.part_of("projector.weight") == "other"
    names = names_of(unet([[1, 1, 1], [2, 2, 2]], [4, 8]))
    assert names.part_of("encoder.stages.0.0.convs.0.conv.weight") == "stem"
    assert names.part_of("encoder.stages.10.0.convs.0.conv.weight") == "encoder"


def features(net: PCTNet, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return net.encoder(x, net.anisotropy, False)  # type: ignore[no-any-return]


def test_label_channels_of_a_cascade_change_nothing_at_first() -> None:
    source, target = network(0), network(1, input_channels=3)
    weights, report = transfer(source_of(source.state_dict()), target, channels=("CT",))
    target.load_state_dict(weights)
    image, labels = torch.randn(1, 1, 8, 32, 32), torch.rand(1, 2, 8, 32, 32).round()
    for mine, theirs in zip(features(source, image), features(target, torch.cat([image, labels], 1)), strict=True):
        assert (mine - theirs).norm() / mine.norm() < 1e-6
    assert any(entry.reason == "input channels 1 to 3" for entry in report.entries)


def test_several_channels_are_mixed_only_when_asked_for() -> None:
    source, target = network(0, input_channels=3), network(1, input_channels=2)
    with pytest.raises(TransferError, match="--mix_input_channels"):
        transfer(source_of(source.state_dict()), target)
    target.load_state_dict(
        transfer(source_of(source.state_dict()), target, settings=FinetuningSettings(mix_input_channels=True))[0]
    )
    image = torch.randn(1, 1, 8, 32, 32)
    ours, theirs = features(target, image.repeat(1, 2, 1, 1, 1)), features(source, image.repeat(1, 3, 1, 1, 1))
    assert all((a - b).norm() / b.norm() < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("degree", [0, 1])
def test_a_stem_of_a_higher_degree_is_the_same_function_where_slices_are_equal(degree: int) -> None:
    """Flat kernels go to the centre of full ones: a volume that does not change along its depth keeps its features."""
    source, target = network(0, anisotropy=2), network(1, anisotropy=degree)
    target.load_state_dict(transfer(source_of(source.state_dict()), target)[0])
    slice_ = torch.randn(1, 1, 1, 32, 32)
    depth = 8
    a = features(source, slice_.expand(-1, -1, depth, -1, -1))
    b = features(target, slice_.expand(-1, -1, depth * 2 ** (2 - degree), -1, -1))
    # At stage 2 both have the same depth again.
    assert (a[2] - b[2]).norm() / a[2].norm() < 1e-5


def test_a_stem_of_a_lower_degree_is_reported_as_adapted() -> None:
    source, target = network(0, anisotropy=0), network(1, anisotropy=2)
    weights, report = transfer(source_of(source.state_dict()), target)
    reasons = {entry.reason for entry in report.entries if entry.status == "adapted"}
    assert "from degree of anisotropy 0, kernel [3, 3, 3] to [1, 3, 3]" in reasons
    flat = weights["encoder.stems.2.project.weight"]
    assert torch.allclose(flat, source.encoder.stems["0"].project.weight.sum(2, keepdim=True))
    assert report.coverage(["stem", "encoder", "decoder"]) == 1


def unet(strides: list[list[int]], features_per_stage: list[int]) -> PlainConvUNet:
    stages = len(strides)
    return PlainConvUNet(
        1, stages, features_per_stage, nn.Conv3d, 3, strides, 1, 3, 1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    )  # fmt: skip


def test_unets_with_more_or_fewer_stages_are_aligned_by_resolution() -> None:
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    deep, shallow = unet(strides, [4, 8, 12, 16]), unet(strides[:3], [4, 8, 12])
    weights, report = transfer(source_of(deep.state_dict(), info=with_strides(strides)), shallow)
    assert report.coverage(["encoder", "decoder"]) == 1
    # The finest stage of a decoder is its last one, whatever the number of stages.
    assert torch.equal(weights["decoder.stages.1.convs.0.conv.weight"], deep.decoder.stages[2].convs[0].conv.weight)
    with pytest.raises(TransferError):
        transfer(source_of(shallow.state_dict(), info=with_strides(strides[:3])), deep)
    lenient = FinetuningSettings(min_coverage=0.2)
    weights, report = transfer(source_of(shallow.state_dict(), info=with_strides(strides[:3])), deep, lenient)
    fresh = {entry.name for entry in report.entries if entry.status == "fresh" and entry.part == "encoder"}
    assert fresh and all(name.startswith("encoder.stages.3.") for name in fresh)
    assert torch.equal(weights["decoder.stages.2.convs.0.conv.weight"], shallow.decoder.stages[1].convs[0].conv.weight)


def test_label_channels_start_at_zero_even_where_the_numbers_of_channels_agree() -> None:
    source, target = network(0, input_channels=3), network(1, input_channels=3)
    mixing = FinetuningSettings(mix_input_channels=True)
    weights, _ = transfer(source_of(source.state_dict()), target, settings=mixing, channels=("CT",))
    assert weights["encoder.stems.1.project.weight"][:, 1:].abs().sum() == 0
    again, report = transfer(source_of(weights, preprocessing=ONE_IMAGE), target, channels=("CT",))
    assert torch.equal(again["encoder.stems.1.project.weight"], weights["encoder.stems.1.project.weight"])
    assert all(entry.status != "adapted" for entry in report.entries)


def test_what_a_network_learnt_about_the_labels_of_a_cascade_never_acts_on_those_of_another() -> None:
    source, target = network(0, input_channels=3), network(1, input_channels=3)
    name = "encoder.stems.1.project.weight"
    for channels in (("CT",), ("ct",)):  # by name or in order
        cascade = source_of(source.state_dict(), preprocessing=ONE_IMAGE, channels=("CT",))
        weights, report = transfer(cascade, target, channels=channels)
        assert torch.equal(weights[name][:, 0], source.state_dict()[name][:, 0])
        assert not weights[name][:, 1:].any()
        entry = next(entry for entry in report.entries if entry.name == name)
        assert (entry.status, entry.reason) == ("adapted", "labels of a cascade start at zero")


def test_statistics_arrive_under_all_names_a_unet_lists_them_by() -> None:
    network_ = PlainConvUNet(
        1, 2, [4, 8], nn.Conv3d, 3, [[1, 1, 1], [2, 2, 2]], 1, 3, 1, norm_op=nn.BatchNorm3d, nonlin=nn.LeakyReLU
    )
    source = {n: torch.full_like(v, 7) for n, v in network_.named_buffers()} | dict(network_.named_parameters())
    weights, _ = transfer(source_of(source), network_)
    network_.load_state_dict(weights)
    assert all((buffer == 7).all() for buffer in network_.buffers())
