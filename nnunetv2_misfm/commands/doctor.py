"""`misfm_doctor`: is this installation ready, and if not, what is wrong and what mends it?

Each check returns findings and may raise; what it raises becomes a finding too, so one broken part hides no other.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import platform
import shlex
import shutil
import site
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import nnunetv2_misfm
from nnunetv2_misfm.commands.devices import best_device, usable_gpus
from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.environment import without_quotes
from nnunetv2_misfm.errors import exit_with_message, first_line
from nnunetv2_misfm.start_up import OFF_SWITCH, SEARCH_PATH, is_switched_off
from nnunetv2_misfm.units import format_bytes

PACKAGE = Path(nnunetv2_misfm.__file__).resolve().parent
PLUGIN_FOLDER = PACKAGE / "nnunet_plugin"
START_UP_FILE = "nnunetv2_misfm.pth"
TRAINERS = ("MisFMTrainer", "PretrainingTrainer", "VolumeFusionTrainer")
SHOWN_PACKAGES = (
    "nnunetv2",
    "torch",
    "dynamic-network-architectures",
    "batchgenerators",
    "batchgeneratorsv2",
    "blosc2",
    "SimpleITK",
)
LITTLE_SPACE = 5 * 10**9  # bytes
_READ_ONLY = {
    "nnUNet_raw": "it can stay so; to make datasets in it, change its permissions",
    "nnUNet_preprocessed": "to train on splits that are there it can stay so; to plan, change its permissions",
}
REINSTALL = "install nnunetv2_misfm again"

NOTES = f"""\
nnU-Net finds the trainers because a start-up file ({START_UP_FILE}) in site-packages appends one folder to
{SEARCH_PATH} whenever Python starts; folders of your own come first. Python reads no such file from PYTHONPATH, from
`pip install --target`, from a folder that was merely copied, or under `python -S`: there, set the variable by hand, as
this command then says. {OFF_SWITCH}=1 switches the start-up file off.

The exit status is 0 if nothing is wrong (warnings may be shown), else 1."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do unless the status is ok."""

    status: Literal["ok", "warn", "FAIL"]
    what: str
    detail: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]

_CUDNN_WITHOUT_TF32, _FAST_CUDNN = 91002, 91500


def check_python() -> Iterator[Finding]:
    detail = f"{platform.python_version()}  {sys.executable}"
    required = _own_metadata("Requires-Python")
    if required and not _satisfies(platform.python_version(), required):
        yield Finding("FAIL", "python", detail, f"use a Python that satisfies {required}")
    else:
        yield Finding("ok", "python", detail)


def check_own_version() -> Iterator[Finding]:
    imported, installed = nnunetv2_misfm.__version__, _own_metadata("Version")
    detail = f"{imported}  {PACKAGE}"
    if installed not in (imported, None):
        remedy = f"version {installed} is installed, but another copy is imported: install again, or clear PYTHONPATH"
        yield Finding("warn", "nnunetv2_misfm", detail, remedy)
    else:
        yield Finding("ok", "nnunetv2_misfm", detail)


def check_required_packages() -> Iterator[Finding]:
    specifiers = _required_versions()
    for name in dict.fromkeys([*SHOWN_PACKAGES, *specifiers, "packaging"]):
        required = specifiers.get(name, "")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("FAIL", name, "not installed", f"pip install '{name}{required}'")
            continue
        if required and not _satisfies(version, required):
            yield Finding("FAIL", name, f"{version}, but {required} is needed", f"pip install '{name}{required}'")
        elif name in SHOWN_PACKAGES:
            yield Finding("ok", name, version)


def check_device() -> Iterator[Finding]:
    import torch

    gpus = usable_gpus()
    for index in range(gpus):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GB")
    if gpus:
        yield from slow_convolutions(torch.__version__, torch.backends.cudnn.version() or 0)
    if best_device() == "cpu":
        reason = "no usable GPU" if torch.version.cuda else "this PyTorch is built without CUDA"
        yield Finding(
            "warn",
            "cpu",
            f"{torch.get_num_threads()} threads; {reason}",
            "misfm_demo and misfm_compare use the CPU by themselves; misfm_pretrain and nnU-Net's commands need "
            "`-device cpu`. Training is slow on it: if there is a GPU, install its driver and a PyTorch built for it",
        )


