"""Checkpoints of other projects: found, read, described, or refused by name; nothing is wrong in silence."""

from __future__ import annotations

import argparse
import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import STRIDES, as_generic_unet, as_published_fmunet, plans, unet
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError, CheckpointInfo, read_checkpoint, write_checkpoint
from nnunetv2_misfm.checkpoints.foreign import KINDS, recognised
from nnunetv2_misfm.checkpoints.inspection import export
from nnunetv2_misfm.checkpoints.source import (
    Source,
    load_network,
    load_source,
    portable_path,
    read_source,
)
from nnunetv2_misfm.plans.network_entry import architecture_entry
from nnunetv2_misfm.plans.run_settings import FinetuningSettings
from nnunetv2_misfm.transfer.images import about_channels
from nnunetv2_misfm.transfer.report import TransferReport
from nnunetv2_misfm.transfer.transfer import TransferError, transfer

IMAGE = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
WEIGHTS = unet().state_dict()


def put(path: Path, content: object, **options: Any) -> Source:
    torch.save(content, path, **options)
    return read_source(path)


def fill(
    source: Source, target: nn.Module, channels: tuple[str, ...] = ("CT",), **settings: Any
) -> tuple[dict[str, Tensor], TransferReport]:
    weights, report = transfer(source, target, FinetuningSettings(**settings), channels)
    target.load_state_dict(weights)
    return weights, report


