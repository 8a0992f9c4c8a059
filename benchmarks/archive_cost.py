"""What preparing an archive in parts opens and costs, and what of it grows with the archive.

    python benchmarks/archive_cost.py [archive scale] [--series 2000] [--num_parts 100]

archive  All parts in turn on an archive of small DICOM series that is written first; then again, with 1 % new series.
         --quick_headers opens every file and takes its numbers from fixed places instead of having pydicom read it;
         what that costs for each header is known from fewer series.
scale    What grows with the archive, with --scale series: listing the folders (of empty files) and the merge (of
         records that are made up).

Each replaces its section of benchmarks/results/archive.md. The archive of the paper's size: --series 110000,
which takes two hours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pydicom
from archive_run import POOL, measure, part, pretrain
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from nnunetv2_misfm.commands import pretrain_source
from nnunetv2_misfm.files import append_json_lines
from nnunetv2_misfm.pool import headers, prepare
from nnunetv2_misfm.pool.case import PREPARED
from nnunetv2_misfm.pool.dicom_frames import DicomHeader
from nnunetv2_misfm.pool.folder import PoolFolder
from nnunetv2_misfm.pool.inspection import PoolInspection
from nnunetv2_misfm.pool.merge import merge_pool
from nnunetv2_misfm.pool.share import BUNDLES, Share
from nnunetv2_misfm.pool.shared_listing import list_share

SMALL = ("-modality", "ct", "-spacing", "1", "0.8", "0.8", "-min_size", "8", "-patch_size", "16", "16", "16")
"""The volumes' own spacing, so that preparing one takes as little as it can."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["archive", "scale"], help="default: both")
    parser.add_argument("--series", type=int, default=2000)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--scale", type=int, default=10_000)
    parser.add_argument("--num_parts", type=int, default=100)
    parser.add_argument("--quick_headers", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    measurements = {"archive": measure_archive, "scale": measure_scale}
    for name in options.sections:
        measure(options.folder, partial(measurements[name], options))


# ---- archive


class Stopwatch:
    """Adds up the CPU time of calls of a function that it stands in for."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.seconds = 0.0
        self.running = False

    def __call__(self, *arguments: Any) -> Any:
        started, self.running = time.process_time(), True
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.process_time() - started
            self.running = False


class Opened:
    """Counts the files that this process opens for headers and for what the pool keeps beside its arrays."""

    def __init__(self, archive: Path, pool: Path, preparing: Stopwatch):
        self.archive, self.pool, self.preparing = str(archive), str(pool), preparing
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._count)

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if path.startswith(self.archive):
                self.counts["voxels" if self.preparing.running else "headers"] += 1
            elif path.startswith(self.pool) and not path.endswith((".b2nd", ".pkl")):
                self.counts["small"] += 1


def measure_archive(options: argparse.Namespace, folder: Path) -> list[str]:
    archive, pool = folder / "archive", folder / "nnUNet_preprocessed"
    slices = [dicom_template(number) for number in range(options.files)]
    new = max(1, options.series // 100)
    write_series(archive, range(options.series), slices)
    read_dicom_header = QuickHeaders(slices[0], folder) if options.quick_headers else headers.read_dicom_header
    with watched() as watches, patch.object(headers, "read_dicom_header", read_dicom_header):
        opened = Opened(archive, pool, watches["preparing"])
        first = run_parts(archive, options.num_parts, watches, opened)
        num_files = options.series * options.files
        rows = [row("first run", first, options.series, num_files, opened.counts)]
        write_series(archive, range(options.series, options.series + new), slices)
        for name, num_parts in (("again, 1 % new", options.num_parts), ("the same in one part", 1)):
            opened.counts.clear()
            again = run_parts(archive, num_parts, watches, opened)
            share = f"{100 * again['cpu'] / first['cpu']:.1f} % of the first"
            rows.append(row(f"{name} ({share})", again, options.series + new, new * options.files, opened.counts))
            if num_parts > 1:
                write_series(archive, range(options.series + new, options.series + 2 * new), slices)
    merge = merge_in_a_process(folder)
    return [
        "## An archive in parts",
        "",
        f"{options.series:,} DICOM series of {options.files} files (16 x 16 pixels, each file of its own), "
        f"{options.num_parts} parts in turn in one process; CPU time without imports. "
        f"{'Files are opened, but pydicom does not read them. ' if options.quick_headers else ''}"
        "Headers are files of the archive that are opened before voxels are prepared, which opens each once more; "
        "small files are those of the pool's folder but its arrays and their properties. Both are counted for all "
        "parts together and given per new file and per volume of the archive.",
        "",
        "| run | CPU, s | headers opened per file | small files opened per volume | CPU per header, ms | longest start "
        "of a part beyond its headers, s | longest listing, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        merge_told(merge),
    ]


def run_parts(archive: Path, num_parts: int, watches: dict[str, Stopwatch], opened: Opened) -> dict[str, float]:
    cpu, starts, listings, headers_read = 0.0, [], [], 0.0
    for number in range(num_parts):
        for watch in watches.values():
            watch.seconds = 0.0
        started = time.process_time()
        pretrain(archive, *SMALL, *part(number, num_parts))
        used = time.process_time() - started
        cpu += used
        headers_read += watches["headers"].seconds
        listings.append(watches["listing"].seconds)
        starts.append(used - sum(watches[name].seconds for name in ("headers", "preparing", "merging")))
        print(f"part {number}: {used:.2f} s, {dict(opened.counts)}", file=sys.__stderr__, flush=True)
    return {"cpu": cpu, "start": max(starts), "listing": max(listings), "headers": headers_read}


def row(name: str, run: dict[str, float], num_volumes: int, num_files: int, counts: Counter[str]) -> str:
    return (
        f"| {name} | {run['cpu']:.1f} | {counts['headers'] / num_files:.2f} | {counts['small'] / num_volumes:.2f} | "
        f"{1000 * run['headers'] / max(counts['headers'], 1):.2f} | {run['start']:.1f} | {run['listing']:.1f} |"
    )


@contextmanager
def watched() -> Iterator[dict[str, Stopwatch]]:
    """Measures what takes the time of a part beside its start."""
    places = {
        "headers": (headers, "read_header"),
        "listing": (pretrain_source, "list_share"),
        "preparing": (prepare, "_prepare_all"),
        "merging": (prepare, "_merge_if_last"),
    }
    watches = {name: Stopwatch(getattr(*place)) for name, place in places.items()}
    with ExitStack() as stack:
        for name, place in places.items():
            stack.enter_context(patch.object(*place, watches[name]))
        yield watches


def merge_in_a_process(folder: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_merge, (str(folder),))


def _merge(folder: str) -> dict[str, float]:
    plans = json.loads((Path(folder) / "nnUNet_preprocessed" / POOL / "nnUNetPlans.json").read_text(encoding="utf-8"))
    pool = PoolFolder(POOL, "nnUNetPlans", "3d_fullres")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from here on
    before, started = memory("VmRSS"), time.perf_counter()
    merged = merge_pool(pool, plans, "3d_fullres")
    seconds = time.perf_counter() - started
    assert merged.complete
    peak = memory("VmHWM")
    return {"seconds": seconds, "before": before, "peak": peak, "volumes": merged.tally.statuses[PREPARED]}


def memory(name: str) -> float:
    """MB of this process, by their name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def dicom_template(seed: int) -> bytes:
    """A slice of noise, whose numbers can be replaced by others of the same length."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3.77777777.88888888"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.77777777", "1.2.3.77777777.1"
    dataset.PatientID, dataset.Modality = "77777777", "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = ["0", "0", "88888888"], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.RescaleSlope, dataset.RescaleIntercept = [0.8, 0.8], 1, -1024
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = 16
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = np.random.default_rng(seed).integers(0, 3000, 252).astype("<u2").tobytes() + b"77777777"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    file = BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


class QuickHeaders:
    """Stands in for `read_dicom_header`: the header of the template with the numbers of the file, which is opened."""

    def __init__(self, template: bytes, folder: Path):
        path = folder / "template.dcm"
        path.write_bytes(template)
        self.header = headers.read_dicom_header(str(path))
        self.series, self.slice = template.index(b"77777777"), template.index(b"88888888")

    def __call__(self, path: str) -> DicomHeader:
        content = Path(path).read_bytes()
        series, number = (content[at : at + 8].decode() for at in (self.series, self.slice))
        (frame,) = self.header.frames
        return replace(
            self.header,
            series=self.header.series.replace("77777777", series),
            instance=self.header.instance.replace("77777777", series).replace("88888888", number),
            frames=(replace(frame, position=(*frame.position[:2], float(number))),),
        )


def write_series(archive: Path, numbers: range, slices: Sequence[bytes]) -> None:
    """Each series in a folder `site/patient/series`, as archives have it."""
    for number in numbers:
        folder = archive / f"site{number % 7}" / f"patient{number // 3}" / f"series{number}"
        folder.mkdir(parents=True)
        for slice_number, template in enumerate(slices):
            content = template.replace(b"77777777", f"{10000000 + number}".encode())
            with open(folder / f"{slice_number:04d}.dcm", "wb") as file:
                file.write(content.replace(b"88888888", f"{10000000 + slice_number}".encode()))


# ---- scale


def measure_scale(options: argparse.Namespace, folder: Path) -> list[str]:
    archive, shares = folder / "archive", folder / "listing"
    write_series(archive, range(options.scale), [b""] * options.files)
    listings = []
    for number in (0, options.num_parts // 2):
        started = time.process_time()
        listing = list_share(shares, Share(options.num_parts, number), [archive], True)
        listings.append(time.process_time() - started)
    shutil.rmtree(archive)
    write_series(archive, range(1), [dicom_template(number) for number in range(options.files)])
    pretrain(archive, *SMALL)
    make_records(options.scale)
    merge = merge_in_a_process(folder)
    return [
        "## What grows with the archive for every part",
        "",
        f"Listing {listing.num_files:,} files in {options.scale:,} folders of series and writing it down for "
        f"{options.num_parts} parts, which the first part does: {listings[0]:.2f} s of CPU. Reading it in another "
        f"part: {listings[1]:.3f} s.",
        "",
        merge_told(merge),
    ]


def make_records(count: int) -> None:
    """Multiply the one volume of a pool."""
    ledger = PoolFolder(POOL, "nnUNetPlans", "3d_fullres").ledger
    (bundle,) = [bundle for bundle in range(BUNDLES) if ledger.found(bundle)[0]]
    (volume,), (record,) = ledger.found(bundle)[0], ledger.records(bundle).values()
    many, lines = [], defaultdict(list)
    for number in range(count):
        named = {"case": f"series{number}-{number:012x}", "source": f"{volume.source}{number}"}
        named |= {"bundle": number % BUNDLES, "series": f"{number:024x}"}
        many.append(replace(volume, **named, bundles=(number % BUNDLES,)))
        lines[number % BUNDLES].append(json.dumps(vars(replace(record, **named, content=f"{number:032x}"))))
    ledger.keep_found(PoolInspection(tuple(many), (), Counter()))
    (ledger.folder / "records" / f"{bundle:04d}.jsonl").unlink()
    for number, of_bundle in lines.items():
        append_json_lines(ledger.folder / "records" / f"{number:04d}.jsonl", of_bundle)


def merge_told(merge: dict[str, float]) -> str:
    return (
        f"Merging {merge['volumes']:,} records: {merge['seconds']:.1f} s; it adds "
        f"{merge['peak'] - merge['before']:.0f} MB to the {merge['before']:.0f} MB of a program that has PyTorch and "
        "nnU-Net loaded."
    )


if __name__ == "__main__":
    main()
