"""The checkpoint file: plain data, complete or absent, and clear errors for everything else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_misfm.checkpoints.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    checkpoint_info,
    network_weights,
    read_checkpoint,
    write_checkpoint,
)

INFO = CheckpointInfo("volume_fusion", "some.Network", {"strides": [[1, 1, 1]]}, 1, 5, {"spacing": [1.0]}, {}, {})


def content() -> dict:
    return {
        "network_weights": {"a.weight": torch.arange(4.0)},
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.25)]]},
        "_best_ema": np.float64(0.75),
        "init_args": {"device": torch.device("cpu"), "fold": 0},
    }


def test_a_written_checkpoint_is_read_back_as_plain_data(tmp_path: Path) -> None:
    write_checkpoint(content(), INFO, tmp_path / "c.pth")
    read = torch.load(tmp_path / "c.pth", weights_only=True)
    assert read["logging"] == {"mean_fg_dice": [0.5], "dice_per_class_or_region": [[0.25]]}
    assert type(read["_best_ema"]) is float
    assert read["init_args"]["device"] == "cpu"
    assert checkpoint_info(read, "c.pth") == INFO
    assert torch.equal(network_weights(read, "c.pth")["a.weight"], torch.arange(4.0))


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    write_checkpoint(content(), INFO, path)
    before = path.read_bytes()

    class Unwritable(torch.Tensor):
        def detach(self) -> torch.Tensor:
            raise OSError(28, "No space left on device")

    broken = content() | {"network_weights": {"a": torch.zeros(2).as_subclass(Unwritable)}}
    with pytest.raises(OSError):
        write_checkpoint(broken, INFO, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth"]


def test_stock_nnunet_checkpoints_with_numpy_numbers_are_read(tmp_path: Path) -> None:
    torch.save(content() | {"init_args": {"fold": 0}}, tmp_path / "stock.pth")
    read = read_checkpoint(tmp_path / "stock.pth")
    assert read["_best_ema"] == 0.75
    assert checkpoint_info(read, "stock.pth") is None


def test_a_pickled_payload_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(witness),)

    torch.save({"network_weights": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"more than plain data.*it asks for \w+\.mkdir\)") as refused:
        read_checkpoint(tmp_path / "evil.pth")
    assert "weights_only" not in str(refused.value), "no advice to load it all the same"
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "legacy.pth")
    assert not witness.exists()


@pytest.mark.parametrize("size", [0, 1, 100, 2000])
def test_truncated_files_are_named(tmp_path: Path, size: int) -> None:
    write_checkpoint(content() | {"more": torch.zeros(1000)}, INFO, tmp_path / "c.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cut.pth"):
        read_checkpoint(tmp_path / "cut.pth")


def test_missing_files_folders_and_other_content_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "no.pth")
    with pytest.raises(CheckpointError, match="not a file"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="has no 'network_weights'"):
        network_weights({"weights": 1}, "x.pth")


def test_a_newer_format_asks_for_an_update() -> None:
    with pytest.raises(CheckpointError, match="format 99.*Update"):
        checkpoint_info({"misfm": {"format_version": 99}}, "x.pth")


def test_prefixes_of_wrappers_are_dropped() -> None:
    weights = network_weights({"network_weights": {"module._orig_mod.a": torch.zeros(1)}}, "x.pth")
    assert list(weights) == ["a"]


def test_a_tensor_of_two_names_is_stored_once_from_a_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.rand(1000)
    once = {**content(), "network_weights": {"a": weight}}
    twice = {**content(), "network_weights": {"a": weight, "b": weight, "half": weight[:500]}}
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # what it does for a tensor on a GPU
    write_checkpoint(once, INFO, tmp_path / "once.pth")
    write_checkpoint(twice, INFO, tmp_path / "twice.pth")
    assert (tmp_path / "twice.pth").stat().st_size < (tmp_path / "once.pth").stat().st_size + 3000
    read = read_checkpoint(tmp_path / "twice.pth")["network_weights"]
    assert torch.equal(read["b"], weight) and torch.equal(read["half"], weight[:500])