def same_features(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return all(torch.equal(x, y) for x, y in zip(a.encoder(IMAGE), b.encoder(IMAGE), strict=True))


def prefixed(prefix: str, weights: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "content",
    [
        lambda: {"network_weights": WEIGHTS},
        lambda: {"state_dict": OrderedDict(WEIGHTS), "epoch": 3},
        lambda: {"model": {"state_dict": WEIGHTS}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        lambda: {"net": prefixed("module."), "args": argparse.Namespace(lr=np.float64(0.1), path=Path("x"))},
        lambda: {"student": prefixed("module.backbone.")},
        lambda: prefixed("_orig_mod.module."),
        lambda: prefixed("module._orig_mod.model.net."),
        lambda: {"state_dict": prefixed("seg_model.whatever.")},
        lambda: {k.replace("encoder.", "encoder._orig_mod.", 1): v for k, v in WEIGHTS.items()},
        lambda: {"model": {k: v for k, v in WEIGHTS.items() if "all_modules" not in k}},
        lambda: {"state_dict": {k: v.numpy() for k, v in WEIGHTS.items()}},
        lambda: {"models": [WEIGHTS], "epoch": 3},
        lambda: {"model": {k: v for k, v in WEIGHTS.items() if ".conv." not in k and ".norm." not in k}},
    ],
)
def test_weights_are_found_wherever_they_lie(tmp_path: Path, content: Callable[[], object]) -> None:
    target = unet(1)
    _, report = fill(put(tmp_path / "c.pt", content()), target)
    assert report.coverage(report.expected) == 1 and same_features(unet(), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_and_named(tmp_path: Path, dtype: torch.dtype) -> None:
    source = put(tmp_path / "c.pt", {name: value.to(dtype) for name, value in WEIGHTS.items()})
    assert all(value.dtype == torch.float32 for value in source.weights.values())
    assert any("stored as" in note for note in source.notes) == (dtype != torch.float64)


def test_files_of_before_pytorch_1_6_and_any_ending_are_read(tmp_path: Path) -> None:
    for name in ("c.model", "c.ckpt", "c.pth"):
        source = put(
            tmp_path / name, {"state_dict": WEIGHTS, "score": np.float32(1)}, _use_new_zipfile_serialization=False
        )
        assert source.network_name == "PlainConvUNet"


def test_safetensors_of_others_are_read(tmp_path: Path) -> None:
    save_file({k: v.contiguous().clone() for k, v in prefixed("model.").items()}, tmp_path / "model.safetensors")
    target = unet(1)
    fill(read_source(tmp_path / "model.safetensors"), target)
    assert same_features(unet(), target)


def test_safetensors_that_keep_one_name_of_each_tensor_are_read(tmp_path: Path) -> None:
    save_model(unet(), str(tmp_path / "model.safetensors"))  # the names that come first in the alphabet
    source, target = read_source(tmp_path / "model.safetensors"), unet(1)
    _, report = fill(source, target)
    assert report.coverage(report.expected) == 1 and same_features(unet(), target)


def test_the_first_fold_of_an_exported_model_is_read(tmp_path: Path) -> None:
    for fold in (1, 0):
        torch.save({"network_weights": unet(fold).state_dict()}, tmp_path / f"{fold}.pth")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("Dataset1_X/t__p__3d/plans.json", "{}")
        for fold in (1, 0):
            archive.write(tmp_path / f"{fold}.pth", f"Dataset1_X/t__p__3d/fold_{fold}/checkpoint_final.pth")
    target = unet(2)
    fill(read_source(tmp_path / "model.zip"), target)
    assert same_features(unet(0), target)


def test_of_several_networks_the_trained_one_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    for content in (
        {"model_ema": unet(1).state_dict(), "model": WEIGHTS},
        {"teacher": unet(1).state_dict(), "student": WEIGHTS},
        prefixed("teacher.backbone.", unet(1).state_dict()) | prefixed("student.backbone."),
        {"teacher": unet(1, strides=[*STRIDES, [2, 2, 2]]).state_dict(), "semantic_model": WEIGHTS},  # no "ema" in it
    ):
        source = put(tmp_path / "c.pt", content)
        target = unet(2)
        fill(source, target)
        assert same_features(unet(), target) and "holds 2 networks" in source.notes[0]
    assert put(tmp_path / "c.pt", {"model_ema": WEIGHTS}).network_name == "PlainConvUNet"


def test_of_two_values_for_a_parameter_the_one_pytorch_loads_last_is_taken(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in unet(residual=True).state_dict().items()}
    for name in weights:
        if ".conv." in name or ".norm." in name:
            weights[name] = torch.zeros_like(weights[name])  # as sparse pretraining leaves them: not trained
    expected, target = unet(1, residual=True), unet(2, residual=True)
    expected.load_state_dict(weights)
    source = put(tmp_path / "c.pth", {"network_weights": weights})
    fill(source, target)
    assert same_features(expected, target)
    assert (
        "stand in the file more than once" in source.notes[0] and "all_modules.0.weight in place of" in source.notes[0]
    )


def test_equal_values_under_several_names_need_no_word(tmp_path: Path) -> None:
    assert put(tmp_path / "c.pth", {name: value.clone() for name, value in WEIGHTS.items()}).notes == ()


@pytest.mark.parametrize("old", [False, True])
def test_plans_of_both_formats_tell_spacing_intensities_and_topology(tmp_path: Path, old: bool) -> None:
    source = put(tmp_path / "c.pth", {"network_weights": WEIGHTS, "init_args": plans(old=old), "current_epoch": 7})
    assert source.info is not None and source.channels == ("CT",)
    assert source.info.preprocessing["spacing"] == [1.5, 1.5, 1.5]
    assert source.info.preprocessing["foreground_intensity_properties_per_channel"]["0"]["mean"] == 87.3
    assert source.info.arch_kwargs["strides"] == STRIDES and source.info.num_classes == 3


def test_weights_alone_tell_the_network(tmp_path: Path) -> None:
    info = put(tmp_path / "c.pt", unet(channels=2, residual=True).state_dict()).info
    assert info is not None and info.network_class_name.endswith("ResidualEncoderUNet")
    assert (info.input_channels, info.num_classes, info.arch_kwargs["strides"]) == (2, 3, STRIDES)
    assert info.arch_kwargs["features_per_stage"] == [4, 8, 12]


def test_the_plan_of_nnssl_is_read_from_the_file_or_beside_it(tmp_path: Path) -> None:
    configuration = {"spacing": [1, 1, 1], "patch_size": [160] * 3, "normalization_schemes": ["ZScoreNormalization"]}
    adaptation = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
        "pretrain_plan": {"dataset_name": "OpenMind", "configurations": {"onemmiso": configuration}},
    }
    weights = {"network_weights": unet(residual=True).state_dict()}
    inside = put(tmp_path / "c.pth", {**weights, "nnssl_adaptation_plan": adaptation})
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(adaptation), encoding="utf-8")
    for source in (inside, put(tmp_path / "d.pth", weights)):
        assert source.info is not None and source.info.preprocessing["spacing"] == [1, 1, 1]
        assert source.num_images == 1
    assert inside.notes == () and "adaptation_plan.json, which lies beside it" in source.notes[0]


def test_the_plan_of_nnssl_says_nothing_of_another_projects_file_in_the_same_folder(tmp_path: Path) -> None:
    configuration = {"spacing": [1, 1, 1], "normalization_schemes": ["ZScoreNormalization"]}
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL"},
        "pretrain_plan": {"configurations": {"onemmiso": configuration}},
    }
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for content in (WEIGHTS, {"state_dict": WEIGHTS}):
        source = put(tmp_path / "c.pth", content)
        assert source.preprocessing == {} and source.num_images is None


