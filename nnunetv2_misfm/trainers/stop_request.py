"""Being asked to stop: SIGTERM from a cluster, or Ctrl-C. Pretraining saves first; fine-tuning ends, as in nnU-Net."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Within this context SIGTERM and Ctrl-C are noted instead of ending the process; a second Ctrl-C ends it.

    SIGTERM may come several times, from the cluster and from torchrun, before there was time to save.

    Attributes:
        signal: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Ctrl-C ends the program with one line instead of a traceback, and the usual status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. Continue from the latest checkpoint with --c.", file=sys.stderr)
        raise SystemExit(130) from None
