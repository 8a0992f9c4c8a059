"""Errors that a user can do something about: commands print the message alone, without a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Something given by the user cannot be used; the message names it, its value and the remedy."""


class PlanError(UserError, ValueError):
    """A plan, configuration or dataset cannot be used by this package."""


def first_line(error: BaseException) -> str:
    """What an error says in one line of at most 200 characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def exit_with_message(command: str, run: Callable[[], None]) -> None:
    """Call `run`; end the program with the message of a `UserError`, or of a full or forbidden disk, and status 2."""
    try:
        run()
    except UserError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _FULL_OR_FORBIDDEN:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"{command}: error: {where}{error.strerror}. Make room or give access, and run the command again; what was "
            f"finished is kept.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
