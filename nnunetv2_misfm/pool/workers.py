"""Running jobs in worker processes that may be killed, for instance by the system for want of memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Generic, TypeVar

from nnunetv2_misfm.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
JOBS_AHEAD = 2
"""Jobs handed out per process: enough to keep it busy, few enough to find the one that kills it."""
STARTS = 3
"""How often workers may fail to start before that is taken for their nature rather than for bad luck."""


@dataclass(frozen=True)
class Killed(Generic[Job]):
    """The process that ran this job ended without an answer, twice."""

    job: Job


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_processes: int
) -> Generator[Result | Killed[Job], None, None]:
    """Results of `function(job)` as they come, in no fixed order.

    With one process everything runs in this one. Otherwise, when a worker is killed, the jobs under way are tried
    again one at a time, so that one of them is found out as the cause and the others are done.

    Raises:
        UserError: if workers cannot even start.
        Exception: whatever `function` raises.
    """
    if num_processes == 1:
        yield from map(function, jobs)
        return
    waiting, suspects = deque(jobs), deque[Job]()
    while waiting or suspects:
        if suspects:
            yield from _run_until_killed(function, suspects, 1, 1, deque())
        else:
            yield from _run_until_killed(function, waiting, num_processes, JOBS_AHEAD * num_processes, suspects)


def _run_until_killed(
    function: Callable[[Job], Result], waiting: deque[Job], num_processes: int, at_once: int, suspects: deque[Job]
) -> Generator[Result | Killed[Job], None, None]:
    """Run jobs until all are done or a worker is killed; then a lone job is to blame, several become suspects."""
    running: dict[Future[Result], Job] = {}
    interrupted: list[Job] = []
    with _start(min(num_processes, len(waiting))) as executor, suppress(BrokenProcessPool):
        # It breaks between two submissions, too; the jobs handed out so far are then still in `running`.
        while (waiting or running) and not interrupted:
            while waiting and len(running) < at_once:
                running[executor.submit(function, waiting[0])] = waiting[0]
                waiting.popleft()
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    interrupted.append(job)
                else:
                    yield future.result()
    interrupted += running.values()
    if at_once == 1 and interrupted:
        yield Killed(interrupted[0])
    else:
        suspects.extend(interrupted)


class WorkerProcesses(ProcessPoolExecutor):
    """Processes that have been started, and end with this one even if it is killed.

    The next run must not find them at work in its folders. Ctrl-C, which reaches all processes of a terminal, is for
    this one alone, which ends them then, as it does when nobody wants the results any more.
    """

    def __init__(self, num_processes: int):
        super().__init__(num_processes, mp_context=get_context("spawn"), initializer=_end_with_parent)
        with _interrupts_held_back():  # which the processes inherit, so that Ctrl-C does not stop their imports either
            self.started = [self.submit(int) for _ in range(num_processes)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (KeyboardInterrupt, GeneratorExit)):
            for worker in list((self._processes or {}).values()):
                worker.terminate()
        self.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Until the block ends, for this thread; Windows has no such thing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None

    def wait_for_its_end() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait_for_its_end, daemon=True).start()


def _start(num_processes: int) -> WorkerProcesses:
    """Worker processes of which the first has answered, so that a later end is the fault of a job."""
    for _ in range(STARTS):
        executor = WorkerProcesses(num_processes)
        try:
            executor.started[0].result()
            return executor
        except BrokenProcessPool:
            executor.shutdown()
    raise UserError(
        "worker processes end while they start; see their messages above, or use one process. A script that prepares "
        'a pool needs its main part below `if __name__ == "__main__":`'
    )
