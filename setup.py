"""Ship a start-up file with the package, so that nnU-Net finds the trainers (see nnunetv2_misfm/start_up.py).

Everything else is in pyproject.toml. The file has to lie at the root of site-packages and to be listed in the wheel's
RECORD, for pip to remove it on uninstall; setuptools offers no setting for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

START_UP_FILE = "nnunetv2_misfm.pth"


def start_up_line() -> str:
    """start_up.py as one line: Python runs the lines of a `.pth` file that begin with `import`."""
    source = Path(__file__).with_name("nnunetv2_misfm").joinpath("start_up.py").read_text(encoding="utf-8")
    program = f"{source}\nadd_plugin_folder()\n"
    return f"import sys; exec({program!a}, {{'__name__': 'nnunetv2_misfm.start_up'}})\n"


class BuildPyWithStartUpFile(build_py):
    """For `pip install .` and wheels."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, START_UP_FILE).write_text(start_up_line(), encoding="ascii")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, START_UP_FILE))]


class EditableWheelWithStartUpFile(editable_wheel):
    """For `pip install -e .`, which takes nothing from `build_lib`."""

    def _select_strategy(self, *args: Any, **kwargs: Any) -> StrategyWithStartUpFile:
        return StrategyWithStartUpFile(super()._select_strategy(*args, **kwargs))


class StrategyWithStartUpFile:
    """setuptools' own strategy for the editable install, plus one file in the wheel."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def __enter__(self) -> StrategyWithStartUpFile:
        self.strategy.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        return self.strategy.__exit__(*exception)

    def __call__(self, wheel: Any, files: list[str], mapping: Any) -> None:
        self.strategy(wheel, files, mapping)
        wheel.writestr(START_UP_FILE, start_up_line())


setup(cmdclass={"build_py": BuildPyWithStartUpFile, "editable_wheel": EditableWheelWithStartUpFile})