@pytest.mark.parametrize("residual", [False, True])
def test_a_trainer_may_have_built_another_kind_of_unet_than_its_plans_name(tmp_path: Path, residual: bool) -> None:
    told = plans()
    told["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage": [1, 1, 1],
    }
    source = put(tmp_path / "c.pth", {"network_weights": unet(residual=residual).state_dict(), "init_args": told})
    assert source.info is not None
    assert ("n_blocks_per_stage" in source.info.arch_kwargs) is residual
    assert ("n_conv_per_stage" in source.info.arch_kwargs) is not residual


def test_a_checkpoint_behind_a_link_is_read_by_the_links_name_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the cache of the Hugging Face Hub and DVC keep files: under names that say nothing.
    source = put(tmp_path / "c.pth", {"network_weights": WEIGHTS, "init_args": plans()})
    export(str(source.path), tmp_path / "exported", None)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "exported" / "model.safetensors").rename(tmp_path / "blobs" / "f00d")
    (tmp_path / "exported" / "model.safetensors").symlink_to(tmp_path / "blobs" / "f00d")
    linked = read_source(tmp_path / "exported" / "model.safetensors")
    named = {"checkpoint_path": portable_path(linked.path), "sha256": linked.sha256}
    assert load_source(named).preprocessing == linked.preprocessing
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))  # which is a link itself, and is moved later
    (tmp_path / "results").symlink_to(tmp_path / "exported", target_is_directory=True)
    for path in (linked.path, tmp_path / "results" / "model.safetensors"):
        assert portable_path(path) == "model.safetensors"
    assert load_source({"checkpoint_path": "model.safetensors"}).sha256 == linked.sha256


@pytest.mark.parametrize(
    "init_args",
    [{}, None, [], {"plans": 3}, {"plans": {}, "configuration": "x"}, {"plans": {"configurations": {"x": {}}}}],
)
def test_a_malformed_description_is_not_known(tmp_path: Path, init_args: object) -> None:
    source = put(
        tmp_path / "c.pth", {"network_weights": WEIGHTS, "init_args": init_args, "logging": {"mean_fg_dice": "x"}}
    )
    assert source.info is not None and source.info.preprocessing == {} and source.learnt == ""


@pytest.mark.parametrize("channels", [1, 2])
def test_all_channels_of_a_published_network_are_images(tmp_path: Path, channels: int) -> None:
    entry = architecture_entry("fmunet", 0, features_per_stage=[4, 4, 4, 8, 8])
    network, target = (
        FMUNet(channels, 2, deep_supervision=True, **entry["arch_kwargs"]) for _ in ("published", "for a dataset")
    )
    source = put(tmp_path / "c.pt", {"model_state_dict": as_published_fmunet(network)})
    assert source.num_images == channels
    weights, report = fill(source, target, ("CT", "PET")[:channels])
    assert torch.equal(weights["encoder.stem.weight"], network.state_dict()["encoder.stem.weight"])
    assert not any(entry.status == "adapted" for entry in report.entries)


def test_channels_are_matched_by_name(tmp_path: Path) -> None:
    weights = unet(channels=2).state_dict()
    source = put(tmp_path / "c.pth", {"network_weights": weights, "init_args": plans(("T1", "T2"))})
    first = "encoder.stages.0.0.convs.0.conv.weight"
    filled, report = fill(source, unet(1, channels=2), ("t2", "T1"))
    assert torch.equal(filled[first], weights[first][:, [1, 0]])
    assert any("input channels T2, T1 of T1, T2" in entry.reason for entry in report.entries)
    filled, _ = fill(source, unet(1), ("T2",))
    assert torch.equal(filled[first], weights[first][:, 1:])
    filled, report = fill(source, unet(1, channels=2), ("T1", "T2"))
    assert torch.equal(filled[first], weights[first]) and all(e.status != "adapted" for e in report.entries)


