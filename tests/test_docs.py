"""What the documents say can be typed: links lead somewhere, commands are understood, Python blocks run."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, write_checkpoint
from nnunetv2_misfm.plans.run_settings import FinetuningSettings, PretrainingSettings
from nnunetv2_misfm.plans.settings import Settings, declared, write_settings
from nnunetv2_misfm.pool.settings import PoolSettings
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.tasks import AUGMENTATION, task_classes

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = {entry.name: entry for entry in entry_points(group="console_scripts")}
# Words that stand for what the reader knows.
MEANT = {"DATASET_ID": "4", "ID": "4", "PART": "0", "GB": "8", "$SLURM_ARRAY_TASK_ID": "0", "NAME": "vox2vec"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def command_lines() -> Iterator[tuple[str, str]]:
    """Commands of ours and of nnU-Net with their arguments, in blocks and within sentences.

    Those that are cut short (`...`) or end in the name of an option that takes a value are left out.
    """
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        within = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]
        for line in [*lines, *(words for words in within if " " in words)]:
            for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
                command = part.split()[:1]
                if (
                    command
                    and re.fullmatch(r"(misfm|nnUNetv2)_\w+", command[0])
                    and not re.search(r"\.\.\.|--help|\s-[^-\s]\S*\s*$", part)
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


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    assert [line for line in prose if len(line) > 132 and not line.startswith("|")] == []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", text)
    assert pictures and all((REPOSITORY / picture).stat().st_size < 150_000 for picture in pictures)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {document.relative_to(REPOSITORY).as_posix() for document in DOCUMENTS} <= listed
    assert all((REPOSITORY / page).is_file() for page in listed)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lists_are_lists_on_the_site_too(document: Path) -> None:
    """GitHub takes a list that follows a line of text at once for a list, the site takes it for more text."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^(?![-*] |\d+\. | |\n).+\n(?:[-*]|\d+\.) .*", text, flags=re.MULTILINE) == []


PYTHON = [(path.name, code) for path in DOCUMENTS for code in blocks(path.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize(("document", "code"), PYTHON, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python_runs(
    document: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    printed = capsys.readouterr().out.splitlines()
    assert set(re.findall(r"^print\(.*\)  # (.+)$", code, flags=re.MULTILINE)) <= set(printed)


# The tables of docs/plans_file.md, by the headings that they stand under.
SETTING_GROUPS: list[tuple[str, type[Settings]]] = [
    ("A fine-tuning", FinetuningSettings),
    ("A pretraining", PretrainingSettings),
    *((f"`{kind.group()}`", kind.Settings) for kind in task_classes()),
    (f"`{AUGMENTATION}`", AugmentSettings),
    ("`pool`", PoolSettings),
]


def setting_rows(kind: type[Settings]) -> list[str]:
    """A line of a table for each declared setting."""
    rows = []
    for name, default in write_settings(kind()).items():
        free = "yes" if declared(kind, name, "may_change") else ""
        rows.append(f"| `{name}` | `{json.dumps(default)}` | {kind.model_fields[name].description} | {free} |")
    return rows


@pytest.mark.parametrize(("title", "kind"), SETTING_GROUPS, ids=[title.strip("`") for title, _ in SETTING_GROUPS])
def test_every_setting_of_a_plans_file_is_on_its_page_as_it_is_declared(title: str, kind: type[Settings]) -> None:
    page = (REPOSITORY / "docs" / "plans_file.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page.split(f"## {title}\n", 1)[1], flags=re.MULTILINE)[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table[: len(kind.model_fields)] == setting_rows(kind)


def said_by_the_package() -> str:
    """All text in the source of the package, a line for each string; an ellipsis stands for what is filled in."""
    lines = []
    for file in sorted((REPOSITORY / "nnunetv2_misfm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                lines.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_package() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = said_by_the_package()
    quoted = re.findall(r"^\| `([^`]+)`(?! \(nnU-Net\))", page, flags=re.MULTILINE)
    assert len(quoted) > 20
    assert [message for message in quoted if message not in said] == []
