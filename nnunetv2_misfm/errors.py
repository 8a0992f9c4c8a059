"""Errors that a user can do something about: commands print the message alone, without a traceback."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import sys
from collections.abc import Callable
from types import TracebackType

TRACEBACK = "MISFM_TRACEBACK"
"""The environment variable that, set to 1, shows where in the code an error was raised."""
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Something given by the user cannot be used; the message names it, its value and the remedy."""


class PlanError(UserError, ValueError):
    """A plan, configuration or dataset cannot be used by this package."""


def first_line(error: BaseException) -> str:
    """What an error says in one line of at most 200 characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def exit_with_message(command: str, run: Callable[[], None]) -> None:
    """Call `run`; end the program with one line and status 2 (130 after Ctrl-C) for an error that has one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path or unit that the terminal's encoding does not have must not end hours of work.
            stream.reconfigure(errors="backslashreplace")
    # Python would search all that PyTorch's and nnU-Net's modules hold once more before it ends, which takes seconds.
    atexit.register(gc.freeze)
    try:
        run()
    except BrokenPipeError:
        if os.environ.get(TRACEBACK) == "1":  # it may be another pipe than that of the output
            raise
        _discard_output()
        print(f"{command}: whatever read the output has ended; stopped", file=sys.stderr)
        raise SystemExit(1) from None
    except (UserError, OSError, KeyboardInterrupt) as error:
        line = in_one_line(error)
        if line is None or os.environ.get(TRACEBACK) == "1":
            raise
        print(f"{command}: {line}", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None


def _discard_output() -> None:
    """After the reader of the output went away (`| head`); else Python would complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell_uncaught_errors_in_one_line() -> None:
    """Let Python end programs of others with one line instead of a traceback, for the errors that have one.

    nnU-Net's commands run our trainers; what they raise reaches callers in Python unchanged.
    """
    before = sys.excepthook
    if before.__module__ == __name__:
        return

    def tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = in_one_line(error, interrupted="Interrupted. Continue from the latest checkpoint with --c.")
        if line is None or os.environ.get(TRACEBACK) == "1":
            before(kind, error, traceback)
        else:
            print(line, file=sys.stderr)

    sys.excepthook = tell


def in_one_line(error: BaseException, interrupted: str = "interrupted") -> str | None:
    """What to print in place of a traceback: for a `UserError`, a full or forbidden disk, Ctrl-C; else None."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in _FULL_OR_FORBIDDEN:
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"error: {where}{error.strerror}. Make room or give access, and run the command again; what was finished "
            f"is kept."
        )
    return interrupted if isinstance(error, KeyboardInterrupt) else None
