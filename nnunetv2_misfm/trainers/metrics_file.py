"""Metrics of a run as CSV, one row per epoch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_misfm.files import written_whole

METRICS = "metrics.csv"
"""In a results folder."""


def as_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, words or None by column; a list fills the columns name_0, name_1, ..."""
    columns: dict[str, Any] = {}
    for name, value in values.items():
        several = isinstance(value, (list, tuple))
        columns |= {f"{name}_{i}": one for i, one in enumerate(value)} if several else {name: value}
    return columns


def append_row(path: Path, epoch: int, values: Mapping[str, Any]) -> None:
    """Write the row of an epoch; rows of this and later epochs, left by an interrupted run, are dropped.

    Args:
        path: of the file; it is created with the first row.
        epoch: from 0.
        values: see `as_columns`.
    """
    columns = as_columns(values)
    rows = [row for row in read_rows(path) if int(row["epoch"]) < epoch]
    rows.append({"epoch": str(epoch), **{key: _as_text(value) for key, value in columns.items()}})
    with written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows so far, the values as text; none if there is no file yet."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.6g}"
