"""Labels have the names under which nnU-Net scores them."""

from __future__ import annotations

from typing import Any

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_misfm.plans.files import foreground_labels


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "tumour": 2},
        {"background": 0, "tumour": 2, "liver": 1},
        {"tumour": [2], "background": 0, "liver": 1, "ignore": 3},
        {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        {"background": 0, "core": [2], "whole": [1, 2]},
    ],
)
def test_the_order_is_nnunets(labels: dict[str, Any]) -> None:
    manager = LabelManager(labels, regions_class_order=[1, 2])
    scored = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    named = foreground_labels({"labels": labels}).values()
    as_nnunet = [tuple(label) if isinstance(label, list) and manager.has_regions else label for label in named]
    assert [label[0] if isinstance(label, list) else label for label in as_nnunet] == list(scored)
