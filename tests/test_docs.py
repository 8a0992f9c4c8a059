"""What the documents say can be typed: links lead somewhere, commands are understood, Python blocks run."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.transfer.checkpoint import CheckpointInfo, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = {entry.name: entry for entry in entry_points(group="console_scripts")}
# Words that stand for what the reader knows.
MEANT = {"DATASET_ID": "4", "ID": "4", "PART": "0", "$SLURM_ARRAY_TASK_ID": "0", "NAME": "vox2vec"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def command_lines() -> Iterator[tuple[str, str]]:
    """Commands of ours and of nnU-Net with their arguments, in blocks and within sentences.

    Those that are cut short (`...`) or end in the name of an option are left out.
    """
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
        within = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for line in [*lines, *(words for words in within if " " in words)]:
            for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
                command = part.split()[:1]
                if (
                    command
                    and re.fullmatch(r"(misfm|nnUNetv2)_\w+", command[0])
                    and not re.search(r"\.\.\.|\s-\S+\s*$", part)
                ):
                    yield document.name, part.strip()


class ParsedError(Exception):
    """The arguments were understood."""


@pytest.mark.parametrize(("document", "line"), sorted(set(command_lines())))
def test_a_command_line_is_understood(document: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_only(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        for action in parser._actions:
            action.required = False  # a sentence names the options that it is about
        _, unknown = understood(parser, args)
        assert not unknown, f"{document}: {line}: {unknown}"
        raise ParsedError

    understood = argparse.ArgumentParser.parse_known_args
    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, parse_only)
    command, *arguments = [MEANT.get(word, word) for word in shlex.split(line)]
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    assert command in COMMANDS, f"{document} names {command}, which is not installed"
    with pytest.raises(ParsedError):
        COMMANDS[command].load()()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


PYTHON = [(path.name, code) for path in DOCUMENTS for code in blocks(path.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize(("document", "code"), PYTHON, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python_runs(document: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"features_per_stage": [4, 4, 8, 16, 32]}
    network = PCTNet(1, 5, **arguments)
    content = {"network_weights": network.state_dict()}
    about = CheckpointInfo(
        task="volume_fusion",
        network_class_name="nnunetv2_misfm.architectures.PCTNet",
        arch_kwargs=arguments,
        input_channels=1,
        num_classes=5,
        preprocessing={},
        training={},
    )
    write_checkpoint(content, about, "CHECKPOINT")
    torch.save({"state_dict": network.state_dict()}, "FILE")
    exec(compile(code, document, "exec"), {})