def test_kernels_of_a_cascades_labels_never_act_on_images(tmp_path: Path) -> None:
    weights = unet(channels=3).state_dict()
    source = put(tmp_path / "c.pth", {"network_weights": weights, "init_args": plans(("CT",))})
    first = "encoder.stages.0.0.convs.0.conv.weight"
    filled, _ = fill(source, unet(1, channels=3), ("a", "b", "c"))
    assert torch.allclose(filled[first], weights[first][:, :1].expand(-1, 3, -1, -1, -1) / 3)


def test_statistics_that_are_lost_or_missing_are_said(tmp_path: Path) -> None:
    batch_norm = put(tmp_path / "b.pth", unet(norm=nn.BatchNorm3d).state_dict())
    assert batch_norm.info is not None and "BatchNorm3d" in batch_norm.info.arch_kwargs["norm_op"]
    _, report = fill(batch_norm, unet(1))
    assert "means and variances of 5 layers are lost" in report.notes[0]
    assert {tensor.part for tensor in report.unused if tensor.name.endswith("running_mean")} == {
        "stem",
        "encoder",
        "decoder",
    }
    _, report = fill(put(tmp_path / "i.pth", WEIGHTS), unet(1, norm=nn.BatchNorm3d))
    assert "start fresh" in report.notes[0]
    _, report = fill(batch_norm, unet(1, norm=nn.BatchNorm3d))
    assert report.notes == ()


def test_what_of_the_source_is_not_used_is_listed_with_the_reason(tmp_path: Path) -> None:
    extra = {"projector.weight": torch.zeros(2), "mask_tokens.0": torch.zeros(1)}
    deep = unet(strides=[*STRIDES, [2, 2, 2]]).state_dict()
    source = put(tmp_path / "c.pth", {"state_dict": prefixed("net.", deep | extra) | {"other.head": torch.zeros(1)}})
    _, report = fill(source, unet(1), encoder_only=True)
    reasons = {(tensor.part, tensor.reason) for tensor in report.unused}
    assert ("other", "no part of this network") in reasons and ("other", "outside of net.") in reasons
    assert ("decoder", "only the encoder was asked for") in reasons
    assert ("segmentation layers", "segmentation layers always start fresh") in reasons
    assert ("encoder", "this network has no such stage, or no such layer in it") in reasons
    assert "Not used of the checkpoint:" in report.table() and report.as_json()["unused"]


def test_a_generic_unet_of_version_1_is_the_same_network(tmp_path: Path) -> None:
    network, target = unet(), unet(1)
    source = put(tmp_path / "c.model", {"state_dict": as_generic_unet(network), "plot_stuff": [[np.float64(1)]]})
    assert source.info is not None and source.info.arch_kwargs["strides"] == STRIDES
    filled, report = fill(source, target)
    assert report.coverage(report.expected) == 1 and all(e.status != "adapted" for e in report.entries)
    target.load_state_dict(filled | {k: v for k, v in source.weights.items() if ".seg_layers." in k})
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(network(IMAGE), target(IMAGE), strict=True))


REFUSED = [kind for kind in KINDS if kind.refusal]


@pytest.mark.parametrize("kind", REFUSED, ids=[kind.name for kind in REFUSED])
def test_other_networks_are_refused_by_name(tmp_path: Path, kind: Any) -> None:
    told = [alternatives.split("|") for alternatives in kind.told_by]
    for choice in range(max(map(len, told))):
        names = [alternatives[min(choice, len(alternatives) - 1)] for alternatives in told]
        source = put(tmp_path / "c.pth", {"state_dict": {f"module.{name}": torch.zeros(4, 4) for name in names}})
        for share in (1.0, 0.0):
            with pytest.raises(TransferError, match="which cannot be used: .{40}") as refused:
                fill(source, unet(1), min_coverage=share)
            assert kind.name in str(refused.value)


NAMES = [
    line.split("; ")
    for line in Path(__file__).with_name("real_names.txt").read_text(encoding="utf-8").splitlines()
    if line[0] != "#"
]


@pytest.mark.parametrize(("kind", "whose", "names"), NAMES, ids=[whose for _, whose, _ in NAMES])
def test_networks_are_told_by_the_names_that_their_code_gives(kind: str, whose: str, names: str) -> None:
    for wrapper in ("", "module.", "model.backbone."):
        known = recognised([wrapper + name for name in names.split()])
        assert known is not None and known[0].name == kind


