"""Preparing one volume: read, judge, crop, preprocess with nnU-Net, and store in a temporary folder.

This runs in worker processes. Arrays are (C, Z, Y, X) until nnU-Net transposes them into plans axis order.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.files import disk_is_full
from nnunetv2_misfm.pool.plan import expected_shape, plans_for_case, pool_dataset_json
from nnunetv2_misfm.pool.reading import read_volume
from nnunetv2_misfm.pool.settings import pool_block, pool_settings
from nnunetv2_misfm.pool.volume_files import VolumeProblem, is_detached
from nnunetv2_misfm.pool.volumes import Volume
from nnunetv2_misfm.pool.voxels import (
    BoundingBox,
    body_box,
    check_hounsfield,
    check_normalised,
    check_voxels,
    content_hash,
    guess_modality,
    intensity_statistics,
)

MOST_VOXELS = 2**30
"""Larger cases (over 4 GiB, several times that while resampling) come from damaged headers or a wrong spacing."""
CASE_ENDINGS = (".pkl", "_seg.b2nd", ".b2nd")
"""The files of a case in the order they appear in the data folder: whoever sees the last one may use the case."""
PREPARED, LEFT_OUT, FAILED = "prepared", "left out", "failed"


@dataclass(frozen=True)
class CaseRecord:
    """What became of one volume, as kept on disk: enough to resume, to report and to merge without the arrays."""

    case: str
    status: str
    """`prepared`, `left out` (for good) or `failed` (tried again by the next run)."""
    source: str
    format: str
    num_bytes: int
    modified_ns: int
    orientation: str
    original_shape: tuple[int, ...]
    """Voxels along (z, y, x)."""
    original_spacing: tuple[float, ...]
    """mm along (z, y, x)."""
    channels: int
    layout: str
    """Hash of everything in the plans that the arrays depend on; a record of other plans counts for nothing."""
    reason: str = ""
    mended: str = ""
    """What had to be done for its voxels to lie on a straight grid, in the values that were measured."""
    modality: str = ""
    modality_from: str = ""
    body_box: BoundingBox | None = None
    """Voxels along (z, y, x) that were kept of the original, per axis (first, last + 1); None if nothing was cut."""
    shape_after_crop: tuple[int, ...] = ()
    """Voxels before resampling, along the axes in which the reader gave them."""
    spacing: tuple[float, ...] = ()
    """mm before resampling, along the same axes."""
    shape: tuple[int, ...] = ()
    """Voxels in plans axis order as stored."""
    content: str = ""
    intensity: tuple[dict[str, float], ...] = ()
    """Per channel nnU-Net's intensity properties of the voxels kept, before normalisation."""
    bundle: int = 0
    series: str = ""
    """These two as in `Volume`."""

    @classmethod
    def of(cls, volume: Volume, status: str, layout: str, **more: Any) -> CaseRecord:
        return cls(
            case=volume.case,
            status=status,
            layout=layout,
            format=volume.format,
            orientation=volume.orientation,
            original_shape=volume.shape,
            original_spacing=volume.spacing,
            channels=volume.num_channels,
            **_files_of(volume),
            **more,
        )

    def with_files_of(self, volume: Volume) -> CaseRecord:
        """The record of a volume whose files have another date or place, but the same voxels."""
        return dataclasses.replace(self, **_files_of(volume))

    def is_of_another(self, volume: Volume) -> bool:
        """Whether a case was prepared from another place; files of a DICOM series may come from anywhere."""
        same_series = volume.series != "" and self.series == volume.series
        return self.status == PREPARED and self.source != volume.source and not same_series

    def is_of(self, volume: Volume, layout: str) -> bool:
        """Whether this is what became of the volume as it is now, by plans of that layout."""
        now = (volume.source, volume.num_bytes, volume.modified_ns, layout)
        return (self.source, self.num_bytes, self.modified_ns, self.layout) == now


def _files_of(volume: Volume) -> dict[str, Any]:
    """What a record says of the files of a volume: where they are, and by what a change is seen."""
    return {name: getattr(volume, name) for name in ("source", "num_bytes", "modified_ns", "bundle", "series")}


@dataclass(frozen=True)
class CaseTask:
    """One volume to prepare."""

    volume: Volume
    plans: Mapping[str, Any]
    configuration: str
    layout: str
    """As in `CaseRecord`."""
    temporary: Path
    """Folder for the files until they are whole; on the file system of the pool."""
    earlier: CaseRecord | None = None
    """What an earlier run prepared, perhaps of this volume, if its file has a new date or place since."""


@dataclass(frozen=True)
class CaseResult:
    record: CaseRecord
    written: int
    """Bytes in the temporary folder; 0 if there is nothing to move into the pool."""
    seconds: float


def prepare_case(task: CaseTask) -> CaseResult:
    """Prepare one volume; whatever is wrong with it ends up as the reason in its record.

    Raises:
        OSError: only if the disk is full, which concerns all volumes.
    """
    started = time.monotonic()
    written = 0
    try:
        record = _prepare(task)
        written = sum(file.stat().st_size for file in temporary_files(task.temporary, task.volume.case))
    except VolumeProblem as problem:
        # A file of voxels beside its header may be mended without a change of the header, by which the volume is known.
        detached = is_detached(task.volume.source) and problem.__cause__ is not None
        status = FAILED if problem.is_of_system or detached else LEFT_OUT
        record = CaseRecord.of(task.volume, status, task.layout, reason=str(problem))
    except MemoryError:
        reason = "out of memory; use fewer processes or a coarser spacing"
        record = CaseRecord.of(task.volume, FAILED, task.layout, reason=reason)
    except Exception as error:  # one volume never stops the rest, whichever library it upsets
        if disk_is_full(error):
            raise
        record = CaseRecord.of(task.volume, FAILED, task.layout, reason=f"{type(error).__name__}: {error}")
    if record.status != PREPARED:
        remove_temporary_files(task.temporary, task.volume.case)
        written = 0
    return CaseResult(record, written, time.monotonic() - started)


