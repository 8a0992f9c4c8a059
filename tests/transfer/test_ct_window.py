"""Fine-tuning plans: which CT window they get, and that it is said."""

from __future__ import annotations

import pytest

from nnunetv2_misfm.transfer.images import take_window

OWN = {"percentile_00_5": -900.0, "percentile_99_5": 200.0, "mean": -300.0, "std": 350.0, "min": -1024.0}
PRETRAINED = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 1000.0, "min": -1000.0}


@pytest.mark.parametrize("wanted", ["pretrained", "dataset"])
def test_the_ct_window_that_is_taken_is_said(wanted: str) -> None:
    window = dict(OWN)
    remark = take_window(window, PRETRAINED, wanted)
    assert window == (PRETRAINED if wanted == "pretrained" else OWN)
    assert "-1000 to 1000 HU" in remark and "-900 to 200 HU" in remark


def test_the_same_window_needs_no_word() -> None:
    assert take_window(dict(OWN), dict(OWN), "pretrained") == ""