def test_nothing_used_is_an_error_whatever_was_allowed(tmp_path: Path) -> None:
    source = put(tmp_path / "c.pth", {f"layer{i}.weight": torch.zeros(2) for i in range(50)})
    with pytest.raises(TransferError, match="Nothing of it can be used") as error:
        fill(source, unet(1), min_coverage=0.0)
    assert str(error.value).count("\n") <= 7


def test_a_refusal_names_the_option_that_helps(tmp_path: Path) -> None:
    wide = unet(strides=[*STRIDES, [2, 2, 2]]).state_dict()  # four stages in place of three
    cases = [
        (WEIGHTS, unet(1, strides=[*STRIDES, [2, 2, 2]]), ("CT",), "-network pretrained trains"),
        (
            {name: value for name, value in wide.items() if name.startswith("encoder.")},
            nn.Conv3d(1, 4, 3),
            ("CT",),
            "-p",
        ),
        (unet(channels=3).state_dict(), unet(1, channels=2), ("a", "b"), r"Allow it with --mix_input_channels\.$"),
    ]
    for weights, target, channels, told in cases:
        with pytest.raises(TransferError, match=told):
            fill(put(tmp_path / "c.pt", weights), target, channels)


def test_plans_for_another_number_of_stages_than_the_weights_are_not_believed(tmp_path: Path) -> None:
    made_by = plans()
    made_by["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"] = [[1, 1, 1]] * 7
    encoder = {name: value for name, value in WEIGHTS.items() if name.startswith("encoder.")}
    info = put(tmp_path / "c.pth", {"network_weights": encoder, "init_args": made_by}).info
    assert info is not None and "strides" not in info.arch_kwargs


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (("CT",), ("CT",), []),
        (("CT",), ("MR",), ["the checkpoint's channels are called CT, the dataset's MR"]),
        (("CT",), ("T1", "T2"), ["the checkpoint's one channel, CT, is the start for all of T1, T2"]),
        (
            ("a", "b"),
            ("c", "d"),
            ["the checkpoint's channels are called a, b, the dataset's c, d; they are taken in order"],
        ),
        (("T1", "T2"), ("T2", "T1"), ["input channels are matched by name: the weights of T2 for T2, T1 for T1"]),
    ],
)
def test_how_channels_are_matched_is_said(
    tmp_path: Path, theirs: tuple[str, ...], ours: tuple[str, ...], told: list[str]
) -> None:
    content = {"network_weights": unet(channels=len(theirs)).state_dict(), "init_args": plans(theirs)}
    said = [sentence.rstrip(".") for sentence in about_channels(put(tmp_path / "c.pth", content), ours)]
    assert said == told


def test_parts_that_were_not_trained_start_fresh_and_are_not_expected(tmp_path: Path) -> None:
    info = CheckpointInfo("vox2vec", "dynamic_network_architectures.architectures.unet.PlainConvUNet", {}, 1, 3, {}, {})
    log = {"mean_fg_dice": [0.2, 0.5, 0.4]}
    content = {"network_weights": WEIGHTS, "trained_parts": ["encoder", "stem"], "logging": log}
    write_checkpoint(content, info, tmp_path / "c.pth")
    source, target = read_source(tmp_path / "c.pth"), unet(1)
    fresh = target.decoder.transpconvs[0].weight.clone()
    _, report = fill(source, target)
    assert torch.equal(target.decoder.transpconvs[0].weight, fresh) and same_features(unet(), target)
    assert report.expected == ("stem", "encoder") and report.coverage(["decoder"]) == 0
    assert {e.reason for e in report.entries if e.part == "decoder"} == {"the decoder was not trained by vox2vec"}
    assert source.learnt == "score (nnU-Net's pseudo Dice) 0.400 in the last of 3 epochs, 0.500 at best"


def test_what_is_exported_keeps_what_was_not_trained(tmp_path: Path) -> None:
    content = {"network_weights": WEIGHTS, "trained_parts": ["encoder", "stem"]}
    torch.save(content, tmp_path / "c.pth")
    export(str(tmp_path / "c.pth"), tmp_path / "folder", None)
    again = read_source(tmp_path / "folder" / "model.safetensors")
    assert list(again.untrained) == ["decoder"]
    assert again.info == read_source(tmp_path / "c.pth").info


