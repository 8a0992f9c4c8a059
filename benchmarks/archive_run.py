"""What the measurements of preparing an archive share: nnU-Net's folders, one call of misfm_pretrain, the results."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from provenance import device_name, provenance

from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain

RESULTS = Path(__file__).parent / "results" / "archive.md"
POOL = "Dataset900_Pool"


@contextmanager
def nnunet_folders(work: Path | None) -> Iterator[Path]:
    """A temporary folder, in `work` or the system's, with nnU-Net's three folders, which the environment names."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for part in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (Path(folder) / part).mkdir()
            os.environ[part] = str(Path(folder) / part)
        yield Path(folder)


def measure(work: Path | None, measurement: Callable[[Path], list[str]]) -> None:
    """Measure in nnU-Net folders of its own, and replace the section of that heading in the results."""
    with nnunet_folders(work) as folder:
        lines = measurement(folder)
    words = re.sub(r"(--data|--folder) \S+", r"\1 FOLDER", " ".join(sys.argv[1:]))
    command = f"python benchmarks/{Path(sys.argv[0]).name} {words}".strip()
    lines += ["", *provenance(command, ("nnunetv2", "pydicom", "blosc2"), {}, device_name("cpu"))]
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Preparing an archive in parts\n"
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [section.strip() for section in sections if not section.startswith(lines[0])]
    RESULTS.write_text("\n\n".join([head.strip(), *kept, "\n".join(lines)]) + "\n", encoding="utf-8")
    print("\n".join(lines))


def pretrain(images: Path, *options: str) -> None:
    """Prepare, with nothing said unless it fails."""
    data = ["-i", str(images), "-d", "900", "-n", "Pool", "-np", "1"]
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            misfm_pretrain([*data, "--only_prepare", *options])
    except SystemExit:
        print(said.getvalue())
        raise


def part(number: int, num_parts: int) -> list[str]:
    return ["-num_parts", str(num_parts), "-part_id", str(number)]
