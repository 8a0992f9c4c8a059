"""Doing many runs, each in a process of its own, several at once, with a progress bar."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from nnunetv2_misfm.commands.compare.one_run import END_WITH_PARENT
from nnunetv2_misfm.commands.compare.records import RunOrder
from nnunetv2_misfm.commands.devices import name_of_gpu
from nnunetv2_misfm.cpu_threads import usable_cores
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.progress import progress_bar

_EPOCH = re.compile(r".*Epoch time")
_LAST_LINES = 3  # of a failed run's log


@dataclass(frozen=True)
class Failure:
    """A run that failed: its title, its log, and the last that it said."""

    title: str
    log: Path
    last: str


class Runner:
    """Processes for runs.

    Args:
        device: "cuda", "cpu" or "mps".
        gpus: numbers of those that the runs take turns on; none for what the environment shows.
        jobs: how many runs at once.
    """

    def __init__(self, device: str, gpus: Sequence[str], jobs: int):
        self.device = device
        self.jobs = jobs
        self._places: SimpleQueue[str | None] = SimpleQueue()
        for job in range(jobs):
            self._places.put(gpus[job % len(gpus)] if gpus else None)
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = threading.Event()

    def perform(self, orders: Sequence[RunOrder], what: str, epochs: int) -> list[Failure]:
        """Do the runs that are asked for; a run that fails does not keep the others from being done.

        Args:
            orders: for the runs, which are begun one after the other.
            what: they are, for the progress bar, such as "runs".
            epochs: of each; prediction counts as one more.
        """
        failures: list[Failure] = []
        total = (epochs + 1) * len(orders)
        title = what.capitalize() if total == len(orders) else f"Epochs of {len(orders)} {what}"
        with progress_bar(total, title, unit="epoch", disable=not orders) as bar, self._ended_by_signals():

            def do(order: RunOrder) -> None:
                place = self._places.get()
                try:
                    failure = None if self._stopping.is_set() else self._do(order, place, bar, epochs + 1)
                finally:
                    self._places.put(place)
                if failure is not None:
                    failures.append(failure)
                    bar.write(f"{failure.title} failed; see {failure.log}")

            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(do, orders))
                except BaseException:
                    self._stop()
                    raise
        return failures

    def _do(self, order: RunOrder, place: str | None, bar: tqdm, share: int) -> Failure | None:
        folder = order.record.parent
        folder.mkdir(parents=True, exist_ok=True)
        file_of_order = folder / "order.json"
        write_json(order.model_dump(mode="json"), file_of_order)
        command = [sys.executable, "-m", "nnunetv2_misfm.commands.compare.one_run", str(file_of_order)]
        log, counted = folder / "log.txt", 0
        last: list[str] = []
        with open(log, "a", encoding="utf-8", buffering=1) as file:
            process = subprocess.Popen(
                [*command, END_WITH_PARENT],
                stdin=subprocess.PIPE,  # its end tells the run that this process has ended
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(place),
                text=True,
                errors="replace",
                start_new_session=True,  # a process group of its own, with nnU-Net's workers
            )
            self._running.add(process)
            if self._stopping.is_set():  # since this run was about to start
                process.terminate()
            threading.Thread(target=_end_workers, args=(process,), daemon=True).start()
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                last = [*last, line.strip()][-_LAST_LINES:] if line.strip() else last
                if _EPOCH.match(line) and counted < share - 1:
                    counted += 1
                    bar.update()
            status = process.wait()
            self._running.discard(process)
        if not self._stopping.is_set():
            bar.update(share - counted)
        return None if status == 0 else Failure(folder.name, log, " | ".join(last))

    def _environment(self, place: str | None) -> dict[str, str]:
        """What the processes of runs get: this one's, with a fair share of a CPU's cores and one GPU."""
        environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = name_of_gpu(place)
        if self.device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.jobs)))
            # In the run's own process its seed reaches nnU-Net's augmentation, and nothing waits for workers.
            for name, value in (("nnUNet_n_proc_DA", "0"), ("nnUNet_def_n_proc", "1"), ("nnUNet_compile", "0")):
                environment.setdefault(name, value)
        return environment

    def _stop(self) -> None:
        self._stopping.set()
        for process in list(self._running):
            process.terminate()

    @contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        """SIGTERM, a cluster's time limit, ends the runs as Ctrl-C does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _end_workers(process: subprocess.Popen[str]) -> None:
    """When a run has ended, end what it has started.

    nnU-Net's workers outlive a run that was killed, and hold its output open, which would be waited for for ever.
    """
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