@pytest.mark.parametrize("prefix", ["encoder.", "", "backbone.encoder.", "module.encoder_q."])
@pytest.mark.parametrize("residual", [False, True])
def test_a_checkpoint_of_an_encoder_alone_is_expected_to_fill_the_encoder(
    tmp_path: Path, residual: bool, prefix: str
) -> None:
    encoder = unet(residual=residual).encoder.state_dict()
    source, target = put(tmp_path / "c.pth", {"state_dict": prefixed(prefix, encoder)}), unet(1, residual=residual)
    _, report = fill(source, target)
    assert report.expected == ("stem", "encoder") and same_features(unet(residual=residual), target)
    assert {e.reason for e in report.entries if e.part == "decoder"} == {"the checkpoint has no decoder"}


def test_unknown_parts_ask_for_an_update(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'neck'.*Update"):
        put(tmp_path / "c.pth", {"network_weights": WEIGHTS, "trained_parts": ["neck"]})


def test_what_is_no_network_is_not_counted_as_one(tmp_path: Path) -> None:
    callbacks = {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}}
    source = put(tmp_path / "c.ckpt", {"callbacks": callbacks, "state_dict": prefixed("network.")})
    assert source.notes == () and source.network_name == "PlainConvUNet"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_diverged_training_are_refused(tmp_path: Path, value: float) -> None:
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    weights["decoder.stages.1.convs.0.all_modules.1.weight"][0] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 of .* such as decoder\.stages\.1\.convs\.0\.norm"):
        put(tmp_path / "c.pt", weights)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantised weights, such as .*int8"):
        put(tmp_path / "c.pt", {name: (100 * value).to(torch.int8) for name, value in WEIGHTS.items()})


def test_torchscript_and_what_a_download_may_leave_are_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Conv3d(1, 1, 1), IMAGE), str(tmp_path / "script.pt"))
    (tmp_path / "pointer.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", encoding="utf-8"
    )
    (tmp_path / "page.pt").write_text(
        "<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>", encoding="utf-8"
    )
    for name, told in (("script.pt", "TorchScript"), ("pointer.pth", "git lfs pull"), ("page.pt", "a web page")):
        with pytest.raises(CheckpointError, match=f"{name}.*{told}"):
            read_checkpoint(tmp_path / name)


def test_a_folder_is_answered_with_the_checkpoint_in_it(tmp_path: Path) -> None:
    for name in ("t__p__2d/fold_0/checkpoint_final.pth", "t__p__3d_fullres/fold_0/checkpoint_final.pth", "a.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="is a folder.*such as .*3d_fullres/fold_0/checkpoint_final.pth"):
        read_checkpoint(tmp_path)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="such as .*exported/model.safetensors"):
        read_checkpoint(tmp_path / "exported")


