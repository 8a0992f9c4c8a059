"""Folders named by environment variables, as people write them."""

from __future__ import annotations

import os


def without_quotes(value: str) -> str:
    """The folder that a variable was meant to name, where quotes around it became a part of the value."""
    return value if os.path.isdir(value) else value.strip("\"'")
