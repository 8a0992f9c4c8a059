"""Settings of the augmentation, which all pretext tasks share: group `augmentation` of the `misfm` block of plans."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationInfo, field_validator

from nnunetv2_misfm.plans.settings import Settings, setting


class AugmentSettings(Settings):
    """How strongly crops are augmented; ranges are (lowest, highest), probabilities are per crop."""

    scale: tuple[float, float] = setting(
        (0.7, 1.5), "range of the size of a crop along each axis, as a multiple of the patch size", low=0.1, high=10
    )
    scale_probability: float = setting(1.0, "probability that a crop has another size than the patch", low=0, high=1)
    flip_probability: float = setting(0.5, "probability of a flip, drawn for each axis", low=0, high=1)
    contrast_probability: float = setting(
        1.0, "probability of stretching the contrast, from two percentiles to the whole range", low=0, high=1
    )
    low_percentiles: tuple[float, float] = setting(
        (0.1, 2.0), "range of the lower of these percentiles", low=0, high=50
    )
    high_percentiles: tuple[float, float] = setting(
        (98.0, 99.9), "range of the higher of these percentiles", low=50, high=100
    )
    gamma_probability: float = setting(1.0, "probability of a gamma curve over the intensities", low=0, high=1)
    gamma: tuple[float, float] = setting((0.7, 1.5), "range of the exponent of that curve", low=0.01, high=100)
    inversion_probability: float = setting(0.25, "probability of turning bright into dark", low=0, high=1)
    brightness_probability: float = setting(0.0, "probability of adding a constant to the intensities", low=0, high=1)
    brightness: tuple[float, float] = setting(
        (-0.1, 0.1), "range of that constant, as a share of the crop's range of intensities", low=-10, high=10
    )
    blur_probability: float = setting(0.1, "probability of a Gaussian filter", low=0, high=1)
    blur_sigma: tuple[float, float] = setting(
        (0.5, 1.0), "range of the filter's standard deviation, in voxels", low=0.05, high=20
    )
    noise_probability: float = setting(0.1, "probability of adding Gaussian noise", low=0, high=1)
    noise_std: tuple[float, float] = setting(
        (0.0, 0.05),
        "range of the noise's standard deviation, as a share of the crop's range of intensities",
        low=0,
        high=10,
    )

    @classmethod
    def off(cls, **but: Any) -> AugmentSettings:
        """Crops are used as they are read, but for the settings given."""
        never: dict[str, Any] = {name: 0.0 for name in cls.model_fields if name.endswith("_probability")}
        return cls(**{"scale": (1.0, 1.0), **never, **but})

    def without_effect(self) -> dict[str, str]:
        """The ranges of what is never done, each with the probability of 0 that says so."""
        kinds = {
            "low_percentiles": "contrast",
            "high_percentiles": "contrast",
            "blur_sigma": "blur",
            "noise_std": "noise",
        }
        ranges = (name for name in type(self).model_fields if not name.endswith("_probability"))
        probabilities = {name: f"{kinds.get(name, name)}_probability" for name in ranges}
        return {name: probability for name, probability in probabilities.items() if getattr(self, probability) == 0}

    @field_validator("high_percentiles")
    @classmethod
    def _above_the_low_ones(cls, high: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low = info.data.get("low_percentiles")
        if low is not None and low[1] >= high[0]:
            raise ValueError(f"must begin above the end of low_percentiles = {low}")
        return high
