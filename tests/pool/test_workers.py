"""Worker processes that are killed neither stop nor block the work of the others."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nnunetv2_misfm.pool.workers import Killed, run_jobs


def square_or_die(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def fail(number: int) -> int:
    raise ValueError(f"job {number}")


def test_one_process_runs_the_jobs_in_this_process() -> None:
    assert list(run_jobs(lambda number: (number, os.getpid()), [1, 2], 1)) == [(1, os.getpid()), (2, os.getpid())]


def test_a_job_that_kills_its_process_is_named_and_all_others_are_done() -> None:
    outcomes = list(run_jobs(square_or_die, [1, 2, -1, 3, 4, 5, -2, 6], 2))
    assert {outcome.job for outcome in outcomes if isinstance(outcome, Killed)} == {-1, -2}
    assert sorted(outcome for outcome in outcomes if isinstance(outcome, int)) == [1, 4, 9, 16, 25, 36]


def test_a_job_whose_process_was_killed_once_is_done_the_second_time(tmp_path: Path) -> None:
    jobs = [tmp_path / str(number) for number in range(3)]
    jobs[0].touch()
    jobs[2].touch()
    assert sorted(str(outcome) for outcome in run_jobs(die_once, jobs, 2)) == ["0", "1", "2"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_in_a_job_is_raised(num_processes: int) -> None:
    with pytest.raises(ValueError, match="job"):
        list(run_jobs(fail, [1, 2, 3], num_processes))
