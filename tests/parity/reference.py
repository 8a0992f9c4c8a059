"""The numerical reference: recorded outputs and gradient norms of the published networks.

The recordings are not part of the repository. They are looked for in MISFM_REFERENCE or ../shared/reference.
"""

from __future__ import annotations

import json
import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def reference_folder() -> Path:
    folder = Path(os.environ.get("MISFM_REFERENCE") or REPOSITORY.parent / "shared" / "reference")
    if not folder.is_dir():
        pytest.skip(f"no numerical reference: set MISFM_REFERENCE ({folder} does not exist)")
    return folder


def load(name: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The description of a recording and its outputs, finest first."""
    folder = reference_folder()
    description = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"{name}.npz") as arrays:
        return description, [torch.from_numpy(arrays[f"out{i}"]) for i in range(4)]


def recorded_weights(description: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights a recording was made with; the reference comes with the code that makes them from each key."""
    shapes = description["state_dict"]
    integers = {k: torch.zeros(shape, dtype=torch.int64) for k, (shape, dtype) in shapes.items() if dtype == "int64"}
    return _recipe().fill_state_dict(shapes, integers)


def recorded_noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """The input (seed 0), or what output i was multiplied with (seed 100 + i)."""
    return torch.from_numpy(_recipe().fill_input(shape, seed))


def _recipe() -> ModuleType:
    spec = spec_from_file_location("fill_weights", reference_folder() / "fill_weights.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
