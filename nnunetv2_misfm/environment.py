"""Environment variables, as people and torchrun set them."""

from __future__ import annotations

import os


def without_quotes(value: str) -> str:
    """The folder that a variable was meant to name, where quotes around it became a part of the value."""
    return value if os.path.isdir(value) else value.strip("\"'")


def processes_on_this_machine() -> int:
    """How many processes torchrun has started here; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
