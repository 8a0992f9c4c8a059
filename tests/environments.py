"""Virtual environments without network: wheels built from a copy of the source, and Python run in them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


class Environment:
    """A virtual environment with nothing in it, not even pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def site_packages(self) -> Path:
        return next(self.folder.rglob("site-packages"))

    def pip(self, *arguments: str | Path) -> None:
        """Run the pip of the environment that runs the tests on this one."""
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run its Python, away from the clone, with the given variables and none of nnU-Net's or Python's own."""
        return run(self.python, *arguments, folder=self.folder, **variables)

    def files(self) -> set[str]:
        """Everything in it but compiled modules."""
        files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return {file for file in files if "__pycache__" not in file}


def run(*command: str | Path, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output; a failure shows what it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet", "PYTHON", "MISFM"))}
    command = tuple(str(part) for part in command)
    environment = {**inherited, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


def copy_source(folder: Path) -> Path:
    """A copy of what the package is built from, so that building leaves the clone as it is."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is needed to build the package without network, and is not installed")
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, folder)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "nnunetv2_misfm", folder / "nnunetv2_misfm", ignore=ignore)
    return folder


def build_wheel(source: Path, destination: Path, editable: bool = False) -> Path:
    """The wheel that `pip install .` or `pip install -e .` would build and install."""
    if editable:
        backend = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
        command = ["-c", f"import os, sys; os.chdir(sys.argv[2]); {backend}", destination, source]
    else:
        command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", destination, source]
    run(sys.executable, *command)
    return next(destination.glob("*.whl"))
