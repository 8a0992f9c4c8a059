"""Where a measurement comes from: what every table of a benchmark says below it."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(command: str, packages: Sequence[str], checkouts: Mapping[str, Path], device: str) -> list[str]:
    """Markdown lines: the command, versions of Python, packages and checkouts, the device, the date."""
    versions = [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in packages)]
    versions += [f"{name} {commit_of(checkout)}" for name, checkout in checkouts.items()]
    return [
        f"- Command: `{command}`",
        f"- Versions: {', '.join(versions)}",
        f"- Device: {device}",
        f"- Date: {datetime.date.today().isoformat()}",
    ]


def commit_of(checkout: Path) -> str:
    """The short name of the commit a checkout is at."""
    found = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "of unknown commit"


def device_name(device: str) -> str:
    """What a measurement ran on: the GPU's name or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {processor()} ({torch.backends.cpu.get_cpu_capability()})"


def processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