def test_files_without_weights_name_at_most_five_keys(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights of a network") as error:
        put(tmp_path / "c.pth", {f"key{i}": i for i in range(100)})
    assert str(error.value).count("key") == 5


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """PyTorch does not look at the checksums of its files."""
    path = tmp_path / "c.pth"
    torch.save({"network_weights": WEIGHTS}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged.*Copy or download it again"):
        read_source(path)
    if not hasattr(torch.serialization, "set_crc32_options"):
        return
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"network_weights": WEIGHTS}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_source(path).network_name == "PlainConvUNet"


def test_paths_of_any_system_and_python_are_read_as_text_of_a_path(tmp_path: Path) -> None:
    for module in ("pathlib", "pathlib._local"):
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            name = f"c{module}\n{kind}\n"
            pickled = b"\x80\x02}X\x01\x00\x00\x00a" + name.encode() + b"X\x01\x00\x00\x00x\x85Rs."
            with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
                archive.writestr("c/data.pkl", pickled)
                archive.writestr("c/version", "3\n")
                archive.writestr("c/byteorder", "little")
            assert str(read_checkpoint(tmp_path / "c.pth")["a"]) == "x"


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    save_file({k: v.contiguous().clone() for k, v in WEIGHTS.items()}, tmp_path / "weights.pth")
    assert read_source(tmp_path / "weights.pth").network_name == "PlainConvUNet"
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_source(tmp_path / "a.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_source(tmp_path / "d.safetensors")


def test_an_archive_with_other_pickles_is_still_an_archive(tmp_path: Path) -> None:
    torch.save({"network_weights": WEIGHTS}, tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "c.pth", "fold_0/checkpoint_final.pth")
        archive.writestr("fold_0/metadata.pkl", "x")
    assert read_source(tmp_path / "a.zip").network_name == "PlainConvUNet"


def test_values_that_are_never_used_may_be_anything(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "decoder.seg_layers.0.bias": torch.full((3,), float("nan"))}
    assert read_source(put(tmp_path / "c.pth", weights).path).network_name == "PlainConvUNet"
    odd = {"a": torch.zeros(2, device="meta"), "b": torch.eye(3).to_sparse()}
    assert put(tmp_path / "c.pth", {"state_dict": WEIGHTS, "more": odd}).network_name == "PlainConvUNet"


@pytest.mark.parametrize("own", [PCTNet, FMUNet])
def test_weights_alone_tell_a_network_of_this_package(tmp_path: Path, own: Any) -> None:
    arguments: dict[str, Any] = {"features_per_stage": [4, 8, 8, 16, 32]}
    arguments |= {"stems": [0, 2], "window_size": 4, "n_swin_blocks": 1, "mlp_ratio": 2.0} if own is PCTNet else {}
    entry = architecture_entry(own.__name__.lower(), 0, **arguments)
    network = own(2, 3, **entry["arch_kwargs"])
    source = put(tmp_path / "c.pth", prefixed("module.", network.state_dict()))
    assert source.info is not None and source.info.input_channels == 2 and source.info.num_classes == 3
    assert arguments.items() <= source.arch_kwargs.items()
    again = load_network(tmp_path / "c.pth")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in network.state_dict().items())
    weights = network.state_dict()
    del weights[next(iter(weights))]
    assert put(tmp_path / "c.pth", weights).info is None


def test_a_damaged_description_of_our_own_is_not_known(tmp_path: Path) -> None:
    info = CheckpointInfo("segmentation", "Own", {}, 1, 3, {"normalization_schemes": 5, "spacing": [1.0, 1.0, 1.0]}, {})
    write_checkpoint({"network_weights": OwnNetwork(1, 3).state_dict()}, info, tmp_path / "c.pth")
    assert read_source(tmp_path / "c.pth").preprocessing == {"spacing": [1.0, 1.0, 1.0]}


def test_a_zip_file_of_several_disks_is_damaged(tmp_path: Path) -> None:
    """As Python's zipfile takes the 64-bit end of an archive whose numbers are damaged."""
    put(tmp_path / "c.pth", WEIGHTS)
    content = (tmp_path / "c.pth").read_bytes()
    end = content.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 7, 0, 1)
    (tmp_path / "c.pth").write_bytes(content[:end] + locator + content[end:])
    with pytest.raises(CheckpointError, match="c.pth is damaged .*Copy or download it again"):
        read_source(tmp_path / "c.pth")


def test_archives_of_other_things_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(CheckpointError, match="an archive without a checkpoint"):
        read_checkpoint(tmp_path / "a.zip")


class OwnNetwork(nn.Module):
    """A network that is known nowhere here and declares nothing, as plans may name one."""

    def __init__(self, input_channels: int, num_classes: int):
        super().__init__()
        self.first = nn.Conv3d(input_channels, 4, 3, padding=1)
        self.body = nn.Conv3d(4, 4, 3, padding=1)
        self.out = nn.Conv3d(4, num_classes, 1)


def test_a_network_of_the_users_own_is_transferred_to_itself(tmp_path: Path) -> None:
    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    read = put(tmp_path / "c.pth", {"state_dict": prefixed("module.model.", source.state_dict())})
    weights, report = transfer(
        read, target, channels=("CT",), rebuilt=lambda channels, classes: OwnNetwork(1 + channels, 3 + classes)
    )
    assert torch.equal(weights["body.weight"], source.body.weight) and torch.equal(
        weights["out.weight"], target.out.weight
    )
    assert report.coverage(report.expected) == 1
    assert {e.name for e in report.entries if e.part == "segmentation layers"} == {"out.weight", "out.bias"}


