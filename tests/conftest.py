"""What every test relies on: no test sees the folders, data or display of the person who runs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]

for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "nnUNet_misfm_off"):
    os.environ.pop(variable, None)
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # tests that run side by side must not take each other's cores
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("the same examples every time", derandomize=True, deadline=None)
settings.load_profile("the same examples every time")


@pytest.fixture(autouse=True)
def environment_is_restored() -> Iterator[None]:
    """What commands set for their own process must not reach the next test or its child processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def gpu_device() -> torch.device:
    """A GPU, for tests marked `gpu`; MISFM_TEST_DEVICE=cpu takes the CPU in its place, to try the tests themselves."""
    import torch  # which takes seconds

    device = torch.device(os.environ.get("MISFM_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no usable GPU here")
    return device


@pytest.fixture(scope="session")
def real_data_folder() -> Path:
    """Real images, for tests marked `real_data`: the folder MISFM_REAL_DATA, or ../shared/data beside the clone."""
    folder = Path(os.environ.get("MISFM_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: set MISFM_REAL_DATA to a folder of images ({folder} does not exist)")
    return folder


@pytest.fixture(scope="session")
def dataset_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled dataset in nnU-Net's folders, made once."""
    from nnunet_dataset import make_dataset  # imports nnU-Net, which most tests do without

    root = tmp_path_factory.mktemp("nnunet")
    make_dataset(root)
    return root


@pytest.fixture
def nnunet(dataset_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nnU-Net's three folders, which the environment names; loading runs in this process."""
    from nnunet_dataset import use_folders

    root = tmp_path / "nnunet"
    shutil.copytree(dataset_template, root)
    use_folders(root, monkeypatch)
    return root


@pytest.fixture
def progress_plot(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of nnU-Net's progress.png, which `use_folders` leaves out: it takes a third of a run of seconds."""
    from nnunet_dataset import PLOT_PROGRESS, LocalLogger

    monkeypatch.setattr(LocalLogger, "plot_progress_png", PLOT_PROGRESS)
