"""What a checkpoint says about itself, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2_misfm.transfer.pretrained import Source
from nnunetv2_misfm.transfer.shrunk_weights import shrunk_weights
from nnunetv2_misfm.transfer.transfer import PARTS, is_alias, part_of

_KINDS = {
    "nnunetv2_misfm": "a checkpoint of this package",
    "nnunetv2": "a checkpoint of nnU-Net",
    "published": "a published MIS-FM file",
}


def describe(source: Source) -> str:
    """File, network, weights by part, input, training and package versions, one item a line."""
    elements = dict.fromkeys(PARTS, 0)
    for name, value in source.weights.items():
        # The statistics of BatchNorm do not count.
        if not is_alias(name) and not _is_buffer(name):
            elements[part_of(name)] += value.numel()
    rows: list[tuple[str, Any]] = [
        ("file", source.path),
        ("kind", f"{_KINDS[source.kind]}, plain data only"),
        ("sha256", source.sha256),
        ("parameters", ", ".join(f"{part} {count:,}" for part, count in elements.items() if count)),
    ]
    shrunk = shrunk_weights(source.weights)
    if shrunk is not None:
        rows.append(("shrunk to nothing", f"{shrunk}; fine-tuning starts from zero there"))
    if source.hub_name:
        rows.insert(1, ("on the Hub", source.hub_name))
    info = source.info
    if info is None:
        rows.append(("network", "not described; aligned by the plans it was trained with, if it has them"))
    else:
        rows += [
            ("network", info.network_class_name),
            ("  arguments", _short(info.arch_kwargs)),
            ("  input channels", info.input_channels),
            ("  classes", info.num_classes),
            ("task", info.task),
            *((f"  {name}", value) for name, value in _preprocessing(info.preprocessing)),
            *((f"  {name}", _short(value)) for name, value in info.training.items() if name != "task"),
            ("written by", ", ".join(f"{name} {version}" for name, version in info.versions.items()) or "unknown"),
        ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _preprocessing(preprocessing: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("dataset_name", "spacing", "patch_size", "normalization_schemes", "transpose_forward")
    rows = [(name, _short(preprocessing[name])) for name in names if name in preprocessing]
    if "CTNormalization" in preprocessing.get("normalization_schemes", ()):
        window = preprocessing["foreground_intensity_properties_per_channel"]["0"]
        rows.append(("CT window", f"{window['percentile_00_5']:g} to {window['percentile_99_5']:g} HU"))
    return rows


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