def slow_convolutions(torch_version: str, cudnn: int) -> Iterator[Finding]:
    """What of these versions makes 3D convolutions slow on GPUs (PyTorch's #163539, #166122, #166480 and #167024).

    Args:
        torch_version: such as "2.9.0+cu128".
        cudnn: as PyTorch counts it, 91002 for 9.10.2.
    """
    newer = "a newer cuDNN: pip install 'nvidia-cudnn-cu12>=9.15' (cu13 where PyTorch is built for CUDA 13)"
    if _satisfies(torch_version, "==2.9.0" if cudnn >= _FAST_CUDNN else "==2.9.*"):
        detail = f"{torch_version} with cuDNN {cudnn} computes 3D convolutions in half precision about 4 times slower"
        yield Finding("warn", "torch", detail, f"another release of PyTorch; from 2.9.1 on, {newer}")
    if _CUDNN_WITHOUT_TF32 <= cudnn < _FAST_CUDNN:
        detail = f"{cudnn} computes 3D convolutions in float32 without TF32; mixed precision is as fast as ever"
        yield Finding("warn", "cuDNN", detail, newer)


def check_folders() -> Iterator[Finding]:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        yield _check_folder(variable)


def _check_folder(variable: str) -> Finding:
    value = os.environ.get(variable)
    if not value:
        return Finding("FAIL", variable, "not set", _set_variable(variable, f"/path/to/{variable}"))
    folder = Path(value)
    if (meant := without_quotes(value)) != value:
        detail = f"{value} has quotes in it, which are taken for a part of the folder's name"
        return Finding("FAIL", variable, detail, _set_variable(variable, meant))
    if not folder.is_dir():
        return Finding("FAIL", variable, f"{folder} is not a folder", f"mkdir -p {shlex.quote(str(folder))}")
    free = shutil.disk_usage(folder).free
    detail = f"{folder}  {format_bytes(free)} free"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        # Data on a read-only share is common: training only reads what was preprocessed.
        detail = f"{folder} cannot be written to ({error.strerror})"
        if variable == "nnUNet_results":
            return Finding("FAIL", variable, detail, "change its permissions")
        return Finding("warn", variable, detail, _READ_ONLY[variable])
    if free < LITTLE_SPACE:
        return Finding("warn", variable, detail, f"free some space: less than {format_bytes(LITTLE_SPACE)} are left")
    return Finding("ok", variable, detail)


def check_search_path() -> Iterator[Finding]:
    entries = [entry for entry in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if entry.strip()]
    ours = [entry for entry in entries if _is_plugin_folder(Path(entry))]
    for entry in entries:
        if not Path(entry).is_dir():
            remedy = f"nnU-Net skips it: remove it from {SEARCH_PATH}, or create it"
            yield Finding("warn", SEARCH_PATH, f"{entry} is not a folder", remedy)
        elif entry not in ours:
            yield Finding("ok", SEARCH_PATH, f"{entry}  (your own)")
    if ours:
        yield Finding("ok", SEARCH_PATH, ours[0])
        return
    remedy = _set_variable(SEARCH_PATH, os.pathsep.join([*entries, str(PLUGIN_FOLDER)]))
    if is_switched_off():
        remedy = f"unset {OFF_SWITCH}"
    yield Finding("FAIL", SEARCH_PATH, f"does not hold the trainers: {_why_not_started_up()}", remedy)


def _is_plugin_folder(folder: Path) -> bool:
    return any((folder / shim.name).is_file() for shim in PLUGIN_FOLDER.glob("*.py"))


def _why_not_started_up() -> str:
    """Why the start-up file did not put the folder on the search path of this very process."""
    if is_switched_off():
        return f"{OFF_SWITCH}={os.environ[OFF_SWITCH]}"
    if sys.flags.no_site:
        return "Python was started with -S, which reads no start-up files"
    site_folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if any(Path(folder, START_UP_FILE).is_file() for folder in site_folders):
        return "the variable was changed after Python had started"
    if (PACKAGE.parent / START_UP_FILE).is_file():
        return f"Python reads no start-up files from {PACKAGE.parent} (`pip install --target`, PYTHONPATH)"
    return f"the package in {PACKAGE.parent} was not installed by pip (PYTHONPATH, a copied folder)"


def check_trainers() -> Iterator[Finding]:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for trainer in TRAINERS:
        try:
            file = _file_of(recursive_find_trainer_class_by_name(trainer))
        except (Exception, SystemExit) as error:
            # The search imports every module in the user's own folders first: what those raise is no fault of ours.
            yield Finding(
                "FAIL",
                trainer,
                f"{type(error).__name__}: {first_line(error)}",
                f"see {SEARCH_PATH} above, and any error of your own trainers",
            )
            continue
        if file.is_relative_to(PACKAGE):
            yield Finding("ok", trainer, str(file))
        else:
            remedy = f"a class of this name comes first; to use the one of this package, change {SEARCH_PATH}"
            yield Finding("warn", trainer, f"{file}  (not of this package)", remedy)


