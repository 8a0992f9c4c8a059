"""Settings: read from JSON, all problems in one error, written back unchanged."""

from __future__ import annotations

import pytest

from nnunetv2_misfm.plans.run_settings import FinetuningSettings, PretrainingSettings, run_settings
from nnunetv2_misfm.plans.settings import SettingsError, read_settings, write_settings


def test_all_problems_are_reported_together() -> None:
    given = {"num_epoch": 3, "initial_lr": "fast", "num_iterations_per_epoch": 0, "optimizer": "adagrad"}
    with pytest.raises(SettingsError) as error:
        read_settings(FinetuningSettings, given, "The plans")
    message = str(error.value)
    assert "did you mean 'num_epochs'" in message
    for name in ("initial_lr = 'fast'", "num_iterations_per_epoch = 0", "optimizer = 'adagrad'"):
        assert name in message


def test_written_settings_are_read_back_equal() -> None:
    settings = PretrainingSettings(num_epochs=7, initial_lr=0.01)
    assert read_settings(PretrainingSettings, write_settings(settings), "x") == settings


def test_a_block_made_for_the_other_kind_of_run_is_not_used() -> None:
    plans = {"plans_name": "p", "misfm": {"task": "volume_fusion", "num_epochs": 5}}
    assert run_settings(plans, FinetuningSettings) == FinetuningSettings()
    assert run_settings(plans, PretrainingSettings).num_epochs == 5


def test_nested_groups_are_left_to_their_own_readers() -> None:
    plans = {"plans_name": "p", "misfm": {"task": "volume_fusion", "fusion": {"geometry": "boxes"}, "pool": {}}}
    assert run_settings(plans, PretrainingSettings) == PretrainingSettings()
