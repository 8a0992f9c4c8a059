"""The record beside a data folder of ours: which preprocessing its arrays come from, which files, and which labels.

nnU-Net copies the label files that it preprocesses to `gt_segmentations`; so arrays that were linked or made before
labels were corrected can be told from later ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

from nnunetv2_misfm.errors import PlanError


def record_of(folder: Path) -> Path:
    """The record of a data folder."""
    return folder.with_name(f"{folder.name}.preprocessing.json")


def read_record(path: Path) -> dict[str, Any] | None:
    """What a record says; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def listing(folder: Path) -> dict[str, list[int]]:
    """Size and time of last change of each file, but for those that nnU-Net unpacks from .npz files to train."""
    if not folder.is_dir():
        return {}
    return {path.name: _size_and_time(path) for path in sorted(folder.iterdir()) if path.suffix != ".npy"}


def label_files(dataset_folder: Path) -> dict[str, list[int]]:
    """Size, time of last change and checksum of each label file of a preprocessed dataset."""
    folder = dataset_folder / "gt_segmentations"
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return {path.name: [*_size_and_time(path), crc32(path.read_bytes())] for path in files}


def changed_labels(folder: Path) -> list[str]:
    """Names of the label files that are not those which the arrays in a data folder of ours were made with.

    Label files that are gone do not count; nothing is known of arrays without a record, or that nnU-Net has made anew.
    """
    record = read_record(record_of(folder)) or {}
    known = record.get("labels")
    if not known or record.get("files") != listing(folder):
        return []
    changed = []
    for path in sorted((folder.parent / "gt_segmentations").glob("*")):
        before = known.get(path.name)
        # Copies of a dataset have other times: then the content tells.
        if before is None or (before[:2] != _size_and_time(path) and before[2] != crc32(path.read_bytes())):
            changed.append(path.name)
    return changed


def check_labels_unchanged(folder: Path, plans_name: str, configuration: str) -> None:
    """Raise a PlanError if the arrays in a data folder of ours hold labels that have been corrected since."""
    changed = changed_labels(folder)
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        dataset = folder.parent.name
        raise PlanError(
            f"{folder} was made with other labels than {folder.parent / 'gt_segmentations'} holds now "
            f"({changed[0]}{more}). Repeat the misfm_plan that made {plans_name}, or preprocess it anew: "
            f"nnUNetv2_preprocess -d {dataset} -plans_name {plans_name} -c {configuration}"
        )


def _size_and_time(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]
