"""Checkpoints of nnU-Net v1: the same network under v2's names, and what its files beside them tell."""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from foreign_files import as_generic_unet, unet, version_1_plans
from torch import nn

from nnunetv2_misfm.architectures.generic_unet import GenericUNet
from nnunetv2_misfm.checkpoints.nnunet_v1 import init_args_beside
from nnunetv2_misfm.checkpoints.source import Source, read_source

CONTENT = {"state_dict": as_generic_unet(unet()), "plot_stuff": ([1.0], [1.0], [], [np.float64(0.5), 0.25])}


def by_formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that depend on a parameter's name only."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * numbers * numbers + crc32(name.encode()) % 1000).reshape(shape).float() * 0.3


def test_outputs_are_those_of_version_1_where_flat_kernels_end(tmp_path: Path) -> None:
    arguments = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    arguments |= {"nonlin": nn.LeakyReLU, "conv_bias": True, "deep_supervision": True}
    kernels, strides = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    network = GenericUNet(1, 4, [4, 8, 16, 32], nn.Conv3d, kernels, strides, 2, 2, 2, **arguments)
    weights = {name: by_formula(name, tuple(value.shape)) for name, value in as_generic_unet(network).items()}
    torch.save({"state_dict": weights}, tmp_path / "c.model")
    source = read_source(tmp_path / "c.model")
    assert source.info is not None and source.info.network_class_name.endswith("generic_unet.GenericUNet")
    assert source.info.arch_kwargs["kernel_sizes"] == kernels and source.info.arch_kwargs["strides"] == strides
    assert locate(source.info.network_class_name) is GenericUNet
    network.load_state_dict(source.weights, strict=False)
    with torch.no_grad():
        outputs = network.eval()(by_formula("image", (1, 1, 8, 16, 16)))
    # What Generic_UNet of nnunet 1.7.1 gives with these weights: mean and standard deviation, finest output first.
    told = [(-0.0583184, 0.0520942), (0.0049803, 0.1674057), (0.1017378, 0.1418234)]
    found = [(float(output.double().mean()), float(output.double().std())) for output in outputs]
    assert found == [pytest.approx(expected, abs=1e-5) for expected in told]


def beside(folder: Path, content: object, name: str = "model_final_checkpoint.model.pkl", protocol: int = 4) -> Source:
    """A checkpoint of v1 in a fold's folder with a pickle beside it, read."""
    fold = folder / "nnUNetTrainerV2__nnUNetPlansv2.1" / "fold_0"
    fold.mkdir(parents=True, exist_ok=True)
    torch.save(CONTENT, fold / "model_final_checkpoint.model")
    (fold / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return read_source(fold / "model_final_checkpoint.model")


def with_stage(stage: int | None) -> dict[str, Any]:
    trainer = ("plans.pkl", 0, "results", "preprocessed", True, stage, True, False, True)
    return {"init": trainer, "name": "nnUNetTrainerV2", "class": "x", "plans": version_1_plans()}


def check_told(source: Source, spacing: float) -> None:
    assert source.notes == () and source.info is not None and source.info.task == "segmentation"
    told = source.info.preprocessing
    assert told["spacing"] == [spacing] * 3 and told["patch_size"] == [128] * 3
    assert told["normalization_schemes"] == ["CTNormalization"] and told["dataset_name"] == "Task251_Organs"
    window = told["foreground_intensity_properties_per_channel"]["0"]
    assert window["mean"] == 87.3 and window["std"] == 359.0 and window["percentile_00_5"] == -941.0
    assert source.channels == ("CT",) and source.num_images == 1
    assert source.learnt == "score (nnU-Net's pseudo Dice) 0.250 in the last of 2 epochs, 0.500 at best"


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_the_pickle_beside_a_checkpoint_tells_spacing_and_intensities(tmp_path: Path, protocol: int) -> None:
    check_told(beside(tmp_path, with_stage(1), protocol=protocol), 1.5)
    check_told(beside(tmp_path, with_stage(0)), 3.0)
    check_told(beside(tmp_path, with_stage(None)), 1.5)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_pickles_of_both_versions_of_numpy_are_read(tmp_path: Path, core: bytes) -> None:
    pickled = pickle.dumps(with_stage(1), 2)  # the protocol in which the length of a name stands nowhere
    renamed = pickled.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core)
    assert core + b".multiarray\nscalar" in renamed
    check_told(beside(tmp_path, renamed), 1.5)


