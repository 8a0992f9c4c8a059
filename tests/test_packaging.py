"""What lands in the user's environment: every file of the package, its commands, and one start-up file."""

from __future__ import annotations

import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from environments import REPOSITORY, Environment, build_wheel, copy_source

import nnunetv2_misfm


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_source(tmp_path_factory.mktemp("packaging") / "source")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def distribution(wheel: Path) -> PathDistribution:
    root = zipfile.Path(wheel)
    return PathDistribution(next(entry for entry in root.iterdir() if entry.name.endswith(".dist-info")))  # type: ignore[arg-type]


def test_the_wheel_holds_every_file_of_the_package_and_one_start_up_file(wheel: Path, source: Path) -> None:
    package = {path.relative_to(source).as_posix() for path in (source / "nnunetv2_misfm").rglob("*") if path.is_file()}
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == package | {"nnunetv2_misfm.pth"}


def test_the_version_is_the_one_in_the_package(distribution: PathDistribution) -> None:
    assert distribution.version == nnunetv2_misfm.__version__


def test_every_command_names_a_function_that_exists(distribution: PathDistribution) -> None:
    missing = []
    for command in distribution.entry_points:
        module = REPOSITORY / f"{command.module.replace('.', '/')}.py"
        if not module.is_file() or f"def {command.attr}(" not in module.read_text(encoding="utf-8"):
            missing.append(f"{command.name} = {command.value}")
    assert missing == []


@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
def test_uninstalling_leaves_nothing(source: Path, tmp_path: Path, editable: bool) -> None:
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    wheel = build_wheel(source, tmp_path / "wheel", editable)
    environment.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
    assert (environment.site_packages / "nnunetv2_misfm.pth").is_file()
    environment.pip("uninstall", "--quiet", "--yes", "nnunetv2_misfm")
    assert environment.files() - before == set()


def test_importing_the_package_imports_nothing_heavy(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
    show_modules = "import sys, nnunetv2_misfm; print({'torch', 'numpy', 'nnunetv2', 'blosc2'} & set(sys.modules))"
    done = environment.run("-c", show_modules)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
