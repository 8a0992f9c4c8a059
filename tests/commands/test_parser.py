"""What is said of a command line that cannot be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nnunetv2_misfm.commands.checkpoints import inspect_main
from nnunetv2_misfm.commands.compare.cli import main as misfm_compare
from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (misfm_pretrain, ["-d", "4", "-modalty", "ct"], "Did you mean -modality by -modalty?"),
        (plan_main, ["-d", "4", "--from_scrach"], "Did you mean --from_scratch by --from_scrach?"),
        (misfm_compare, [], "the following arguments are required: -d"),
        (inspect_main, ["A.pth", "--zzz"], "unrecognized arguments: --zzz"),
    ],
)
def test_an_error_is_a_few_lines(
    command: Callable[[list[str]], None], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(words)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and said in message and "-h explains all options." in message
    assert len(message.splitlines()) <= 3
