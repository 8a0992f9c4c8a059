"""misfm_doctor says what is wrong and what mends it, in every kind of installation, and never shows a traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from environments import REPOSITORY, Environment, build_wheel, copy_source

from nnunetv2_misfm.commands import doctor
from nnunetv2_misfm.commands.demo.steps import Demo
from nnunetv2_misfm.commands.devices import best_device, check_device
from nnunetv2_misfm.commands.doctor import Finding
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.files import nnunet_folder

SOURCE = str(REPOSITORY)
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """nnU-Net's three folders, set and there."""
    for variable in FOLDERS:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search path as the start-up file leaves it."""
    monkeypatch.setenv("nnUNet_extTrainer", str(doctor.PLUGIN_FOLDER))


def only(findings: list[Finding], what: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.what == what]
    return finding


def run_doctor(python: Path | str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a new process that sees none of this one's settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet", "PYTHON"))}
    command = [str(python), *options, "-m", "nnunetv2_misfm.commands.doctor"]
    return subprocess.run(command, env=inherited | variables, capture_output=True, text=True, cwd=os.sep, timeout=300)


def test_a_ready_installation_has_nothing_wrong(folders: Path, plugin: None, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    assert ended.value.code == 0
    assert "FAIL" not in capsys.readouterr().out


def test_with_nothing_set_it_names_each_folder_and_the_command_that_sets_it(monkeypatch, capsys) -> None:
    for variable in FOLDERS:
        monkeypatch.delenv(variable, raising=False)
    assert doctor.report((("Folders", (doctor.check_folders,)),)) == 1
    printed = capsys.readouterr().out
    assert [f"-> export {variable}=" in printed or f"-> set {variable}=" in printed for variable in FOLDERS] == [
        True
    ] * 3


def test_a_folder_that_does_not_exist_is_wrong(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(folders / "no such folder"))
    finding = only(doctor.run_check(doctor.check_folders), "nnUNet_results")
    assert (finding.status, finding.remedy) == ("FAIL", f"mkdir -p {shlex.quote(str(folders / 'no such folder'))}")


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_in_a_variable_are_named(folders: Path, monkeypatch: pytest.MonkeyPatch, quote: str) -> None:
    """As `set nnUNet_raw="C:\\data"` on Windows leaves them, or quotes in a file of variables."""
    monkeypatch.setenv("nnUNet_preprocessed", f"{quote}{folders / 'nnUNet_preprocessed'}{quote}")
    finding = only(doctor.run_check(doctor.check_folders), "nnUNet_preprocessed")
    assert (finding.status, "has quotes in it" in finding.detail) == ("FAIL", True)
    assert finding.remedy == f"export nnUNet_preprocessed={folders / 'nnUNet_preprocessed'}"
    with pytest.raises(PlanError, match="nnUNet_preprocessed has quotes in its value"):
        nnunet_folder("nnUNet_preprocessed")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc stands for a folder that not even root may write to")
@pytest.mark.parametrize(
    ("variable", "status"),
    [("nnUNet_raw", "warn"), ("nnUNet_preprocessed", "warn"), ("nnUNet_results", "FAIL")],
)
def test_a_folder_that_cannot_be_written_to_is_reported(folders: Path, monkeypatch, variable: str, status: str) -> None:
    monkeypatch.setenv(variable, "/proc")
    assert only(doctor.run_check(doctor.check_folders), variable).status == status


def test_a_check_that_breaks_down_becomes_a_finding_and_hides_no_other(capsys: pytest.CaptureFixture) -> None:
    def check_library() -> Iterator[Finding]:
        print("noise")
        yield Finding("ok", "first", "is fine")
        raise OSError("libcudart.so: cannot open shared object file")

    def check_exit() -> Iterator[Finding]:
        yield Finding("ok", "second", "is fine")
        sys.exit("a module that ends the program")

    assert doctor.report((("Section", (check_library, check_exit)),)) == 1
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("  ") and "->" not in line] == [
        ["ok", "first"],
        ["FAIL", "library"],
        ["ok", "second"],
        ["FAIL", "exit"],
    ]
    assert "libcudart.so" in printed and "noise" not in printed


@pytest.mark.parametrize("usable", [True, False])
def test_the_doctor_knows_the_device_that_the_commands_use(monkeypatch: pytest.MonkeyPatch, usable: bool) -> None:
    """A GPU that is listed but cannot be started, as with a driver that is too old, is none for any command."""
    properties = SimpleNamespace(name="A GPU", total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    found = {finding.what for finding in doctor.run_check(doctor.check_device)}
    assert found == ({"cuda:0"} if usable else {"cpu"})
    assert Demo(Path("unused"), None, 0).device == best_device() == ("cuda" if usable else "cpu")
    if usable:
        check_device("cuda", 1)
        with pytest.raises(PlanError, match="there are 1 usable GPUs. Give -num_gpus 1"):
            check_device("cuda", 4)
    else:
        with pytest.raises(PlanError, match="Use -device cpu"):
            check_device("cuda", 1)


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "slow"),
    [
        ("2.8.0+cu128", 91000, []),
        ("2.9.0+cu128", 91002, ["torch", "cuDNN"]),
        ("2.9.0", 91600, ["torch"]),
        ("2.9.1", 91400, ["torch", "cuDNN"]),
        ("2.9.1", 91500, []),
        ("2.10.0a0+git1", 91400, ["cuDNN"]),
        ("2.14.1+cu130", 92000, []),
    ],
)
def test_versions_with_slow_convolutions_are_named(torch_version: str, cudnn: int, slow: list[str]) -> None:
    found = list(doctor.slow_convolutions(torch_version, cudnn))
    assert [finding.what for finding in found] == slow
    assert all(finding.status == "warn" and "nvidia-cudnn" in finding.remedy for finding in found)


def test_warnings_alone_are_not_wrong(capsys: pytest.CaptureFixture) -> None:
    assert doctor.report((("Section", (lambda: iter([Finding("warn", "a", "b", "c")]),)),)) == 0


def test_a_missing_requirement_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHOWN_PACKAGES", ("no-such-distribution",))
    monkeypatch.setattr(doctor, "_required_versions", lambda: {"no-such-distribution": ">=2"})
    finding = only(doctor.run_check(doctor.check_required_packages), "no-such-distribution")
    assert (finding.status, finding.remedy) == ("FAIL", "pip install 'no-such-distribution>=2'")


def test_a_requirement_of_the_wrong_version_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_required_versions", lambda: {"torch": ">=99"})
    finding = only(doctor.run_check(doctor.check_required_packages), "torch")
    assert (finding.status, finding.remedy) == ("FAIL", "pip install 'torch>=99'")


def test_it_shows_where_each_trainer_comes_from(plugin: None) -> None:
    found = {finding.what: finding.detail for finding in doctor.run_check(doctor.check_trainers)}
    trainers = doctor.PACKAGE / "trainers"
    assert found == {
        "MisFMTrainer": str(trainers / "misfm_trainer.py"),
        "PretrainingTrainer": str(trainers / "pretraining_trainer.py"),
        "VolumeFusionTrainer": str(trainers / "volume_fusion_trainer.py"),
    }


def test_a_trainer_of_the_users_own_with_the_same_name_is_pointed_out(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "my_trainers.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class MisFMTrainer(nnUNetTrainer):\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(doctor.PLUGIN_FOLDER)]))
    finding = only(doctor.run_check(doctor.check_trainers), "MisFMTrainer")
    assert (finding.status, str(tmp_path / "my_trainers.py") in finding.detail) == ("warn", True)


def test_a_trainer_of_the_users_own_that_cannot_be_imported_is_named(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "my_broken_trainers.py").write_text("import no_such_module_of_mine\n", encoding="utf-8")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(doctor.PLUGIN_FOLDER)]))
    finding = only(doctor.run_check(doctor.check_trainers), "MisFMTrainer")
    assert (finding.status, "no_such_module_of_mine" in finding.detail) == ("FAIL", True)


def test_an_entry_of_the_search_path_that_is_no_folder_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/no/such/folder", str(doctor.PLUGIN_FOLDER)]))
    assert [finding.status for finding in doctor.run_check(doctor.check_search_path)] == ["warn", "ok"]


def test_the_off_switch_is_named_when_it_is_why_trainers_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.setenv("nnUNet_misfm_off", "1")
    (finding,) = doctor.run_check(doctor.check_search_path)
    assert (finding.status, finding.remedy) == ("FAIL", "unset nnUNet_misfm_off")


def test_checkpoints_and_published_weights_can_be_read() -> None:
    findings = doctor.run_check(doctor.check_checkpoint_files)
    assert [(finding.what, finding.status) for finding in findings] == [
        ("own checkpoints", "ok"),
        ("nnU-Net's checkpoints", "ok"),
        ("published weights", "ok"),
    ]


def test_without_any_requirement_it_still_reports(tmp_path: Path) -> None:
    done = run_doctor(Environment(tmp_path / "environment").python, PYTHONPATH=SOURCE)
    assert (done.returncode, done.stderr) == (1, "")
    assert "pip install 'nnunetv2" in done.stdout


def test_from_pythonpath_it_gives_the_command_that_mends_the_search_path(tmp_path: Path) -> None:
    python = Environment(tmp_path / "environment").python
    wrong = run_doctor(python, PYTHONPATH=SOURCE, nnUNet_extTrainer="/tmp").stdout
    (remedy,) = [line.strip() for line in wrong.splitlines() if "-> export nnUNet_extTrainer=" in line]
    value = shlex.split(remedy)[-1].partition("=")[2]
    mended = run_doctor(python, PYTHONPATH=SOURCE, nnUNet_extTrainer=value).stdout
    assert value == os.pathsep.join(["/tmp", str(REPOSITORY / "nnunetv2_misfm" / "nnunet_plugin")])
    assert "(PYTHONPATH, a copied folder)" in wrong and "does not hold the trainers" not in mended


def test_pip_target_is_recognised_as_read_without_start_up_files(tmp_path: Path) -> None:
    wheel = build_wheel(copy_source(tmp_path / "source"), tmp_path / "wheel")
    environment = Environment(tmp_path / "environment")
    environment.pip("install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "target", wheel)
    printed = run_doctor(environment.python, PYTHONPATH=str(tmp_path / "target")).stdout
    assert f"Python reads no start-up files from {(tmp_path / 'target').resolve()}" in printed


def test_a_reader_that_goes_away_causes_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from nnunetv2_misfm.commands.doctor import main; main([])"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": SOURCE},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert "Traceback" not in process.communicate(timeout=300)[1]
