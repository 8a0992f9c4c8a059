"""Which volumes a pool leaves out by their headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2_misfm.plans.normalisation import SCHEMES
from nnunetv2_misfm.pool.settings import PoolSettings, pool_block, pool_settings
from nnunetv2_misfm.pool.volumes import Volume


@dataclass(frozen=True)
class Wanted:
    """What a pool takes, as far as headers tell."""

    num_channels: int
    only_ct: str = ""
    """Why volumes whose DICOM modality is another one are left out; empty if they are not."""

    @classmethod
    def by_plans(cls, plans: Mapping[str, Any], configuration: str) -> Wanted:
        pool = pool_block(plans)
        if pool["plans_from"] is None:
            return cls.by_settings(pool["num_channels"], pool_settings(plans))
        is_ct = plans["configurations"][configuration]["normalization_schemes"][0] == SCHEMES["ct"]
        return cls(pool["num_channels"], f"the plans of {pool['plans_from']} normalise CT" if is_ct else "")

    @classmethod
    def by_settings(cls, num_channels: int, settings: PoolSettings) -> Wanted:
        reason = "in a pool of CT (-modality auto takes other modalities too)"
        return cls(num_channels, reason if settings.modality == "ct" else "")

    def problem_of(self, volume: Volume) -> str:
        """Why a volume is left out without a look at its voxels; empty if it is not."""
        if volume.num_channels != self.num_channels:
            return f"{volume.num_channels} channels, but the pool's volumes have {self.num_channels}"
        if self.only_ct and volume.dicom_modality not in (None, "CT"):
            return f"DICOM modality {volume.dicom_modality} {self.only_ct}"
        return ""
