"""Imports point one way, so that each part can be read, tested and replaced without the ones above it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "nnunetv2_misfm"
FILES = sorted(PACKAGE.rglob("*.py"))
# The floors of the house: what each part may import besides itself and the modules at the root of the package.
MAY_IMPORT = {
    "architectures": set(),
    "plans": {"architectures"},
    "pretrain": {"architectures", "plans"},
    "checkpoints": {"architectures", "plans"},
    "transfer": {"architectures", "plans", "checkpoints"},
    "pool": {"architectures", "plans"},
    "pages": set(),
    "trainers": {"architectures", "plans", "pretrain", "checkpoints", "transfer", "pool", "pages"},
    "commands": {"architectures", "plans", "pretrain", "checkpoints", "transfer", "pool", "pages", "trainers"},
    "nnunet_plugin": {"trainers"},
    "": set(),
}
EXCEPTIONS = {
    ("__init__.py", "checkpoints/source.py"),  # load_network
    ("pretrain/__main__.py", "commands/pretrain.py"),  # torchrun starts the command as a module
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def part_of(name: str) -> str:
    """`transfer` for transfer/planning.py, and the empty string for a module at the root of the package."""
    return name.rpartition("/")[0].partition("/")[0]


def imported_modules(file: Path) -> Iterator[str]:
    """Dotted names of all a file imports; `from a import b` gives `a.b`, for b may be a module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(file.relative_to(REPOSITORY).parts[: -node.level]) if node.level else ""
            parent = ".".join(filter(None, [package, node.module]))
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def imported_files(file: Path) -> Iterator[str]:
    """The files of this package that a file imports, each named by its path in the package."""
    for module in imported_modules(file):
        parts = module.split(".")
        while parts and parts[0] == PACKAGE.name:
            path = REPOSITORY.joinpath(*parts)
            found = [candidate for candidate in (path.with_suffix(".py"), path / "__init__.py") if candidate.is_file()]
            if found:
                yield name_of(found[0])
                break
            parts.pop()


def third_party_imports(file: Path) -> set[str]:
    tops = {module.partition(".")[0] for module in imported_modules(file)}
    return tops - set(sys.stdlib_module_names) - {PACKAGE.name}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_what_lies_below_it(file: Path) -> None:
    name = name_of(file)
    allowed = MAY_IMPORT[part_of(name)] | {part_of(name), ""}
    wrong = [
        other for other in imported_files(file) if part_of(other) not in allowed and (name, other) not in EXCEPTIONS
    ]
    assert wrong == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_module_imports_a_star(file: Path) -> None:
    assert [module for module in imported_modules(file) if module.endswith(".*")] == []


def test_the_networks_need_torch_only() -> None:
    files = [file for file in (PACKAGE / "architectures").rglob("*.py") if file.name != "generic_unet.py"]
    assert {name for file in files for name in third_party_imports(file)} == {"torch"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, nnunetv2_misfm; print(*sorted({'torch', 'numpy', 'nnunetv2', 'blosc2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_declared_dependencies_are_those_that_are_imported() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w.-]", dependency)[0] for dependency in project["dependencies"]}
    imported = {name for file in FILES for name in third_party_imports(file)}
    assert {name.lower().replace("_", "-") for name in imported} == {name.lower() for name in declared}
