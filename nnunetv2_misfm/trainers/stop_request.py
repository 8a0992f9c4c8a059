"""Being asked to stop: SIGTERM from a cluster, or Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

BY_SIGNAL = 128
"""Added to a signal's number, as shells do, it is the exit status of what the signal ended."""


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
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.signal = {}, None  # what came too late to stop the training stops nothing else

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))
