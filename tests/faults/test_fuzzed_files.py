"""Damaged and hostile files: whatever is in them, reading ends in one clear error, runs no code and takes no memory.

The default run mutates a few hundred files; `-m faults` mutates MISFM_FUZZ_INPUTS (default 10,000).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import DEGREES_OF_ANISOTROPY, strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, write_checkpoint
from nnunetv2_misfm.checkpoints.published_weights import import_published
from nnunetv2_misfm.checkpoints.safetensors_file import write_safetensors
from nnunetv2_misfm.checkpoints.source import load_network, read_source
from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.plans.files import read_plans
from nnunetv2_misfm.plans.network_entry import architecture_entry
from nnunetv2_misfm.plans.run_settings import FinetuningSettings, run_settings

FEW = 80
MANY = int(os.environ.get("MISFM_FUZZ_INPUTS", "10000"))
MOST_SECONDS = 10.0
MOST_BYTES = 2 * 2**30


def checkpoint_bytes(folder: Path, kind: str) -> bytes:
    """A small valid file of each kind."""
    arguments = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 16, 32], "window_size": 2}
    weights = PCTNet(1, 2, **arguments).state_dict()  # type: ignore[arg-type]
    preprocessing = {"normalization_schemes": ["ZScoreNormalization"], "patch_size": [16, 16, 16]}
    info = CheckpointInfo("volume_fusion", architecture_entry("pctnet", 0)["network_class_name"], arguments, 1, 2,
                          preprocessing, {})  # fmt: skip
    path = folder / f"valid.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        write_safetensors(weights, info, path, ["stem", "encoder", "decoder"], [])
    elif kind == "published":
        torch.save({"model_state_dict": {"embeddings.0.proj.weight": torch.zeros(4, 1, 3, 3, 3)}}, path)
    else:
        write_checkpoint({"network_weights": weights}, info, path)
    return path.read_bytes()


def mutated(content: bytes, generator: random.Random) -> bytes:
    """Bits flipped, bytes cut out, put in, or exchanged, or the end missing."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5, 20))):
        kind, place = generator.randrange(5), generator.randrange(len(data))
        if kind == 0:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[place : place + generator.randrange(1, 64)]
        elif kind == 2:
            data[place:place] = generator.randbytes(generator.randrange(1, 32))
        elif kind == 3:
            data[place : place + 8] = generator.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7))
        else:
            del data[place:]
        if not data:
            return b""
    return bytes(data)


def repacked(content: bytes, generator: random.Random) -> bytes:
    """A checkpoint whose pickle is mutated inside a zip file that is intact, so that reading gets that far."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = next(name for name in members if name.endswith("data.pkl"))
    members[target] = mutated(members[target], generator)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return written.getvalue()


def must_be_one_error(read: Callable[[], Any]) -> bool:
    """Call; anything but a value or a UserError, or a long time, fails the test. Whether it was refused."""
    started = time.monotonic()
    try:
        read()
        refused = False
    except UserError as error:
        assert str(error).strip()
        refused = True
    assert time.monotonic() - started < MOST_SECONDS
    return refused


def fuzz_checkpoints(folder: Path, kind: str, count: int) -> int:
    valid = checkpoint_bytes(folder, kind)
    generator = random.Random(kind)
    path = folder / f"mutated.{'safetensors' if kind == 'safetensors' else 'pth'}"
    target, refused = folder / "imported.pth", 0
    for number in range(count):
        inside = kind != "safetensors" and number % 2 == 0
        path.write_bytes(repacked(valid, generator) if inside else mutated(valid, generator))
        if kind == "published":
            refused += must_be_one_error(lambda: import_published(path, target, DEGREES_OF_ANISOTROPY))
            target.unlink(missing_ok=True)
        else:
            refused += must_be_one_error(lambda: read_source(path) and load_network(path))
    return refused


@pytest.mark.parametrize("kind", ["ours", "published", "safetensors"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    assert fuzz_checkpoints(tmp_path, kind, FEW) > FEW // 3


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["ours", "published", "safetensors"])
def test_many_damaged_checkpoints(tmp_path: Path, kind: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (resource_in_use() + MOST_BYTES, resource.RLIM_INFINITY))
    try:
        refused = fuzz_checkpoints(tmp_path, kind, MANY // 4)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refused > MANY // 4 // 3
    print(f"{kind}: {MANY // 4} mutated files, {refused} refused with one error, the others read")


def resource_in_use() -> int:
    """Bytes of address space this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")


VALUES = [None, True, -1, 0, 1e308, float("nan"), "", "x" * 1000, [], {}, [1, 2], [[]], {"a": {}}, 10**30]


def mutated_json(value: Any, generator: random.Random) -> Any:
    """One value somewhere inside replaced, removed or added."""
    if not isinstance(value, (dict, list)) or not value or generator.random() < 0.2:
        return generator.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = generator.choice(keys)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if generator.random() < 0.15:
        del copy[key]
    else:
        copy[key] = mutated_json(copy[key], generator)
    return copy


def fuzz_plans(folder: Path, count: int) -> int:
    valid = {
        "dataset_name": "Dataset001_X",
        "plans_name": "P",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 2.0}},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "P_3d_fullres",
                "patch_size": [32, 32, 32],
                "batch_size": 2,
                "spacing": [1.0, 1.0, 1.0],
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "architecture": architecture_entry("pctnet", 0),
            }
        },
        "misfm": {"task": "segmentation", "num_epochs": 10, "schedule": "sawtooth"},
    }
    generator = random.Random("plans")
    refused = 0
    for _ in range(count):
        content = mutated_json(valid, generator)
        text = json.dumps(content)
        if generator.random() < 0.1:
            text = text[: generator.randrange(len(text) + 1)]
        (folder / "P.json").write_text(text, encoding="utf-8")

        def read() -> None:
            run_settings(read_plans(folder, "P", ["3d_fullres"]), FinetuningSettings)

        refused += must_be_one_error(read)
    return refused


def test_damaged_plans_are_one_clear_error(tmp_path: Path) -> None:
    assert fuzz_plans(tmp_path, 4 * FEW) > FEW


@pytest.mark.faults
def test_many_damaged_plans(tmp_path: Path) -> None:
    refused = fuzz_plans(tmp_path, MANY // 4)
    print(f"plans: {MANY // 4} mutated files, {refused} refused with one error, the others read")
    assert refused > MANY // 4 // 4


class Payload:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (Payload.marker,)

    marker = ""


@pytest.mark.parametrize("where", ["network_weights", "misfm", "optimizer_state", "model_state_dict"])
def test_no_code_is_run_from_any_part_of_a_file(tmp_path: Path, where: str) -> None:
    Payload.marker = str(tmp_path / "code_was_run")
    for path, save in (
        (tmp_path / "a.pth", lambda p: torch.save({where: Payload()}, p)),
        (tmp_path / "b.pt", lambda p: p.write_bytes(pickle.dumps({where: Payload()}))),
    ):
        save(path)
        with pytest.raises(UserError, match=r"more than plain data|not a readable checkpoint"):
            read_source(path)
    assert not Path(Payload.marker).exists()
