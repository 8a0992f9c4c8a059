"""Worker processes that are killed neither stop nor block the work of the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

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


KILLED = """
import os, signal, sys
sys.path[:] = {paths!r}
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
from test_workers import note_and_wait
from nnunetv2_misfm.pool.workers import run_jobs
if __name__ == "__main__":
    list(run_jobs(note_and_wait, [{folder!r}] * 4, 2))
"""


def note_and_wait(folder: str) -> None:
    Path(folder, f"{os.getpid()}_{time.time_ns()}").touch()
    time.sleep(60)


def sleep_and_note(job: tuple[float, Path | None]) -> None:
    seconds, ended = job
    time.sleep(seconds)
    if ended is not None:
        ended.touch()


def test_when_nobody_wants_the_results_any_more_workers_end_and_other_processes_do_not(tmp_path: Path) -> None:
    before = {child.pid for child in multiprocessing.active_children()}  # of other tests
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mine = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    mine.start()
    ended = tmp_path / "ended"
    results = run_jobs(sleep_and_note, [(0.0, None), (60.0, ended)], 2)
    next(results)
    results.close()
    assert not ended.exists(), "the job of a minute was ended, not waited for"
    assert {child.pid for child in multiprocessing.active_children()} - before == {mine.pid}
    assert mine.is_alive() and other.poll() is None
    mine.terminate()
    other.terminate()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signal masks")
def test_an_interrupt_while_workers_start_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, before = ProcessPoolExecutor.submit, signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return submit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ProcessPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(run_jobs(square_or_die, [1, 2], 2))
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("at_work", [0, 2])
def test_ctrl_c_ends_all_processes_without_a_word(tmp_path: Path, at_work: int) -> None:
    """Also while workers are still importing."""
    program, folder = tmp_path / "program.py", tmp_path / "jobs"
    folder.mkdir()
    program.write_text(KILLED.format(paths=[str(Path(__file__).parent), *sys.path], folder=str(folder)))
    command = [sys.executable, str(program)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(folder.iterdir())) < at_work or len(_children(run.pid)) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=30)[1].count("Traceback") == 1  # of the program itself
    assert len(list(folder.iterdir())) <= 2


def _children(pid: int) -> list[str]:
    """Of which the first is the one that keeps track of shared memory."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()[1:]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    program, folder = tmp_path / "program.py", tmp_path / "jobs"
    folder.mkdir()
    program.write_text(KILLED.format(paths=[str(Path(__file__).parent), *sys.path], folder=str(folder)))
    run = subprocess.Popen([sys.executable, str(program)])
    while len(list(folder.iterdir())) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    run.kill()
    run.wait()
    workers = {int(path.name.partition("_")[0]) for path in folder.iterdir()}
    ends = time.monotonic() + 30
    while any(_is_alive(worker) for worker in workers):
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert len(list(folder.iterdir())) == 2


def _is_alive(process: int) -> bool:
    """A process that has ended and was not waited for counts as ended."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")