def test_the_plans_of_all_folds_are_read_where_nothing_lies_beside_the_checkpoint(tmp_path: Path) -> None:
    check_told(beside(tmp_path, version_1_plans(list), "../plans.pkl"), 1.5)


def test_of_an_archive_the_full_resolution_is_read_and_named(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "Task251_Organs.zip", "w") as archive:
        for configuration, stage in (("2d", 0), ("3d_cascade_fullres", 1), ("3d_fullres", 1), ("3d_lowres", 0)):
            folder = f"nnUNet/{configuration}/Task251_Organs/nnUNetTrainerV2__nnUNetPlansv2.1"
            for fold in (1, 0):
                name = f"{folder}/fold_{fold}/model_final_checkpoint.model"
                archive.write(tmp_path / "model", name)
                archive.writestr(f"{name}.pkl", pickle.dumps(with_stage(stage)))
    source = read_source(tmp_path / "Task251_Organs.zip")
    assert source.info is not None and source.info.preprocessing["spacing"] == [1.5] * 3
    assert "holds 8 checkpoints" in source.notes[0]
    assert "nnUNet/3d_fullres/Task251_Organs/nnUNetTrainerV2__nnUNetPlansv2.1/fold_0/" in source.notes[0]


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["alone", "inside"])
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr], ids=lambda function: function.__name__)
def test_a_pickle_that_calls_anything_is_refused_by_name(
    tmp_path: Path, function: Callable[..., Any], where: str
) -> None:
    witness = tmp_path / "ran"
    arguments = {os.mkdir: (str(witness),), eval: (f"__import__('os').mkdir({str(witness)!r})",), getattr: ([], "pop")}
    payload: object = _Calls(function, *arguments[function])
    source = beside(tmp_path, payload if where == "alone" else with_stage(1) | {"name": payload})
    assert f"asks for {function.__module__}.{function.__name__})" in source.notes[0]
    assert "model_final_checkpoint.model.pkl was not read" in source.notes[0]
    assert not witness.exists() and source.info is not None and source.info.preprocessing == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"not a pickle",
        {},
        [],
        {"plans": 3},
        {"plans": {"plans_per_stage": {}}},
        {"plans_per_stage": []},
    ],
)
def test_a_damaged_or_strange_pickle_is_said_and_the_weights_are_used(tmp_path: Path, content: object) -> None:
    source = beside(tmp_path, content)
    assert "model.pkl was not read (" in source.notes[0]
    assert source.info is not None and source.info.preprocessing == {} and source.network_name == "PlainConvUNet"


def test_damaged_bytes_are_read_or_said(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for protocol in (2, 4):
        pickled = pickle.dumps(with_stage(1), protocol)
        for _ in range(150):
            damaged = bytearray(pickled[: generator.integers(1, len(pickled) + 1)])
            damaged[generator.integers(len(damaged))] = generator.integers(256)
            (tmp_path / "c.model.pkl").write_bytes(damaged)
            told, why = init_args_beside(tmp_path / "c.model")
            assert (told is None) == bool(why)


def test_a_checkpoint_without_its_pickle_says_which_file_is_wanted(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "c.model")
    assert read_source(tmp_path / "c.model").notes[0].startswith("c.model.pkl, where nnU-Net v1 keeps spacing")


def test_pickles_beside_files_of_other_projects_are_left_alone(tmp_path: Path) -> None:
    torch.save({"state_dict": unet().state_dict()}, tmp_path / "c.model")
    (tmp_path / "c.model.pkl").write_bytes(b"not a pickle")
    assert read_source(tmp_path / "c.model").notes == ()
