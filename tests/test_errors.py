"""What a program prints and returns when an error ends it: one line where the user can do something about it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from nnunetv2_misfm.errors import UserError, exit_with_message

PROGRAM = """
from nnunetv2_misfm.errors import UserError, tell_uncaught_errors_in_one_line
tell_uncaught_errors_in_one_line()
tell_uncaught_errors_in_one_line()
raise {error}
"""
FULL = "OSError(28, 'No space left on device', 'plans.json')"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("UserError('-d 9: no such dataset')", "error: -d 9: no such dataset"),
        (FULL, "error: plans.json: No space left on device. Make room"),
        ("KeyboardInterrupt", "Interrupted. Continue from the latest checkpoint with --c."),
    ],
)
def test_a_program_of_others_ends_in_one_line(error: str, line: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(error=error)], capture_output=True, text=True)
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert done.returncode == (-signal.SIGINT if error == "KeyboardInterrupt" else 1)


@pytest.mark.parametrize("error", ["ValueError('a mistake of ours')", "OSError(5, 'Input/output error')"])
def test_a_mistake_of_ours_keeps_its_traceback(error: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(error=error)], capture_output=True, text=True)
    assert "Traceback" in done.stderr and done.stderr.count(error.partition("(")[0] + ":") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("x"), 2), (OSError(errno.EROFS, "Read-only file system", "x"), 2), (KeyboardInterrupt(), 130)],
)
def test_a_command_of_ours_names_itself(capsys: pytest.CaptureFixture[str], error: BaseException, status: int) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_with_message("misfm_plan", fail)
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith("misfm_plan: ")


def test_another_pipe_than_that_of_the_output_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setenv("MISFM_TRACEBACK", "1")
    with pytest.raises(BrokenPipeError, match="of a worker"):
        exit_with_message("misfm_plan", fail)


def test_a_traceback_is_shown_to_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("-d 9: no such dataset")

    monkeypatch.setenv("MISFM_TRACEBACK", "1")
    with pytest.raises(UserError):
        exit_with_message("misfm_plan", fail)
    program = PROGRAM.format(error="UserError('-d 9: no such dataset')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.rstrip().endswith("UserError: -d 9: no such dataset")


def test_what_the_terminal_cannot_show_ends_nothing() -> None:
    program = "from nnunetv2_misfm.errors import exit_with_message as e; e('a', lambda: print(chr(0xb5), chr(0xfc)))"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "\\xb5 \\xfc\n"), done.stderr
