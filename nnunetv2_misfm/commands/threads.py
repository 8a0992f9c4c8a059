"""Threads in place of nnU-Net's pools of processes, each of which would take seconds to import what it needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


def threads_for_processes(method: str | None = None) -> SimpleNamespace:
    """Stands in for `multiprocessing.get_context`, whose pools nnU-Net uses, and has pools of threads."""
    return SimpleNamespace(Pool=ThreadPool)


def in_this_process() -> AbstractContextManager[Any]:
    """nnU-Net's pools have threads within this context."""
    return patch("multiprocessing.get_context", threads_for_processes)
