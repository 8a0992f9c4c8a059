"""The sizes of a pretraining run: BatchNorm needs enough values of a channel in the deepest feature map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantoms import ct, write

from nnunetv2_misfm.commands.pretrain import main
from nnunetv2_misfm.pretrain.planning import RunRequest, enough_samples, new_pool_entry, run_plans
from nnunetv2_misfm.pretrain.tasks import PretextSettings
from nnunetv2_misfm.start_up import add_plugin_folder

ISOTROPIC = (1.0, 1.0, 1.0)
LARGE = (500, 500, 500)


def request(**choices: Any) -> RunRequest:
    choices = {"network": None} | choices
    return RunRequest(pretext=PretextSettings.read({"task": "volume_fusion"}, "The test"), **choices)


def batch_size(**choices: Any) -> int:
    return new_pool_entry(ISOTROPIC, LARGE, request(**choices))[2]


def test_small_patches_come_in_larger_batches() -> None:
    assert batch_size() == batch_size(patch_size=(64, 128, 128)) == 4
    assert batch_size(patch_size=(32, 32, 32)) == 8  # 8 voxels each in the deepest map, 64 together
    assert batch_size(patch_size=(40, 16, 16)) == 22  # 3 voxels each
    assert batch_size(patch_size=(32, 32, 32), batch_size=2) == 2


def test_instance_norm_needs_no_larger_batch() -> None:
    assert batch_size(patch_size=(32, 32, 32), network="fmunet") == 4
    assert batch_size(patch_size=(32, 32, 32), network="plan") == 4


@pytest.mark.parametrize("slices", [33, 36, 41, 44, 60])
def test_the_patch_is_one_that_the_network_of_nnunets_plans_divides(slices: int) -> None:
    """Which halves thick slices once more than PCT-Net does."""
    entry, patch, _ = new_pool_entry((5.0, 1.0, 1.0), (slices, 300, 300), request(network="plan"))
    strides = np.prod(entry["arch_kwargs"]["strides"], axis=0)
    assert not np.any(np.array(patch) % strides) and slices <= patch[0] < slices + strides[0]


def test_batch_size_of_another_plan_grows_for_small_patches_and_that_of_a_run_stays() -> None:
    architecture, patch, _ = new_pool_entry(ISOTROPIC, LARGE, request(patch_size=(32, 32, 32)))
    entry = {
        "architecture": architecture,
        "patch_size": list(patch),
        "batch_size": 2,
        "spacing": list(ISOTROPIC),
        "data_identifier": "data",
        "normalization_schemes": ["ZScoreNormalization"],
    }
    plans = {"plans_name": "Some", "dataset_name": "Dataset001_Some", "configurations": {"3d_fullres": entry}}

    def planned(base: dict[str, Any], **choices: Any) -> dict[str, Any]:
        return run_plans(base, "3d_fullres", "Run", "Dataset001_Some", request(**choices))

    def size(made: dict[str, Any]) -> int:
        return int(made["configurations"]["3d_fullres"]["batch_size"])

    assert size(planned(plans)) == 8
    of_fine_tuning = {**plans, "pretrain_info": {"checkpoint_path": "w.pth"}}
    assert "pretrain_info" not in planned(of_fine_tuning)  # whose weights are not loaded
    assert size(planned(plans, patch_size=(64, 64, 64))) == 2
    small = planned(plans, batch_size=3)
    assert size(small) == 3 and size(planned(small)) == 3  # continued with what it was begun with
    assert enough_samples(architecture, patch) == 8
    without_norm = {**architecture, "network_class_name": "a.PlainConvUNet"}
    without_norm["arch_kwargs"] = {**architecture["arch_kwargs"], "norm_op": None}
    assert enough_samples(without_norm, patch) == 1


def test_a_batch_that_is_too_small_is_named(nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "scans" / "a.nii.gz", ct())
    add_plugin_folder()
    options = ["-device", "cpu", "-np", "1", "-features_per_stage", "4", "8", "16", "32", "64", "-num_epochs", "1"]
    options += ["-num_iterations_per_epoch", "1", "-num_val_iterations_per_epoch", "1", "-modality", "ct"]
    main(
        ["-i", str(tmp_path / "scans"), "-d", "900", "-n", "Pool", "-patch_size", *3 * ["16"], "-batch_size", "4"]
        + options
    )
    assert "more with -batch_size 64" in capsys.readouterr().out