@pytest.mark.parametrize(("copy", "trained"), [("teacher.", "student."), ("ema_model.", "online."), ("swa.", "")])
def test_a_network_of_the_users_own_is_not_filled_with_the_average_of_its_weights(
    tmp_path: Path, copy: str, trained: str
) -> None:
    source, average, target = OwnNetwork(1, 3), OwnNetwork(1, 3), OwnNetwork(1, 3)
    both = prefixed(copy, average.state_dict()) | prefixed(trained, source.state_dict())
    fill(put(tmp_path / "c.pth", {"state_dict": both}), target, min_coverage=0.5)
    assert torch.equal(target.body.weight, source.body.weight)


def test_names_behind_a_prefix_are_found_without_the_networks_first(tmp_path: Path) -> None:
    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    weights = {name: value for name, value in prefixed("module.", source.state_dict()).items() if "first" not in name}
    fill(put(tmp_path / "c.pth", {"state_dict": weights}), target, min_coverage=0.5)
    assert torch.equal(target.body.weight, source.body.weight)


def test_what_of_a_checkpoint_a_smaller_network_leaves_out_is_said(tmp_path: Path) -> None:
    source = put(tmp_path / "c.pth", unet(strides=[*STRIDES, [2, 2, 2]]).state_dict())
    _, report = fill(source, unet(1))
    assert "but only" in report.share() and report.share_of_source() < 0.7
    _, report = fill(put(tmp_path / "c.pth", unet().state_dict()), unet(1))
    assert report.share_of_source() == 1 and "only" not in report.share()


class InOrder(nn.Module):
    """A network of the user's own with names that nnU-Net's have too, for other things."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 2, 1)
        self.body = nn.Module()
        self.body.all_modules = nn.ModuleList([nn.Conv3d(2, 2, 1) for _ in range(3)])
        self.decoder = nn.Module()
        self.decoder.encoder = nn.Conv3d(2, 2, 1)


def test_names_of_networks_that_are_not_known_mean_what_they_say(tmp_path: Path) -> None:
    source, target = InOrder(), InOrder()
    weights, report = fill(put(tmp_path / "c.pth", {"state_dict": source.state_dict()}), target)
    assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())
    assert report.coverage(report.expected) == 1 and not report.unused


def test_a_list_of_stages_with_names_in_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="nothing|None|0 %"):
        fill(put(tmp_path / "c.pth", {"state_dict": {"encoder.stages.a.0.weight": torch.ones(2)}}), unet())


class Around(nn.Module):
    """A network of the user's own around another, and beside it a layer of its own."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.net = network
        self.scale = nn.Conv3d(1, 1, 1)


@pytest.mark.parametrize("inner", [lambda classes: unet(0, classes=classes), lambda classes: OwnNetwork(1, classes)])
def test_weights_of_a_network_fill_it_within_a_class_of_the_users_own(
    tmp_path: Path, inner: Callable[[int], nn.Module]
) -> None:
    source, target = inner(3), Around(inner(3))
    first = next(iter(source.state_dict()))
    for parameter in target.parameters():
        nn.init.normal_(parameter)
    for prefix in ("", "module.", "net.", "module.net."):
        read = put(tmp_path / "c.pth", {"state_dict": prefixed(prefix, source.state_dict())})
        weights, report = transfer(
            read,
            target,
            FinetuningSettings(min_coverage=0.9),
            ("CT",),
            lambda _, classes: Around(inner(3 + classes)),
        )
        assert torch.equal(weights[f"net.{first}"], source.state_dict()[first])
        fresh = {entry.name for entry in report.entries if entry.status == "fresh"}
        assert {name for name in fresh if "seg_layers" not in name and ".out." not in name} == {
            "scale.weight",
            "scale.bias",
        }


def test_a_class_around_a_network_may_name_its_encoder(tmp_path: Path) -> None:
    source, target = unet(0), Around(unet(1))
    target.key_to_encoder = "net.encoder"  # type: ignore[assignment]
    read = put(tmp_path / "c.pth", {"state_dict": source.state_dict()})
    weights, report = transfer(
        read,
        target,
        FinetuningSettings(encoder_only=True),
        ("CT",),
        lambda channels, classes: Around(unet(1, channels=1 + channels, classes=3 + classes)),
    )
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(weights[f"net.encoder.{name}"], value)
    fresh = {entry.name.split(".")[1] for entry in report.entries if entry.status == "fresh"}
    assert fresh == {"decoder", "weight", "bias"}
