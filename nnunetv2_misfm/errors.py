"""Errors that a user can do something about: commands print the message alone, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something given by the user cannot be used; the message names it, its value and the remedy."""


class PlanError(UserError, ValueError):
    """A plan, configuration or dataset cannot be used by this package."""


def exit_with_message(command: str, run: Callable[[], None]) -> None:
    """Call `run`; end the program with the message of a `UserError` and exit status 2."""
    try:
        run()
    except UserError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
