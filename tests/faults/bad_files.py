"""Files of many kinds that cannot be used, each made in one place: images, checkpoints, plans, dataset.json."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import SimpleITK as sitk
import torch

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, write_checkpoint
from nnunetv2_misfm.plans.network_entry import NETWORKS

Maker = Callable[[Path], object]


def _cut(path: Path) -> None:
    phantoms.cut_short(phantoms.write(path, phantoms.mr()), path)


def _header(offset: int, value: bytes) -> Maker:
    """A NIfTI file whose header holds `value` at `offset`."""

    def make(path: Path) -> None:
        content = bytearray(phantoms.write(path, phantoms.mr()).read_bytes())
        content[offset : offset + len(value)] = value
        path.write_bytes(content)

    return make


def _voxels(array: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 1)) -> Maker:
    return lambda path: phantoms.write(path, array, spacing)


def _image(array: np.ndarray, is_vector: bool) -> Maker:
    return lambda path: phantoms.write_image(path, sitk.GetImageFromArray(array, isVector=is_vector))


_MR = phantoms.mr()

# By what is wrong with it: the name of the file and what makes it.
VOLUMES: dict[str, tuple[str, Maker]] = {
    "empty file": ("x.nii.gz", lambda path: path.write_bytes(b"")),
    "text": ("x.nii.gz", lambda path: path.write_text("not an image", encoding="utf-8")),
    "text as MHA": ("x.mha", lambda path: path.write_text("not an image", encoding="utf-8")),
    "text as DICOM": ("x.dcm", lambda path: path.write_text("not an image", encoding="utf-8")),
    "zeros as DICOM": ("x.dcm", lambda path: path.write_bytes(bytes(128) + b"DICM" + bytes(500))),
    "link to nothing": ("x.nrrd", lambda path: path.symlink_to("nowhere.nrrd")),
    "link to itself": ("x.nrrd", lambda path: path.symlink_to(path.name)),
    "unknown format": ("x.mgz", lambda path: path.write_bytes(b"MGH" * 100)),
    "cut short": ("x.nii.gz", _cut),
    "cut short uncompressed": ("x.nii", _cut),
    "without its voxel file": ("x.mhd", lambda path: phantoms.write(path, _MR).with_suffix(".raw").unlink()),
    "2D": ("x.nii.gz", _image(np.ones((9, 10), np.int16), False)),
    "one slice": ("x.nii.gz", _voxels(_MR[:1])),
    "4D": ("x.nii.gz", _image(np.ones((3, 8, 9, 10), np.int16), False)),
    "RGB": ("x.nii.gz", _image(np.zeros((8, 9, 10, 3), np.uint8), True)),
    "complex numbers": ("x.nii.gz", _voxels(_MR.astype(np.complex64))),
    "NaN": ("x.nii.gz", _voxels(np.where(_MR > 400, np.nan, 1))),
    "infinite": ("x.nrrd", _voxels(np.where(_MR > 400, np.inf, 1))),
    "constant": ("x.nii.gz", _voxels(np.full((20, 24, 28), 5.0))),
    "labels": ("x.nii.gz", _voxels(phantoms.labels())),
    "labels as int64": ("x.nrrd", _voxels(phantoms.labels().astype(np.int64))),
    "too small": ("x.nii.gz", _voxels(phantoms.mr(3, (5, 24, 28)))),
    "spacing of metres": ("x.nrrd", _voxels(_MR, (1, 1, 5000))),
    "spacing 0": ("x.nii", _header(80, np.float32(0).tobytes())),  # pixdim[1]
    "spacing NaN": ("x.nii", _header(80, np.float32(np.nan).tobytes())),
    "negative size": ("x.nii", _header(42, np.int16(-28).tobytes())),  # dim[1]
    "huge size": ("x.nii", _header(42, np.int16(32767).tobytes())),
    # sform_code 1 and qform_code 0, and an affine matrix of zeros: the axes have no direction at all.
    "no directions": ("x.nii", _header(252, struct.pack("<hh", 0, 1) + bytes(24 + 48))),
}

# What is changed in a complete plans file, by the name of the plans that result.
PLANS: dict[str, Mapping[str, Any]] = {
    "NoArchitecture": {"architecture": None},
    "NoStrides": {"architecture": {"network_class_name": "x", "arch_kwargs": {}}},
    "NoPatch": {"patch_size": None},
    "NoSpacing": {"spacing": None},
    "NoNormalization": {"normalization_schemes": []},
    "NoWindow": {"normalization_schemes": ["CTNormalization", "CTNormalization"]},
    "NoMedian": {"median_image_size_in_voxels": None},
    "FlatStrides": {"architecture": {"network_class_name": "x", "arch_kwargs": {"strides": [1, 2, 2, 2, 2]}}},
    "TwoSpacings": {"spacing": [1, 1]},
    "ItsOwnParent": {"inherits_from": "3d_fullres"},
    "Orphan": {"inherits_from": "nowhere"},
}


def make_volumes(folder: Path) -> None:
    """Each kind of bad volume in a folder of its own."""
    for kind, (name, make) in VOLUMES.items():
        (folder / kind).mkdir(parents=True)
        make(folder / kind / name)


def make_plans(preprocessed: Path) -> None:
    """Bad plans beside nnU-Net's own, and datasets 5 to 7 with a bad dataset.json."""
    text = (preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8")
    for name, change in PLANS.items():
        changed = json.loads(text)
        changed["configurations"]["3d_fullres"].update(change)
        (preprocessed / f"{name}.json").write_text(json.dumps(changed), encoding="utf-8")
    without_name = {key: value for key, value in json.loads(text).items() if key != "plans_name"}
    (preprocessed / "NoName.json").write_text(json.dumps(without_name), encoding="utf-8")
    (preprocessed / "Cut.json").write_text(text[: len(text) // 2], encoding="utf-8")
    (preprocessed / "Bytes.json").write_bytes(b"\xff\xfe")
    (preprocessed / "AList.json").write_text("[]", encoding="utf-8")
    (preprocessed / "Foreign.json").write_text(text, encoding="utf-8")
    dataset = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
    for name, change in (
        ("Dataset005_NoChannels", {"channel_names": {}}),
        ("Dataset006_NoLabels", {"labels": None}),
        ("Dataset007_NoCount", {"numTraining": None}),
    ):
        folder = preprocessed.parent / name
        folder.mkdir()
        (folder / "nnUNetPlans.json").write_text(text, encoding="utf-8")
        (folder / "dataset.json").write_text(json.dumps({**dataset, **change}), encoding="utf-8")


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def make_checkpoints(folder: Path) -> None:
    """A good checkpoint of a PCT-Net, and what can be wrong with one."""
    folder.mkdir()
    arguments = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 16, 32]}
    weights = PCTNet(1, 5, **arguments).state_dict()
    preprocessing = {"normalization_schemes": ["ZScoreNormalization"], "patch_size": [24, 32, 24]}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, preprocessing, {})

    def write(name: str, weights: Mapping[str, Any]) -> None:
        write_checkpoint({"network_weights": weights}, info, folder / name)

    write("good.pth", weights)
    write("renamed_keys.pth", {f"my_{name}": value for name, value in weights.items()})
    write("other_network.pth", FMUNet(1, 5, **arguments).state_dict())
    write("half_of_it.pth", {name: value for name, value in weights.items() if name.startswith("encoder.stems")})
    good = (folder / "good.pth").read_bytes()
    (folder / "cut.pth").write_bytes(good[: len(good) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("not a checkpoint", encoding="utf-8")
    (folder / "text.safetensors").write_text("not a checkpoint", encoding="utf-8")
    (folder / "a_folder.pth").mkdir()
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 3, "loss": 0.5}, folder / "other_keys.pth")
    torch.save({"network_weights": {"a": 1}}, folder / "no_tensors.pth")
    torch.save({"network_weights": {"a": torch.zeros(1)}}, folder / "unknown_network.pth")
    torch.save({"network_weights": weights, "more": _Payload()}, folder / "payload.pth")
    content = torch.load(folder / "good.pth", weights_only=True)
    content["misfm"]["format_version"] = 99
    torch.save(content, folder / "newer.pth")
