"""What nnU-Net v1 keeps beside its checkpoints: the plans, as a pickle, read without running code from it.

Names and meaning of the entries: nnunet/experiment_planning/experiment_planner_baseline_3DUNet.py and, for the file
beside a checkpoint, nnunet/training/network_training/nnUNetTrainer.py.
"""

from __future__ import annotations

import codecs
import collections
import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from nnunetv2_misfm.checkpoints.checkpoint import name_in_archive, plain
from nnunetv2_misfm.errors import first_line
from nnunetv2_misfm.plans.checks import INTENSITIES
from nnunetv2_misfm.plans.normalisation import CT

_SCHEMES = {"CT": CT, "nonCT": "ZScoreNormalization", "noNorm": "NoNormalization"}
_INTENSITIES = {"mean": "mean", "sd": "std", "median": "median", "mn": "min", "mx": "max"} | {
    name: name for name in ("percentile_00_5", "percentile_99_5")
}
_CONFIGURATION = "3d_fullres"
# All that a pickle may ask for. None of these has attributes that a pickle could set.
_CONTAINERS: dict[tuple[str, str], Any] = {
    ("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, int, float, str)
}
_ALLOWED = _CONTAINERS | {("collections", "OrderedDict"): collections.OrderedDict}
_ALLOWED |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): codecs.encode}
_ALLOWED |= {
    (f"numpy.{core}.multiarray", name): made.__reduce__()[0]
    for core in ("core", "_core")  # before numpy 2, and since
    for name, made in (("_reconstruct", np.zeros(1)), ("scalar", np.float64(0)))
}
_AnyPath = TypeVar("_AnyPath", bound=PurePath)


def init_args_beside(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What v1's files beside a checkpoint tell, in the words of nnU-Net v2's `init_args`.

    Args:
        path: of the checkpoint, or of an archive with checkpoints such as those of v1's model zoo.

    Returns:
        Plans, configuration and dataset.json with what is known of them, or None; then also why.
    """
    found = _pickle_beside(path)
    if found is None:
        return None, (
            f"{path.name}.pkl, where nnU-Net v1 keeps spacing and normalisation, is not beside it: they are not known."
        )
    name, pickled = found
    try:
        return _init_args(plain(_PlainUnpickler(io.BytesIO(pickled)).load()), name), ""
    except Exception as error:  # whatever a foreign file makes the unpickler, or the reading of its plans, stumble over
        return (
            None,
            f"{PurePath(name).name} was not read ({first_line(error)}): spacing and normalisation of its images are "
            f"not known.",
        )


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds more than plain data: it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _pickle_beside(path: Path) -> tuple[str, bytes] | None:
    """The pickle that belongs to a checkpoint, with its name."""
    inside = name_in_archive(path)
    if inside is None:
        there = next((file for file in _candidates(path) if file.is_file()), None)
        return None if there is None else (str(there), there.read_bytes())
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        member = next((str(file) for file in _candidates(PurePosixPath(inside)) if str(file) in names), None)
        return None if member is None else (f"{path}: {member}", archive.read(member))


def _candidates(checkpoint: _AnyPath) -> Iterator[_AnyPath]:
    yield checkpoint.with_name(f"{checkpoint.name}.pkl")
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # of the fold, and of all folds
        yield folder / "plans.pkl"


def _init_args(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    plans = content.get("plans", content)
    stages = plans["plans_per_stage"]
    trained = content.get("init", ())[5:6]
    stage = trained[0] if trained and trained[0] in stages else min(stages) if "3d_lowres" in name else max(stages)
    channels = sorted(plans["normalization_schemes"])
    masks = plans.get("use_mask_for_norm") or {}
    properties = plans["dataset_properties"].get("intensityproperties") or {}
    modalities = plans.get("modalities") or {}
    configuration = {
        "spacing": [float(mm) for mm in stages[stage]["current_spacing"]],
        "patch_size": [int(n) for n in stages[stage]["patch_size"]],
        "normalization_schemes": [_scheme(plans["normalization_schemes"][channel]) for channel in channels],
        "use_mask_for_norm": [bool(masks.get(channel, False)) for channel in channels],
        "architecture": {"arch_kwargs": {}},  # the weights tell it
    }
    windows = {
        str(channel): {new: properties[channel][old] for old, new in _INTENSITIES.items() if old in properties[channel]}
        for channel in channels
        if properties.get(channel)
    }
    return {
        "plans": {
            "dataset_name": re.split(r"[/\\]", str(plans["preprocessed_data_folder"]).rstrip("/\\"))[-1],
            "transpose_forward": list(plans.get("transpose_forward") or [0, 1, 2]),
            "image_reader_writer": "SimpleITKIO",
            INTENSITIES: windows,
            "configurations": {_CONFIGURATION: configuration},
        },
        "configuration": _CONFIGURATION,
        "dataset_json": {"channel_names": {str(i): modalities[i] for i in channels if i in modalities}},
    }


def _scheme(of_v1: str) -> str:
    return _SCHEMES.get(of_v1, f"{of_v1} of nnU-Net v1")