def temporary_files(folder: Path, case: str) -> list[Path]:
    """Those files of the case that exist in the folder, in the order in which they are to appear."""
    return [path for path in (folder / f"{case}{ending}" for ending in CASE_ENDINGS) if path.exists()]


def remove_temporary_files(folder: Path, case: str) -> None:
    for file in temporary_files(folder, case):
        file.unlink(missing_ok=True)


def _prepare(task: CaseTask) -> CaseRecord:
    """Read, judge, preprocess and store a volume; a record of the same voxels serves if there is one.

    Raises:
        VolumeProblem: if it is left out.
    """
    volume, settings = task.volume, pool_settings(task.plans)
    remove_temporary_files(task.temporary, volume.case)
    check_expected_size(task)
    voxels, spacing, mended = read_volume(volume, task.plans["image_reader_writer"].endswith("WithReorient"))
    check_voxels(voxels, settings.skip_label_maps)
    content = content_hash(voxels)
    modality, modality_from = _modality(task, voxels)
    now = (content, volume.spacing, modality or "", modality_from)
    earlier = task.earlier if task.earlier and task.earlier.status == PREPARED else None
    if earlier and now == (earlier.content, earlier.original_spacing, earlier.modality, earlier.modality_from):
        return earlier.with_files_of(volume)

    box = None
    if modality == "ct":
        check_hounsfield(voxels)
        box = body_box(voxels, spacing, settings.min_size) if settings.body_crop else None
    if box is not None:
        voxels = voxels[(slice(None), *(slice(first, last) for first, last in box))]
    intensity = intensity_statistics(voxels)

    plans_manager = PlansManager(plans_for_case(task.plans, task.configuration, modality))
    configuration_manager = plans_manager.get_configuration(task.configuration)
    preprocessor = configuration_manager.preprocessor_class(verbose=False)
    dataset_json = pool_dataset_json(task.plans, task.configuration, 1)
    data, seg, properties = preprocessor.run_case_npy(
        voxels, None, {"spacing": spacing}, plans_manager, configuration_manager, dataset_json
    )
    _check_size(data.shape[1:], settings.min_size)
    check_normalised(data, voxels, configuration_manager.normalization_schemes)

    cropped = properties["shape_after_cropping_and_before_resampling"]
    record = CaseRecord.of(
        volume,
        PREPARED,
        task.layout,
        mended=mended,
        modality=modality or "",
        modality_from=modality_from,
        body_box=box,
        shape_after_crop=tuple(int(cropped[axis]) for axis in plans_manager.transpose_backward),
        spacing=tuple(float(mm) for mm in properties["spacing"]),
        shape=tuple(int(n) for n in data.shape[1:]),
        content=content,
        intensity=tuple(intensity),
    )
    properties["misfm"] = {
        "source": volume.source,
        "orientation": volume.orientation,
        "modality": record.modality,
        "body_box": box,
    }
    _save(data, seg, properties, task.temporary / volume.case, configuration_manager.patch_size)
    return record


def _modality(task: CaseTask, voxels: np.ndarray) -> tuple[str | None, str]:
    """The modality that decides on the normalisation, and what says so; None if the plans of a dataset decide."""
    settings, plans_from = pool_settings(task.plans), pool_block(task.plans)["plans_from"]
    if plans_from is not None:
        return None, f"plans of {plans_from}"
    tag = task.volume.dicom_modality
    if settings.modality == "auto":
        return guess_modality(voxels, tag)
    return settings.modality, "settings"


def check_expected_size(task: CaseTask) -> None:
    """Raise a VolumeProblem if the header says already that the volume is too small or too large."""
    expected = expected_shape(task.volume, task.plans, task.configuration)
    _check_size(expected, pool_settings(task.plans).min_size)


def _check_size(shape: tuple[int, ...], min_size: int) -> None:
    """Raise a VolumeProblem unless a volume of this shape is worth having and can be handled."""
    voxels = "x".join(str(int(n)) for n in shape)
    if min(shape) < min_size:
        raise VolumeProblem(
            f"too small: {voxels} voxels after resampling, at least {min_size} along each axis (-min_size)"
        )
    if np.prod(shape, dtype=np.int64) > MOST_VOXELS:
        raise VolumeProblem(f"too large: {voxels} voxels after resampling, at most {MOST_VOXELS} in all")


def _save(data: np.ndarray, seg: np.ndarray, properties: dict[str, Any], target: Path, patch_size: list[int]) -> None:
    """Store the case as nnU-Net's preprocessor does, and make sure that it reached the disk whole.

    Raises:
        OSError: with ENOSPC if the disk is full, which blosc2 reports as any other failure.
    """
    data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
    blocks, chunks = comp_blosc2_params(data.shape, tuple(patch_size), data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, tuple(patch_size), seg.itemsize)
    layout = {"chunks": chunks, "blocks": blocks, "chunks_seg": chunks_seg, "blocks_seg": blocks_seg}
    try:
        nnUNetDatasetBlosc2.save_case(data, seg, properties, str(target), **layout)
        for ending in CASE_ENDINGS:
            with open(f"{target}{ending}", "r+b") as file:  # Windows flushes only what it may write to
                os.fsync(file.fileno())
        stored = blosc2.open(urlpath=f"{target}.b2nd", mode="r")
        if not np.array_equal(stored[-1, -1], data[-1, -1]):
            raise RuntimeError("what was written cannot be read back")
    except RuntimeError as error:
        if shutil.disk_usage(target.parent).free < data.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
