"""nnU-Net finds the trainers by itself, and Python starts as before in every environment the package is put into."""

from __future__ import annotations

import importlib.util
import os
import pickle
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import REPOSITORY, Environment, build_wheel, copy_source, run

PLUGIN_FOLDER = REPOSITORY / "nnunetv2_misfm" / "nnunet_plugin"
SHOW_SEARCH_PATH = "import os; print(os.environ.get('nnUNet_extTrainer'))"
TRAINERS = {
    "MisFMTrainer": "misfm_trainer",
    "PretrainingTrainer": "pretraining_trainer",
    "VolumeFusionTrainer": "volume_fusion_trainer",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_source(tmp_path_factory.mktemp("discovery") / "source")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def make_environment(folder: Path, wheel: Path) -> Environment:
    environment = Environment(folder)
    environment.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment in which the package was installed; tests leave it as it is."""
    return make_environment(tmp_path_factory.mktemp("regular") / "environment", wheel)


def plugin_folder_of(environment: Environment) -> str:
    return str(environment.site_packages / "nnunetv2_misfm" / "nnunet_plugin")


def search_path(environment: Environment, *options: str, **variables: str) -> str:
    """`nnUNet_extTrainer` as a new Python sees it; that Python must have nothing to say at its start."""
    done = environment.run(*options, "-c", SHOW_SEARCH_PATH, **variables)
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_regular_install_puts_the_folder_on_the_search_path(installed: Environment) -> None:
    assert search_path(installed) == plugin_folder_of(installed)


def test_an_editable_install_puts_the_folder_of_the_source_on_the_search_path(source: Path, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment", build_wheel(source, tmp_path / "wheel", editable=True))
    assert search_path(environment) == str(source / "nnunetv2_misfm" / "nnunet_plugin")


def test_an_editable_install_whose_source_is_gone_keeps_silent(tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    environment = make_environment(tmp_path / "environment", build_wheel(source, tmp_path / "wheel", editable=True))
    shutil.rmtree(source)
    assert search_path(environment) == "None"


def test_the_users_own_folders_come_first(installed: Environment) -> None:
    own = os.pathsep.join(["/home/me/trainers", "relative", "caf\udce9"])
    expected = os.pathsep.join([own, plugin_folder_of(installed)])
    done = installed.run("-c", "import os; print(os.fsencode(os.environ['nnUNet_extTrainer']))", nnUNet_extTrainer=own)
    assert (done.stdout.strip(), done.stderr) == (str(os.fsencode(expected)), "")


def test_an_empty_search_path_gets_the_folder_alone(installed: Environment) -> None:
    assert search_path(installed, nnUNet_extTrainer="") == plugin_folder_of(installed)


@pytest.mark.parametrize("ending", ["", os.sep, f"{os.sep}..{os.sep}nnunet_plugin"])
def test_a_search_path_with_the_folder_is_left_alone(installed: Environment, ending: str) -> None:
    own = plugin_folder_of(installed) + ending
    assert search_path(installed, nnUNet_extTrainer=own) == own


def test_a_child_process_does_not_append_it_again(installed: Environment) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SHOW_SEARCH_PATH!r}])"
    assert installed.run("-c", child).stdout.strip() == plugin_folder_of(installed)


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_off_switch(installed: Environment, value: str, is_off: bool) -> None:
    expected = "None" if is_off else plugin_folder_of(installed)
    assert search_path(installed, nnUNet_misfm_off=value) == expected


@pytest.mark.parametrize("option", ["-I", "-E", "-s"])
def test_isolated_starts_find_it_too(installed: Environment, option: str) -> None:
    assert search_path(installed, option) == plugin_folder_of(installed)


def test_a_start_without_site_is_left_alone(installed: Environment) -> None:
    assert search_path(installed, "-S") == "None"


def test_a_moved_environment_finds_its_own_folder(wheel: Path, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment", wheel)
    environment.folder = environment.folder.rename(tmp_path / "moved")
    assert search_path(environment) == plugin_folder_of(environment)


def test_a_start_up_file_without_its_package_keeps_silent(wheel: Path, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment", wheel)
    shutil.rmtree(environment.site_packages / "nnunetv2_misfm")
    assert search_path(environment) == "None"


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete a folder in use")
def test_a_start_in_a_deleted_folder_works(installed: Environment, tmp_path: Path) -> None:
    start = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec {installed.python} -I -c"
    done = subprocess.run(["sh", "-c", f'{start} "{SHOW_SEARCH_PATH}"'], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (plugin_folder_of(installed), "")


def test_starting_python_imports_no_further_module(installed: Environment, tmp_path: Path) -> None:
    bare = Environment(tmp_path / "environment")
    # Since Python 3.13 reading any start-up file imports a codec.
    (bare.site_packages / "other.pth").write_text("# nothing\n", encoding="utf-8")
    show_modules = "import sys; print(sorted(sys.modules))"
    assert installed.run("-c", show_modules).stdout == bare.run("-c", show_modules).stdout


def test_an_environment_without_the_package_can_import_the_inherited_shim(tmp_path: Path) -> None:
    search = f"import sys; sys.path.insert(0, {str(PLUGIN_FOLDER)!r}); import nnunetv2_misfm_trainers_shim"
    assert Environment(tmp_path / "environment").run("-c", search).stderr == ""


def test_the_folder_holds_one_module_that_no_other_package_has() -> None:
    (module,) = pkgutil.iter_modules([str(PLUGIN_FOLDER)])
    assert (module.name, module.ispkg) == ("nnunetv2_misfm_trainers_shim", False)
    assert importlib.util.find_spec(module.name) is None


@pytest.fixture
def find_trainer(monkeypatch: pytest.MonkeyPatch):
    find_objects = pytest.importorskip("nnunetv2.utilities.find_objects")
    monkeypatch.setenv("nnUNet_extTrainer", str(PLUGIN_FOLDER))
    return find_objects.recursive_find_trainer_class_by_name


@pytest.mark.parametrize(("trainer", "module"), TRAINERS.items())
def test_nnunet_resolves_the_trainer_to_the_installed_package(find_trainer, trainer: str, module: str) -> None:
    found = find_trainer(trainer)
    assert (found.__module__, found.__name__) == (f"nnunetv2_misfm.trainers.{module}", trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_class_is_the_same_at_every_look_up_and_can_be_pickled(find_trainer, trainer: str) -> None:
    found = find_trainer(trainer)
    assert pickle.loads(pickle.dumps(found)) is find_trainer(trainer)


def test_a_trainer_of_the_users_own_with_the_same_name_wins(find_trainer, monkeypatch, tmp_path: Path) -> None:
    own = tmp_path / "my_trainers.py"
    own.write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class MisFMTrainer(nnUNetTrainer):\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(PLUGIN_FOLDER)]))
    assert find_trainer("MisFMTrainer").__module__ == "my_trainers"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_nnunet_in_a_new_environment_finds_the_trainer(wheel: Path, tmp_path: Path, trainer: str) -> None:
    environment = make_environment(tmp_path / "environment", wheel)
    nnunet = Path(pytest.importorskip("nnunetv2").__file__).parents[1]
    if not (nnunet / "torch").is_dir():
        pytest.skip("nnU-Net does not lie beside its requirements here, as in an editable install")
    # nnU-Net and torch are borrowed from the environment that runs the tests; this package is the new environment's.
    (environment.site_packages / "zz_borrowed.pth").write_text(f"{nnunet}\n", encoding="utf-8")
    find = "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find; import sys"
    done = environment.run("-c", f"{find}; print(sys.modules[find({trainer!r}).__module__].__file__)")
    expected = environment.site_packages / "nnunetv2_misfm" / "trainers" / f"{TRAINERS[trainer]}.py"
    assert done.stdout.splitlines()[-1] == str(expected)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
def test_pip_install_itself_adds_the_start_up_file(tmp_path: Path, editable: bool) -> None:
    source = copy_source(tmp_path / "source")
    environment = Environment(tmp_path / "environment")
    setuptools = importlib.util.find_spec("setuptools")
    run(
        *(sys.executable, "-m", "pip", "--python", environment.python, "install", "--no-deps", "--no-index"),
        *("--no-build-isolation", *(["-e"] if editable else []), source),
        PYTHONPATH=str(Path(setuptools.origin).parents[1]),
    )
    owner = source if editable else environment.site_packages
    assert search_path(environment) == str(owner / "nnunetv2_misfm" / "nnunet_plugin")
