"""What every test relies on: no test sees the folders, data or display of the person who runs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "nnUNet_misfm_off"):
    os.environ.pop(variable, None)
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(scope="session")
def real_data_folder() -> Path:
    """Real images, for tests marked `real_data`: the folder MISFM_REAL_DATA, or ../shared/data beside the clone."""
    folder = Path(os.environ.get("MISFM_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: set MISFM_REAL_DATA to a folder of images ({folder} does not exist)")
    return folder
