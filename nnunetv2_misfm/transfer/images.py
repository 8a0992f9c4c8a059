"""The images of pretraining and those of a dataset: what differs, and what of it the plans take over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnunetv2_misfm.architectures.resolution import total_strides
from nnunetv2_misfm.checkpoints.source import Source
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.plans.checks import INTENSITIES, WINDOW
from nnunetv2_misfm.plans.normalisation import SCHEMES, intensity_properties
from nnunetv2_misfm.transfer.transfer import channel_order

_ANOTHER_SPACING = 1.2


def wanted_spacing(
    wanted: str | tuple[float, float, float], source: Source | None, transpose: Sequence[int]
) -> list[float]:
    """What `PlanRequest.spacing` asks for, in mm, plans axis order.

    Raises:
        PlanError: if it is the checkpoint's, and that is not known.
    """
    if not isinstance(wanted, str):
        return [float(wanted[axis]) for axis in transpose]
    spacing = None if source is None else source.preprocessing.get("spacing")
    if spacing is None:
        whose = "there are no pretrained weights" if source is None else f"{source.path} does not say what it was"
        raise PlanError(f"-spacing pretrained: {whose}. Give three numbers in mm, or keep the dataset's.")
    return [float(mm) for mm in spacing]


def about_spacing(spacing: Sequence[float], source: Source | None) -> Iterator[str]:
    """That a dataset is kept at another spacing than that of pretraining, where it differs by a fifth or more."""
    theirs = None if source is None else source.preprocessing.get("spacing")
    if theirs is None or len(theirs) != len(spacing):
        return
    if any(max(mm / other, other / mm) > _ANOTHER_SPACING for mm, other in zip(spacing, theirs, strict=True)):
        yield (
            f"spacing {_rounded(spacing)} mm, as the dataset's plans have it; the weights come from {_rounded(theirs)} "
            f"mm, which -spacing pretrained takes."
        )


def _rounded(spacing: Sequence[float]) -> list[float]:
    return [round(float(mm), 3) for mm in spacing]


def change_spacing(configuration: dict[str, Any], spacing: list[float]) -> str:
    """Another spacing, with the median image's size at it, and a patch that is no larger than that; says so."""
    if not all(0 < mm < math.inf for mm in spacing):
        raise PlanError(f"-spacing {spacing} must be three numbers above 0, in mm.")
    before = configuration["spacing"]
    configuration["spacing"] = spacing
    median = configuration.get("median_image_size_in_voxels")
    if median is not None:
        median = [n * old / new for n, old, new in zip(median, before, spacing, strict=True)]
        configuration["median_image_size_in_voxels"] = median
        strides = total_strides(configuration["architecture"]["arch_kwargs"]["strides"])[-1]
        largest = [-(-n // s) * s for n, s in zip(median, strides, strict=True)]
        configuration["patch_size"] = [
            int(min(n, most)) for n, most in zip(configuration["patch_size"], largest, strict=True)
        ]
    said = f"spacing {_rounded(before)} becomes {_rounded(spacing)} mm; patch size {configuration['patch_size']}"
    coarse, coarse_before = _slice_axis(spacing), _slice_axis(before)
    if coarse is not None and coarse_before not in (None, coarse):
        said += (
            f"; its slices are thick along axis {coarse_before}, but {coarse} is the coarse one now: -spacing begins "
            "with the slice axis"
        )
    return said


def _slice_axis(spacing: Sequence[float]) -> int | None:
    """Where slices are thick in nnU-Net's sense; None where no axis is."""
    from nnunetv2.configuration import ANISO_THRESHOLD

    return list(spacing).index(max(spacing)) if max(spacing) / min(spacing) > ANISO_THRESHOLD else None


def keep_normalisation(
    plans: dict[str, Any], source: Source, ct_intensities: str, channels: Sequence[str]
) -> Iterator[str]:
    """Normalise CT as in pretraining if that is wanted; says what changes, and where the two cannot agree.

    Args:
        plans: changed in place.
        source: the checkpoint.
        ct_intensities, channels: see `PlanRequest`.
    """
    pretrained = source.preprocessing
    axes, theirs_axes = list(plans["transpose_forward"]), pretrained.get("transpose_forward")
    if theirs_axes is not None and list(theirs_axes) != axes:
        yield (
            f"the axes are in the order {axes} (transpose_forward), in pretraining {list(theirs_axes)}: the network "
            f"meets the body in another orientation. Weights in this one: misfm_pretrain -plans_from "
            f"{plans['dataset_name']}."
        )
    before: Sequence[str] = pretrained.get("normalization_schemes") or ()
    if not before:
        also = "" if "spacing" in pretrained else ", nor at which spacing they were"
        yield f"{source.path} does not say how its images were normalised{also}; the dataset's are as its plans say."
        return
    order = channel_order(source.channels[: len(before)], channels) or list(range(len(before)))
    for configuration in plans["configurations"].values():
        for channel, scheme in enumerate(configuration["normalization_schemes"]):
            in_source = order[channel] if channel < len(order) else 0
            theirs = _ways_to_normalise(source, in_source)
            if scheme not in theirs:
                yield (
                    f"channel {channel} is normalised by {scheme}, but pretraining used {' and '.join(theirs)}: the "
                    f"features may fit less well. Pretrain on volumes of the same kind if you can."
                )
            elif scheme == SCHEMES["ct"]:
                window = theirs[scheme]
                if window is None:
                    yield f"{source.path} does not say how CT was clipped and scaled; it is as the dataset's plans say."
                elif remark := take_window(plans[INTENSITIES][str(channel)], window, ct_intensities):
                    yield remark
            elif scheme == SCHEMES["mr"]:
                yield from _about_mask(channel, configuration, pretrained.get("use_mask_for_norm"), in_source)


def _about_mask(
    channel: int, configuration: Mapping[str, Any], in_pretraining: Sequence[bool] | None, in_source: int
) -> Iterator[str]:
    """That z-scores are those of the body alone, with zeros around it, in one of the two."""
    ours = configuration["use_mask_for_norm"][channel]
    if in_pretraining is None or in_source >= len(in_pretraining) or in_pretraining[in_source] == ours:
        return
    within, whole = ("here", "in pretraining") if ours else ("in pretraining", "here")
    yield (
        f"channel {channel} has z-scores of the voxels other than 0 {within} (use_mask_for_norm), of the whole image "
        f"{whole}: its background and scale differ."
    )


def _ways_to_normalise(source: Source, channel: int) -> dict[str, Mapping[str, float] | None]:
    """The schemes that a channel of pretraining was normalised by, each with its intensities as far as they are known.

    Plans tell one. In a pool of CT and MR, whose plans have the scheme of the majority, each volume had that of its own
    modality.
    """
    told = source.preprocessing
    ways = {told["normalization_schemes"][channel]: told.get(INTENSITIES, {}).get(str(channel))}
    pool = source.info.training.get("pool", {}) if source.by_this_package and source.info is not None else {}
    for modality in sorted(set(pool.get("modalities", ())) & set(SCHEMES)):
        ways.setdefault(SCHEMES[modality], intensity_properties(modality, pool["settings"]["ct_window"]))
    return ways


def take_window(own: dict[str, float], pretrained: Mapping[str, float], ct_intensities: str) -> str:
    """Let a CT channel be clipped and scaled as in pretraining, if wanted; says how, empty if nothing differs."""
    if all(math.isclose(own[name], pretrained[name], rel_tol=1e-6) for name in WINDOW):
        return ""
    ours, theirs = (
        f"{values['percentile_00_5']:.5g} to {values['percentile_99_5']:.5g} HU" for values in (own, pretrained)
    )
    if ct_intensities == "dataset":
        return (
            f"CT is clipped to {ours}, as the dataset's plans do; pretraining used {theirs}, so the weights meet other "
            f"values than they were made for."
        )
    own.update({name: pretrained[name] for name in own if name in pretrained})
    return (
        f"CT is clipped to {theirs} and scaled as in pretraining, instead of {ours} as in the dataset's plans; "
        f"-ct_intensities dataset keeps those."
    )


def about_channels(source: Source, channels: Sequence[str]) -> Iterator[str]:
    """How the input channels of the checkpoint and of the dataset were matched, where their names differ.

    Args:
        source: the checkpoint.
        channels: names of the dataset's image channels.
    """
    theirs = source.channels[: source.num_images]
    if not theirs and len(channels) > 1 and source.num_images == len(channels):
        yield (
            f"{source.path} does not say what its {len(channels)} input channels were; they are taken in order, for "
            f"{', '.join(channels)}."
        )
    if not theirs or [n.casefold() for n in theirs] == [n.casefold() for n in channels]:
        return
    order = channel_order(theirs, channels)
    if order is not None:
        taken = ", ".join(f"{theirs[i]} for {name}" for i, name in zip(order, channels, strict=True))
        yield f"input channels are matched by name: the weights of {taken}."
    elif len(theirs) == 1 < len(channels):
        yield f"the checkpoint's one channel, {theirs[0]}, is the start for all of {', '.join(channels)}."
    else:
        mixed = "" if len(theirs) == len(channels) else " They are mixed, if --mix_input_channels allows it."
        in_order = "; they are taken in order" if len(theirs) == len(channels) > 1 else ""
        yield (
            f"the checkpoint's channels are called {', '.join(theirs)}, the dataset's {', '.join(channels)}{in_order}."
            f"{mixed}"
        )
