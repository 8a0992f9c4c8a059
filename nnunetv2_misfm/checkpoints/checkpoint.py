"""The checkpoint file: nnU-Net's own keys as plain data, plus one block that says what the file is.

This is the only place that knows the keys. A file written here holds tensors, numbers, strings, lists and dicts, so it
is read with `weights_only=True` and runs nobody's code; nnU-Net's own tools (prediction, export, `-pretrained_weights`)
read it as one of theirs.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import pickle
import re
import shutil
import zipfile
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_misfm.errors import UserError, first_line
from nnunetv2_misfm.files import written_whole
from nnunetv2_misfm.plans.checks import INTENSITIES
from nnunetv2_misfm.plans.files import FINAL
from nnunetv2_misfm.units import format_bytes

FORMAT_VERSION = 1
DESCRIPTION = "misfm"
"""Beside the weights of a checkpoint of ours: a `CheckpointInfo`."""
WEIGHTS = "network_weights"
PUBLISHED_WEIGHTS = "model_state_dict"
LEARNT = "learnt"
"""In the description of the training: how well the network did its pretext task when it was saved, in words."""
TRAINED_PARTS = "trained_parts"
"""Beside the weights: the parts of the network that learnt in pretraining; all of them where it is missing."""
CHANNEL_NAMES = "misfm_channel_names"
"""Beside exported weights: the names of the image channels, which nnU-Net's checkpoints keep in `init_args`."""
_READ_BY_TORCH = (".pth", ".pt", ".model", ".ckpt")
CHECKPOINT_ENDINGS = (".safetensors", *_READ_BY_TORCH)
_CONFIGURATIONS = ("3d_fullres", "3d_cascade_fullres", "3d_lowres", "2d")  # of nnU-Net, the most useful first
# Python 3.13 names their module otherwise, and no path of another system can be made.
_PATHS = tuple(
    (getattr(pathlib, f"Pure{kind}"), f"{module}.{pure}{kind}")
    for kind in ("PosixPath", "WindowsPath")
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
)
_OF_PLANS = ("dataset_name", "transpose_forward", "image_reader_writer", INTENSITIES)
_OF_CONFIGURATION = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
_RECORDED_PACKAGES = ("nnunetv2_misfm", "nnunetv2", "torch", "dynamic-network-architectures", "batchgeneratorsv2")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read or is not what was asked for; the message names the file and the remedy."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint of ours says about itself.

    Attributes:
        task: the name of a pretext task, or "segmentation".
        network_class_name, arch_kwargs, input_channels, num_classes: what builds the network.
        preprocessing: spacing, patch size, normalisation and axis order the network was trained with, as in plans.
        training: settings of the run (the plan's `misfm` block), seed and epochs done.
        versions: of the packages that wrote the file.
    """

    task: str
    network_class_name: str
    arch_kwargs: dict[str, Any]
    input_channels: int
    num_classes: int
    preprocessing: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)


_INFO_TYPES: dict[str, type] = {
    "task": str,
    "network_class_name": str,
    "arch_kwargs": dict,
    "input_channels": int,
    "num_classes": int,
    "preprocessing": dict,
    "training": dict,
    "versions": dict,
}


def installed_versions() -> dict[str, str]:
    """Versions of the packages a checkpoint depends on; packages run from a source tree are left out."""
    found = {}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def preprocessing_of(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plan that decides what a network's input looks like, as far as the plan has it."""
    found = {key: plans[key] for key in _OF_PLANS if plans.get(key) is not None}
    return found | {key: configuration[key] for key in _OF_CONFIGURATION if configuration.get(key) is not None}


def write_checkpoint(
    checkpoint: Mapping[str, Any], info: CheckpointInfo, path: str | os.PathLike[str], *, keep_as: str | None = None
) -> None:
    """Write nnU-Net's checkpoint keys with our block beside them; the file appears under its name only when complete.

    Args:
        checkpoint: what `nnUNetTrainer.save_checkpoint` collects. Numpy values and devices become plain ones.
        info: the block.
        path: the file; one that already exists stays as it is until the new one is complete.
        keep_as: name under which the one that already exists is kept beside the new one.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full.
    """
    content = plain({**checkpoint, DESCRIPTION: {"format_version": FORMAT_VERSION, **asdict(info)}})
    try:
        with written_whole(path) as temporary:
            torch.save(content, temporary)
            if keep_as is not None and Path(path).is_file():
                with written_whole(Path(path).with_name(keep_as)) as kept:
                    shutil.copyfile(path, kept)
    except (OSError, RuntimeError) as error:  # PyTorch's writer says RuntimeError when the disk is full
        raise not_written(path, error) from error


def not_written(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """The error for a file that could not be written, mostly because the disk is full."""
    free = format_bytes(shutil.disk_usage(Path(path).parent).free)
    reason = error.strerror if isinstance(error, OSError) else first_line(error)
    return CheckpointError(
        f"{path} could not be written ({reason}); {free} are free there. What was there before is "
        f"intact. Make room or check the folder's permissions, and run the command again (with --c to continue a run)."
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of PyTorch's, whoever wrote it, on the CPU, without running code from it.

    In a zip archive, such as nnU-Net's exported models, one of its checkpoints is read (see `name_in_archive`).

    Raises:
        CheckpointError: if the file is missing, unreadable, or holds anything but plain data.
    """
    path = Path(path)
    _check_kind_of_file(path)
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            content = torch.load(_opened(path), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than plain data and was not loaded, because loading it could run code from the file "
            f"({_refused(error)}). If you trust its author, load it once with the project that wrote it, save its "
            f"weights alone with torch.save, and give that file (docs/ready_weights.md has the lines)."
        ) from None
    except Exception as error:  # whatever damaged bytes make the unpickler stumble over
        raise CheckpointError(
            f"{path} is not a readable checkpoint; it may be truncated or of another format "
            f"({first_line(error).partition('. ')[0]}). Copy or download it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint. Give a checkpoint file.")
    return content


def _check_kind_of_file(path: Path) -> None:
    """Raise a CheckpointError for what the start of a file shows to be no checkpoint."""
    if path.is_dir():
        there = sorted(file for ending in CHECKPOINT_ENDINGS for file in path.rglob(f"*{ending}"))
        example = f", such as {min(there, key=lambda file: _preference(str(file)))}" if there else ""
        raise CheckpointError(f"{path} is a folder, not a file. Give the path of a checkpoint{example}.")
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist or is not a file. Give the path of a checkpoint (.pth, .pt or .safetensors)."
        )
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith((b"PK", b"\x80")):  # PyTorch's zip files, and the pickles of PyTorch before 1.6
        return
    if start.startswith(b"version https://git-lfs"):
        what = "a pointer of Git LFS that stands for it: run git lfs pull where it lies"
    elif start.lstrip().startswith(b"<"):
        what = "a web page. Download the file itself, with a browser if need be"
    else:
        what = "empty or a file of another kind"
    raise CheckpointError(f"{path} is not a readable checkpoint; it is {what}.")


def _check_sums(path: Path) -> None:
    """Raise a CheckpointError if the parts of a zip file do not have its checksums, which PyTorch does not look at."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                # Files can be written without; those have zeros.
                if part.CRC:
                    with archive.open(part) as content:
                        while content.read(1 << 20):
                            pass
    except Exception as error:  # whatever damaged bytes make the reading of the archive stumble over
        raise CheckpointError(f"{path} is damaged ({first_line(error)}). Copy or download it again.") from None


def _opened(path: Path) -> Path | IO[bytes]:
    inside = name_in_archive(path)
    if inside is None:
        return path
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(inside))


def name_in_archive(path: Path) -> str | None:
    """Which of the files in an archive of others is the checkpoint to read; None for a file of PyTorch's itself.

    That is the final one of the first fold, of nnU-Net's full resolution if there are several configurations.

    Raises:
        CheckpointError: if there is none.
    """
    names = checkpoints_in_archive(path)
    if names is None:
        return None
    if not names:
        raise CheckpointError(f"{path} is an archive without a checkpoint (.pth, .pt or .model) in it.")
    return names[0]


def checkpoints_in_archive(path: Path) -> list[str] | None:
    """The checkpoints among the files of an archive, the one to read first; None for a file of PyTorch's itself.

    Raises:
        CheckpointError: for TorchScript, an archive of code.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/code/__torch__.py") or "/code/__torch__/" in name for name in names):
        raise CheckpointError(
            f"{path} is a network as TorchScript, which holds code. If you trust its author, save its weights alone: "
            f"torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pth')."
        )
    if any(Path(name).name == "data.pkl" for name in names):
        return None
    named = (name for name in names if name.endswith(_READ_BY_TORCH) and not Path(name).name.startswith("."))
    return sorted(named, key=_preference)


def _preference(name: str) -> tuple[bool, int, str]:
    """Sorts the checkpoints of trained models: the final ones by configuration and fold, then the others."""
    is_final = Path(name).name in (FINAL, "model_final_checkpoint.model")
    parts = re.split("/|__", name)
    configuration = next((i for i, known in enumerate(_CONFIGURATIONS) if known in parts), 0)
    return not is_final, configuration, name


def checkpoint_info(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> CheckpointInfo | None:
    """The block of a checkpoint of ours; None for a checkpoint of nnU-Net or a published file.

    Raises:
        CheckpointError: if the block was written by a newer version or is damaged.
    """
    block = checkpoint.get(DESCRIPTION)
    if block is None:
        return None
    if not isinstance(block, dict) or block.get("format_version") != FORMAT_VERSION:
        version = block.get("format_version") if isinstance(block, dict) else block
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}; this version reads format {FORMAT_VERSION}. "
            f"Update nnunetv2_misfm."
        )
    values = {key: value for key, value in block.items() if key != "format_version"}
    try:
        info = CheckpointInfo(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} has a damaged description ({error}). Write the checkpoint again.") from None
    for name, kind in _INFO_TYPES.items():
        if not isinstance(getattr(info, name), kind):
            raise CheckpointError(f"{path} has a damaged description ({name}). Write the checkpoint again.")
    return info


def network_weights(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a checkpoint of ours or of nnU-Net, without the prefixes of wrappers.

    Raises:
        CheckpointError: if there is none.
    """
    weights = checkpoint.get(WEIGHTS)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        found = ", ".join(map(str, checkpoint)) or "nothing"
        raise CheckpointError(f"{path} has no '{WEIGHTS}' (it holds: {found}). Give a checkpoint of ours or nnU-Net's.")
    return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in weights.items()}


def plain(value: Any) -> Any:
    """The same data in types that `weights_only=True` reads: numpy numbers become Python's, tensors go to the CPU.

    A tensor with several names, as nnU-Net's U-Nets have (the decoder holds the encoder too), stays one tensor: copied
    from a GPU once for each name it would be stored as often.
    """
    return _plain(value, {})


def _plain(value: Any, copies: dict[Hashable, Tensor]) -> Any:
    if isinstance(value, Tensor):
        where = (value.device, value.untyped_storage().data_ptr(), value.storage_offset())
        key = (*where, value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.detach().cpu()
        return copies[key]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key, copies): _plain(entry, copies) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, copies) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)  # torch.device, paths


def _refused(error: pickle.UnpicklingError) -> str:
    """What of a file PyTorch refused, without its advice to load it all the same."""
    asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked_for is not None:
        return f"it asks for {asked_for[1]}"
    return first_line(type(error)(re.sub(r"\AWeights only load.*", "", str(error))))


def _plain_classes() -> list[Any]:
    """Classes that only hold values, which foreign files keep beside their weights; nothing else is let through."""
    # The functions' module was renamed in numpy 2; files name it as the numpy that wrote them did.
    named: list[Any] = [
        (made.__reduce__()[0], f"numpy.{module}.multiarray.{name}")
        for module in ("core", "_core")
        for name, made in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(1)))
    ]
    numbers = ("float64", "float32", "float16", "int64", "int32", "int16", "uint8", "bool")
    dtypes = {type(np.dtype(name)) for name in numbers}
    return [*named, np.ndarray, np.dtype, *dtypes, argparse.Namespace, *_PATHS]
