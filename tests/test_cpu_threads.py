import os

import pytest

from nnunetv2_misfm.cpu_threads import training_threads


@pytest.mark.parametrize("value", ["", "0", "4,2", "many"])
def test_all_allowed_cores_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert training_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    assert training_threads() == 1


def test_the_users_choice_counts_for_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert training_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training_threads() == 2  # torchrun sets the variable to 1 for each of several processes
