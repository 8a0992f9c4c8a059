"""What the weights of a PCT-Net or FMUNet tell of it, for files that hold nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo
from nnunetv2_misfm.checkpoints.foreign import FMUNET, Kind
from nnunetv2_misfm.plans.checks import build_on_meta
from nnunetv2_misfm.plans.network_entry import architecture_entry

_HEADS = "decoder.seg_layers."
_MAY_BE_LEFT_OUT = (_HEADS, "decoder.")
_USUAL = {"window_size": 6, "n_swin_blocks": 2, "mlp_ratio": 4.0}  # PCTNet's defaults


def describe_own(weights: Mapping[str, Tensor], kind: Kind) -> CheckpointInfo | None:
    """The description of a PCT-Net or FMUNet whose file has none; None if its weights are not complete.

    Its segmentation layers or its decoder may be left out, as where only features are given away. Nothing is known of
    the images that it was trained on, and of dropout.
    """
    try:
        info = told_fmunet(weights) if kind is FMUNET else told_pctnet(weights)
        check_complete(weights, info)
    except (KeyError, IndexError, ValueError):
        return None
    return info


def told_pctnet(weights: Mapping[str, Tensor]) -> CheckpointInfo:
    """What the weights of a PCT-Net tell of it; raises a KeyError or IndexError if they are not complete."""
    stems = sorted({int(name.split(".")[2]) for name in weights if name.startswith("encoder.stems.")})
    stem = f"encoder.stems.{stems[0]}"
    convolutions = (f"{stem}.project", f"{stem}.down1.3", f"{stem}.down2.3", "encoder.down3.3", "encoder.down4.3")
    features = [weights[f"{name}.weight"].shape[0] for name in convolutions]
    # Counted over all stages: where a file lacks a block, another still has it, and the file is seen to be incomplete.
    blocks = {name.split(".swin.")[1].partition(".")[0] for name in weights if ".swin." in name}
    tables = [weights[f"encoder.stage{i}.swin.0.attention.relative_position_bias_table"] for i in (2, 3, 4)]
    found = {
        "window_size": (round(tables[0].shape[0] ** (1 / 3)) + 1) // 2,
        "n_swin_blocks": len(blocks),
        "mlp_ratio": weights["encoder.stage2.swin.0.mlp.0.weight"].shape[0] / features[2],
    }
    arguments = {
        "features_per_stage": features,
        "num_heads": [table.shape[1] for table in tables],
        "stems": stems,
        **{name: value for name, value in found.items() if value != _USUAL[name]},
    }
    entry = architecture_entry("pctnet", stems[0], **arguments)
    return _told(entry, weights[f"{stem}.project.weight"], weights)


def told_fmunet(weights: Mapping[str, Tensor]) -> CheckpointInfo:
    """What the weights of an FMUNet tell of it; raises a KeyError if they are not complete."""
    # It has one stem; which degree it was trained for shows in the kernels of its first two stages.
    first = [weights[f"encoder.stages.{i}.convs.0.3.weight"] for i in range(5)]
    degree = sum(kernel.shape[2] == 1 for kernel in first[:2])
    depth = len({name.split(".")[4] for name in weights if name.startswith("encoder.stages.") and ".convs." in name})
    arguments = {"features_per_stage": [kernel.shape[0] for kernel in first], "depth": depth}
    entry = architecture_entry("fmunet", degree, **arguments)
    return _told(entry, weights["encoder.stem.weight"], weights)


def _told(entry: Mapping[str, Any], first: Tensor, weights: Mapping[str, Tensor]) -> CheckpointInfo:
    """A network by its entry in plans, the kernel of its first convolution and its weights: no heads, no classes."""
    name, arguments = entry["network_class_name"], entry["arch_kwargs"]
    head = weights.get(f"{_HEADS}0.weight")
    classes = 0 if head is None else head.shape[0]
    return CheckpointInfo("unknown", name, arguments, first.shape[1], classes, {}, {})


def check_complete(weights: Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Raise a ValueError unless these are all tensors of the network, each in its shape."""
    entry = {"network_class_name": info.network_class_name, "arch_kwargs": info.arch_kwargs, "_kw_requires_import": []}
    expected = build_on_meta(entry, info.input_channels, max(1, info.num_classes)).state_dict()
    absent = tuple(part for part in _MAY_BE_LEFT_OUT if not any(name.startswith(part) for name in weights))
    missing = sorted(name for name in set(expected) - set(weights) if not name.startswith(absent))
    if missing:
        raise ValueError(f"it lacks {len(missing)} of {len(expected)} tensors, here called {_first(missing)}")
    wrong = [
        f"{name} {list(weights[name].shape)} for {list(shape.shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape.shape
    ]
    wrong += [f"{name}, which there should not be" for name in sorted(set(weights) - set(expected))]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are not those of the network, here called {_first(wrong)}")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
