"""The end of a program, in a test's own process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_as_a_program() -> Iterator[None]:
    """What Python does with an error that nothing caught: `sys.excepthook` tells it, and a status is returned."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
