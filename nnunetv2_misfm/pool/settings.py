"""Settings of a pool: group `pool.settings` of the `misfm` block of plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from nnunetv2_misfm.plans.run_settings import BLOCK
from nnunetv2_misfm.plans.settings import Settings, is_number, read_settings, setting

DECIDED_BY_PLANS = ("modality", "ct_window", "spacing", "body_crop")
"""Settings that have no place beside the plans of another dataset (`-plans_from`)."""


class PoolSettings(Settings):
    """How bare volumes become cases. All of it is fixed for the life of a pool.

    Axes are canonical: (z, y, x) = (inferior to superior, posterior to anterior, left to right).
    """

    modality: Literal["auto", "ct", "mr"] = setting(
        "auto",
        "what the volumes are; ct scales the CT window to -1 to 1, mr takes z-scores, auto decides for each volume",
    )
    ct_window: tuple[float, float] = setting(
        (-1000.0, 1000.0), "window of CT, the Hounsfield units that become -1 and 1"
    )
    spacing: Literal["median", "none"] | tuple[float, float, float] = setting(
        "median",
        "spacing to resample to: median (that of the volumes), none (no resampling), or three numbers in mm for (z, "
        "y, x)",
        above=0,
    )
    body_crop: bool = setting(
        True,
        "cut the air around the patient away in CT",
        off="keep the air around the patient that is cut away in CT",
    )
    min_size: int = setting(
        8, "least number of voxels along each axis after resampling; smaller volumes are left out", low=1
    )
    skip_label_maps: bool = setting(
        True,
        "leave volumes out whose voxels look like labels",
        off="use volumes whose voxels look like labels, which are left out otherwise",
    )
    join_channels: bool = setting(
        True,
        "files ending in _0000, _0001, ... are channels of one volume, as in nnU-Net",
        off="take files ending in _0000, _0001, ... for a volume each; otherwise they are the channels of one",
    )

    @field_validator("spacing", mode="before")
    @classmethod
    def _is_a_spacing(cls, spacing: Any) -> Any:
        is_three_numbers = isinstance(spacing, tuple) and len(spacing) == 3 and all(map(is_number, spacing))
        if spacing not in ("median", "none") and not is_three_numbers:
            raise ValueError("must be median, none, or three numbers in mm")
        return spacing

    @field_validator("ct_window")
    @classmethod
    def _holds_something(cls, window: tuple[float, float]) -> tuple[float, float]:
        if window[0] == window[1]:
            raise ValueError("must be two numbers, the lower one first")
        return window


def pool_block(plans: Mapping[str, Any]) -> dict[str, Any]:
    """What the plans of a pool say about it."""
    block: dict[str, Any] = plans[BLOCK]["pool"]
    return block


def pool_settings(plans: Mapping[str, Any]) -> PoolSettings:
    """The settings a pool's plans were made with."""
    return read_settings(PoolSettings, pool_block(plans)["settings"], f"the pool in {plans['plans_name']}.json")
