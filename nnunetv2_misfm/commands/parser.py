"""Command lines whose errors are a few lines."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

_UNKNOWN = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """As argparse's, which prints all options before it says what is wrong with one of them.

    Options are not abbreviated: -seed of one command would be -seeds of another.
    """

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # argparse's `allow_abbrev` is for options of two dashes alone

    def error(self, message: str) -> NoReturn:
        """End with the message, with the option that may have been meant, and with where all are listed."""
        words = message.removeprefix(_UNKNOWN).split() if message.startswith(_UNKNOWN) else []
        known = list(self._option_string_actions)
        close = {word: difflib.get_close_matches(word, known, n=1) for word in words if word.startswith("-")}
        meant = [f"Did you mean {found[0]} by {word}? " for word, found in close.items() if found]
        self.exit(2, f"{self.prog}: error: {message}\n{''.join(meant)}{self.prog} -h explains all options.\n")
