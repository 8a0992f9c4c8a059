"""Bad input gets the message that bad_input.csv promises: never a traceback, and nothing is changed."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import bad_files
from nnunet_dataset import NAME

from nnunetv2_misfm.commands.checkpoints import export_main, import_main, inspect_main
from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.commands.pretrain import main as pretrain_main

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "misfm_pretrain": pretrain_main,
    "misfm_plan": plan_main,
    "misfm_import_checkpoint": import_main,
    "misfm_export_checkpoint": export_main,
    "misfm_inspect": inspect_main,
}
with open(Path(__file__).with_name("bad_input.csv"), newline="", encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    bad_files.make_volumes(folder / "volumes")
    bad_files.make_checkpoints(folder / "checkpoints")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("row", ROWS, ids=[row["command"] for row in ROWS])
def test_the_message_of_the_table_is_given(
    nnunet: Path, bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], row: dict[str, str]
) -> None:
    bad_files.make_plans(nnunet / "nnUNet_preprocessed" / NAME)
    monkeypatch.chdir(bad)
    before = contents(nnunet)
    name, *arguments = shlex.split(row["command"])
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name](arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert row["message"] in message and "Traceback" not in message
    after = contents(nnunet)
    assert {path: after.get(path) for path in before} == before, "nothing that was there is changed"
    assert name != "misfm_plan" or after == before, "nothing is written"
    assert not (bad / "ran").exists(), "no code was run"


def test_every_bad_file_is_in_the_table() -> None:
    commands = " ".join(row["command"] for row in ROWS)
    named = [f"volumes/{kind}'" for kind in bad_files.VOLUMES] + [f"-p {name}" for name in bad_files.PLANS]
    assert [name for name in named if name not in commands] == []