def _file_of(trainer: type) -> Path:
    """Where a class is defined; nnU-Net has already forgotten the modules it found in the user's own folders."""
    if trainer.__module__ in sys.modules:
        return Path(inspect.getfile(trainer)).resolve()
    module = Path(*trainer.__module__.split(".")).with_suffix(".py")
    entries = os.environ.get(SEARCH_PATH, "").split(os.pathsep)
    return next((Path(entry, module).resolve() for entry in entries if Path(entry, module).is_file()), module)


def check_checkpoint_files() -> Iterator[Finding]:
    """Write and read a checkpoint of ours, and read those of nnU-Net and of MIS-FM, numpy numbers included."""
    import numpy as np
    import torch

    from nnunetv2_misfm.checkpoints.checkpoint import (
        PUBLISHED_WEIGHTS,
        WEIGHTS,
        CheckpointInfo,
        read_checkpoint,
        write_checkpoint,
    )

    weights = {"layer.weight": torch.arange(6.0).reshape(2, 3)}
    content = {WEIGHTS: weights, "logging": {"mean_fg_dice": [np.float64(0.5)]}, "_best_ema": np.float32(0.5)}
    info = CheckpointInfo("segmentation", "network", {}, 1, 2, {}, {})
    with tempfile.TemporaryDirectory() as folder:
        ours, stock, published = Path(folder, "ours.pth"), Path(folder, "stock.pth"), Path(folder, "published.pt")
        write_checkpoint(content, info, ours)
        torch.save(content, stock)
        torch.save({"iteration": 1, "valid_pred": np.float64(0.5), PUBLISHED_WEIGHTS: weights}, published)
        for what, file, key, can in (
            ("own checkpoints", ours, WEIGHTS, "can be written and read"),
            ("nnU-Net's checkpoints", stock, WEIGHTS, "can be read"),
            ("published weights", published, PUBLISHED_WEIGHTS, "can be read"),
        ):
            if torch.equal(read_checkpoint(file)[key]["layer.weight"], weights["layer.weight"]):
                yield Finding("ok", what, can)
            else:
                yield Finding("FAIL", what, "other values are read than were written", REINSTALL)


SECTIONS: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("Versions", (check_python, check_own_version, check_required_packages)),
    ("Device", (check_device,)),
    ("nnU-Net's folders", (check_folders,)),
    ("Trainers", (check_search_path, check_trainers)),
    ("Weights", (check_checkpoint_files,)),
)


def run_check(check: Check) -> list[Finding]:
    """The findings of a check; one more if it broke down, and nothing of what it printed or warned about."""
    findings: list[Finding] = []
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            findings.extend(check())
        except (Exception, SystemExit) as error:
            what = check.__name__.removeprefix("check_").replace("_", " ")
            remedy = f"mend what is listed above; if all is in order there, {REINSTALL}"
            said = f"{type(error).__name__}: {first_line(error)}"
            findings.append(Finding("FAIL", what, said, remedy))
    return findings


def report(sections: tuple[tuple[str, tuple[Check, ...]], ...] = SECTIONS) -> int:
    """Print the findings of all checks, section by section, and return the exit status."""
    findings: list[Finding] = []
    for title, checks in sections:
        section = [finding for check in checks for finding in run_check(check)]
        width = max((len(finding.what) for finding in section), default=0)
        print(f"{title}")
        for finding in section:
            print(f"  {finding.status:<4}  {finding.what:<{width}}  {finding.detail}")
            if finding.remedy:
                print(f"        -> {finding.remedy}")
        print(flush=True)
        findings += section
    problems = sum(finding.status == "FAIL" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    print(f"{problems} wrong, {warned} to look at." if problems or warned else "Everything is in order.")
    return 1 if problems else 0


def main(arguments: list[str] | None = None) -> None:
    """The command `misfm_doctor`; the program ends with the status of the report."""
    parser = CommandParser(
        "misfm_doctor",
        description="Show what this installation consists of, what is wrong with it, and what mends it.",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    exit_with_message("misfm_doctor", lambda: sys.exit(report()))


def _own_metadata(key: str) -> str | None:
    """A field of the installed distribution; None when the package runs without having been installed."""
    try:
        return metadata.metadata("nnunetv2_misfm")[key]
    except metadata.PackageNotFoundError:
        return None


def _required_versions() -> dict[str, str]:
    """Name to version specifier of what the installed distribution requires; empty without one."""
    try:
        from packaging.requirements import Requirement

        requirements = map(Requirement, metadata.requires("nnunetv2_misfm") or ())
    except (ImportError, metadata.PackageNotFoundError):
        return {}
    return {r.name: str(r.specifier) for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})}


def _satisfies(version: str, specifier: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True  # cannot be judged; check_required_packages reports that packaging is missing
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _set_variable(variable: str, value: str) -> str:
    return f"set {variable}={value}" if os.name == "nt" else f"export {variable}={shlex.quote(value)}"


if __name__ == "__main__":
    main()
