"""A progress bar for each step of the demo, while the step's own output goes to a log file."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from nnunetv2_misfm.progress import progress_bar


class _CountingLog(io.TextIOBase):
    """Writes to a log file and moves a bar forward at each line that matches a pattern."""

    def __init__(self, log: TextIO, pattern: str, bar: tqdm):
        self.log = log
        self.pattern = re.compile(pattern)
        self.bar = bar
        self.line = ""

    def write(self, text: str) -> int:
        self.log.write(text)
        # print() writes a line in pieces.
        *lines, self.line = (self.line + text).split("\n")
        found = sum(self.pattern.match(line) is not None for line in lines)
        self.bar.update(min(found, self.bar.total - self.bar.n))
        return len(text)

    def flush(self) -> None:
        self.log.flush()


@contextlib.contextmanager
def step(title: str, log_file: Path, total: int, counted: str) -> Iterator[None]:
    """Run a step with a bar of `total` units; each line of its output that matches `counted` is one unit."""
    terminal = sys.stderr
    with (
        # By line, so that what a worker process says before it ends is not lost with its buffer.
        open(log_file, "a", encoding="utf-8", buffering=1) as log,
        progress_bar(total, f"{title:<28}", file=terminal, bar_format="{l_bar}{bar:24}| {elapsed}") as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        log.write(f"\n===== {title}\n")
        counting = _CountingLog(log, counted, bar)
        with contextlib.redirect_stdout(counting), contextlib.redirect_stderr(log):
            yield
        bar.update(bar.total - bar.n)
