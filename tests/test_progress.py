"""Progress bars: many updates in a terminal, few lines in a file."""

from __future__ import annotations

import io
from pathlib import Path

from nnunetv2_misfm.progress import progress_bar

PACKAGE = Path(__file__).parents[1] / "nnunetv2_misfm"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_few_lines_that_say_how_far_it_is() -> None:
    log = io.StringIO()
    with progress_bar(1000, "Preparing volumes", file=log) as bar:
        for _ in range(1000):
            bar.update()
    first, last = filter(None, log.getvalue().replace("\r", "").splitlines())
    assert first.startswith("Preparing volumes: 0 of 1000")
    assert last.startswith("Preparing volumes: 1000 of 1000 (100 %)")


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with progress_bar(1000, "Preparing volumes", file=terminal, mininterval=0) as bar:
        for _ in range(1000):
            bar.update()
    assert "\n" not in terminal.getvalue().rstrip("\n") and terminal.getvalue().count("\r") > 100


def test_no_other_module_makes_bars_of_its_own() -> None:
    using = [str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if "tqdm(" in file.read_text("utf-8")]
    assert using == ["progress.py"]
