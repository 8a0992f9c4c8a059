"""Settings of what a pretraining run learns from: groups `fusion` and `augmentation` of the `misfm` block of plans.

They stand apart from the code they steer so that the command can offer them without loading torch, which takes seconds.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from nnunetv2_misfm.plans.settings import Settings, setting


class FusionSettings(Settings):
    """How fused samples are made; every range includes both ends, and sizes are per axis (X, Y, Z).

    Boxes are cuboids of random size and place, later ones on top; the default sizes are the paper's 8..40, 8..80 and
    8..80 voxels at its patch size of 64x128x128. Blocks are cuboids of one random size per sample on a regular grid
    with a random offset. Either has at least one voxel and at most the size of the patch; blocks longer than half the
    patch are cut to half of it, so that even a small patch holds foreground and background.
    """

    geometry: Literal["boxes", "blocks"] = setting("boxes", "boxes (the paper), blocks (the authors' later code)")
    num_fusion_classes: int = setting(5, "number of fusion coefficients, 0 included", low=2, high=1000)
    num_boxes: tuple[int, int] = setting((10, 40), "fewest and most boxes of a sample", low=1)
    box_size_unit: Literal["fraction", "voxels"] = setting("fraction", "unit of box sizes: of the patch, or voxels")
    box_size_min: tuple[float, float, float] = setting((0.125, 0.0625, 0.0625), "smallest box, for each axis", above=0)
    box_size_max: tuple[float, float, float] = setting((0.625, 0.625, 0.625), "largest box, for each axis", above=0)
    background_boxes: bool = setting(False, "boxes may have coefficient 0, hiding those below them")
    block_size_unit: Literal["fraction", "voxels"] = setting("voxels", "unit of block sizes: of the patch, or voxels")
    block_size_min: tuple[float, float, float] = setting((8, 8, 8), "smallest block, for each axis", above=0)
    block_size_max: tuple[float, float, float] = setting((32, 32, 32), "largest block, for each axis", above=0)
    foreground_ratio: float = setting(0.7, "share of blocks whose coefficient is not 0", above=0, high=1)
    pairs: Literal["two_volumes", "same_volume"] | None = setting(
        None, "where the two crops come from (unset: two volumes for boxes, the same one for blocks, as published)"
    )

    @field_validator("box_size_min", "box_size_max", "block_size_min", "block_size_max")
    @classmethod
    def _fits_its_unit(cls, sizes: tuple[float, float, float], info: ValidationInfo) -> tuple[float, float, float]:
        kind = str(info.field_name).partition("_")[0]
        unit = info.data.get(f"{kind}_size_unit")
        if unit == "fraction" and max(sizes) > 1:
            raise ValueError("must be three shares of the patch, up to 1")
        if unit == "voxels" and any(size != int(size) for size in sizes):
            raise ValueError("must be three whole numbers of voxels")
        smallest = info.data.get(f"{kind}_size_min")
        if smallest is not None and any(low > high for low, high in zip(smallest, sizes, strict=True)):
            raise ValueError(f"is below {kind}_size_min = {smallest} on an axis")
        return sizes

    @property
    def two_volumes(self) -> bool:
        """Whether the two sub-volumes of a sample come from different volumes."""
        return (self.pairs or ("two_volumes" if self.geometry == "boxes" else "same_volume")) == "two_volumes"


class AugmentSettings(Settings):
    """How strongly crops are augmented; ranges are (lowest, highest), probabilities are per crop."""

    scale: tuple[float, float] = setting((0.7, 1.5), "size of crops, in patch sizes, for each axis", low=0.1, high=10)
    flip_probability: float = setting(0.5, "probability of a flip, for each axis on its own", low=0, high=1)
    contrast_probability: float = setting(1.0, "probability of stretching percentiles to the range", low=0, high=1)
    low_percentiles: tuple[float, float] = setting((0.1, 2.0), "range of the lower percentile", low=0, high=50)
    high_percentiles: tuple[float, float] = setting((98.0, 99.9), "range of the higher percentile", low=50, high=100)
    gamma_probability: float = setting(1.0, "probability of an exponent on intensities", low=0, high=1)
    gamma: tuple[float, float] = setting((0.7, 1.5), "exponent, within the crop's range", low=0.01, high=100)
    inversion_probability: float = setting(0.25, "probability of turning bright into dark", low=0, high=1)
    brightness_probability: float = setting(0.0, "probability of an added constant", low=0, high=1)
    brightness: tuple[float, float] = setting((-0.1, 0.1), "the constant, as a share of range", low=-10, high=10)
    blur_probability: float = setting(0.1, "probability of a Gaussian filter", low=0, high=1)
    blur_sigma: tuple[float, float] = setting((0.5, 1.0), "its standard deviation in voxels", low=0.05, high=20)
    noise_probability: float = setting(0.1, "probability of Gaussian noise", low=0, high=1)
    noise_std: tuple[float, float] = setting((0.0, 0.05), "its standard deviation, as a share of range", low=0, high=10)

    @classmethod
    def off(cls) -> AugmentSettings:
        """Crops are used as they are read."""
        never: dict[str, Any] = {name: 0.0 for name in cls.model_fields if name.endswith("_probability")}
        return cls(scale=(1.0, 1.0), **never)

    @field_validator("high_percentiles")
    @classmethod
    def _above_the_low_ones(cls, high: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low = info.data.get("low_percentiles")
        if low is not None and low[1] >= high[0]:
            raise ValueError(f"must begin above the end of low_percentiles = {low}")
        return high


GROUPS: dict[str, type[Settings]] = {"fusion": FusionSettings, "augmentation": AugmentSettings}
