"""The terms of a comparison: what all runs of one folder have in common, so that they can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any
from zlib import crc32

import numpy as np

from nnunetv2_misfm.commands.compare.options import CompareOptions
from nnunetv2_misfm.commands.compare.splits import Split
from nnunetv2_misfm.commands.compare.workspace import Workspace
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import read_json

TERMS_FILE = "terms.json"
# More arms, seeds, labelled cases and learning rates may come later.
_OF_OPTIONS = ("configuration", "plans", "patients", "num_test", "num_validation")


def checked_terms(options: CompareOptions, workspace: Workspace, split: Split) -> dict[str, Any]:
    """The terms that the options ask for, as JSON has them.

    Raises:
        PlanError: if the folder holds a comparison on other terms, or nnU-Net has preprocessed other labels than the
            raw dataset has now.
    """
    terms = {name: getattr(options, name) for name in _OF_OPTIONS} | {
        "dataset": workspace.dataset,
        "planning": list(options.planning),
        "settings": options.settings,
        "probe": options.probe,
        "mirroring": options.mirroring and not options.probe,
        "test": list(split.test),
        "validation": list(split.validation),
        "training": list(split.training),
        "cases": split.cases,
        "labels": workspace.labels(),
        "label_files": _checksum_of_labels(workspace),
    }
    terms = json.loads(json.dumps(terms))
    path = workspace.folder / TERMS_FILE
    before = read_json(path, f"Remove {workspace.folder} and start again.") if path.is_file() else terms
    changed = [
        f"{name} was {_short(before[name])}, is {_short(terms[name])}"
        for name in terms
        if name in before and before[name] != terms[name]  # folders of earlier versions have fewer
    ]
    if changed:
        raise PlanError(
            f"{workspace.folder} holds a comparison on other terms: {'; '.join(changed)}. Give the options it was "
            f"begun with, or another folder with -o; a dataset with other cases or labels needs one."
        )
    return terms


def _checksum_of_labels(workspace: Workspace) -> str:
    """Of all label files: runs that were tested with other labels are not to be compared."""
    checksum, corrected = 0, []
    copies = workspace.users_preprocessed / "gt_segmentations"
    for case, (_, label) in workspace.cases.items():
        content = Path(label).read_bytes()
        checksum = crc32(content, checksum)
        preprocessed = copies / f"{case}{workspace.file_ending}"
        if preprocessed.is_file() and preprocessed.read_bytes() != content and _differ(workspace, label, preprocessed):
            corrected.append(label)
    if corrected:
        more = f" and {len(corrected) - 1} more" if len(corrected) > 1 else ""
        raise PlanError(
            f"{corrected[0]}{more}: nnU-Net has preprocessed other labels, which the runs would train with. "
            f"Preprocess the dataset again: nnUNetv2_preprocess -d {workspace.dataset} -plans_name "
            f"{workspace.base['plans_name']} -c {workspace.configuration} (if the labels have older dates than those "
            f"in {copies}, remove these first: nnU-Net would keep them)"
        )
    return f"{checksum:08x}"


def _differ(workspace: Workspace, label: str, other: Path) -> bool:
    """Whether two label files hold other labels, not only another compression or header."""
    reader = workspace.reader
    return not np.array_equal(reader.read_seg(label)[0], reader.read_seg(str(other))[0])


def _short(value: Any) -> str:
    """A term as a message can show it: there may be hundreds of cases."""
    return shorten(str(value), 300, placeholder=" ...")
