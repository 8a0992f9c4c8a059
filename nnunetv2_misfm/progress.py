"""Progress bars that are quiet where nobody watches: in a log file, one line a minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60


def progress_bar(total: int, title: str, **options: Any) -> tqdm:
    """A bar of `total` units in a terminal; elsewhere a line now and then, and one at the end.

    Args:
        total: number of units.
        title: what is being done.
        options: further ones of tqdm.
    """
    options.setdefault("file", sys.stderr)
    if not options["file"].isatty():
        line = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {elapsed} so far, about {remaining} left\n"
        options |= {
            "bar_format": line,
            "mininterval": _SECONDS_BETWEEN_LINES,
            "maxinterval": _SECONDS_BETWEEN_LINES,
            "miniters": 1,
        }
    return tqdm(total=total, desc=title, **options)
