"""What a checkpoint says about itself: as text for a terminal, and as a model card beside its exported weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_misfm.checkpoints.checkpoint import LEARNT, CheckpointError, CheckpointInfo
from nnunetv2_misfm.checkpoints.described import is_complete_unet
from nnunetv2_misfm.checkpoints.hub import EXPORTED
from nnunetv2_misfm.checkpoints.names import LEARNING_PARTS, OTHER, PARTS, Names
from nnunetv2_misfm.checkpoints.safetensors_file import write_safetensors
from nnunetv2_misfm.checkpoints.shrunk_weights import shrunk_weights
from nnunetv2_misfm.checkpoints.source import Source, file_sha256, read_source
from nnunetv2_misfm.checkpoints.unet_weights import is_statistic
from nnunetv2_misfm.plans.checks import INTENSITIES
from nnunetv2_misfm.plans.network_entry import UNET_ARGUMENTS, own_network_name
from nnunetv2_misfm.plans.normalisation import CT
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS

# Constructor arguments that hardly differ from one of nnU-Net's networks to another.
_USUAL = ("n_stages", "conv_op", "conv_bias", "kernel_sizes", "dropout_op", "dropout_op_kwargs")
_OF_PREPROCESSING = ("dataset_name", "spacing", "patch_size", "normalization_schemes", "transpose_forward")


def describe(source: Source, exported: Path | None = None) -> str:
    """File, network, weights by part, input, training and package versions, one item a line.

    Args:
        source: the checkpoint.
        exported: the file that its weights were written to, to describe that one.
    """
    named = [("file", source.path), ("on the Hub", source.hub_name), ("kind", _kind(source)), ("sha256", source.sha256)]
    if exported is not None:
        named = [("sha256", file_sha256(exported)), ("made from", _kind(source)), ("  sha256", source.sha256)]
    rows: list[tuple[str, Any]] = [
        *named,
        ("parameters", _parameters(source)),
        ("not trained", "; ".join(source.untrained.values())),
        ("shrunk to nothing", _shrunk(source)),
        *_description(source),
    ]
    rows += [("note", note) for note in source.notes]
    rows = [(name, value) for name, value in rows if value not in (None, "")]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _kind(source: Source) -> str:
    if source.by_this_package and source.info is not None and not source.info.versions:
        return f"the weights of a {source.network_name}, exported by this package, plain data only"
    if source.by_this_package:
        return "a checkpoint of this package, plain data only"
    if source.kind is not None and source.kind.refusal:
        return f"a {source.network_name}, which cannot be used: {source.kind.refusal}"
    known = source.network_name if source.kind is None else source.kind.name
    return f"a {known}, plain data only"


def _parameters(source: Source) -> str:
    names = source.names or Names()
    elements = dict.fromkeys((*PARTS, OTHER), 0)
    for name, value in source.weights.items():
        if not is_statistic(name):
            elements[names.part_of(name)] += value.numel()
    return ", ".join(f"{part} {count:,}" for part, count in elements.items() if count)


def _shrunk(source: Source) -> str:
    shrunk = shrunk_weights(source.weights)
    return "" if shrunk is None else f"{shrunk}; fine-tuning starts from zero there"


def _description(source: Source) -> list[tuple[str, Any]]:
    info = source.info
    images = [(f"  {name}", value) for name, value in _preprocessing(source.preprocessing)]
    if info is None:
        channels = ("  input channels", ", ".join(source.channels))
        return [("network", "not described"), ("learnt", source.learnt), channels, *images]
    training = {name: value for name, value in info.training.items() if name not in ("task", LEARNT)}
    return [
        ("network", info.network_class_name),
        ("  arguments", _short(_unusual(info.arch_kwargs))),
        ("  input channels", _channels(source)),
        ("  classes", info.num_classes or "none"),
        ("task", info.training.get("task", info.task)),
        ("learnt", source.learnt),
        *images,
        *((f"  {name}", _short(value)) for name, value in training.items()),
        ("written by", ", ".join(f"{name} {version}" for name, version in info.versions.items()) or "unknown"),
    ]


def _unusual(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a network that may differ from those of other networks of its class."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in _USUAL and (name not in UNET_ARGUMENTS or value != UNET_ARGUMENTS[name])
    }


def _channels(source: Source) -> str:
    assert source.info is not None
    labels = source.info.input_channels - (source.num_images or source.info.input_channels)
    names = f" ({', '.join(source.channels)})" if source.channels else ""
    return f"{source.info.input_channels}{names}{f', of which {labels} are labels of a cascade' if labels else ''}"


def _preprocessing(preprocessing: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, _short(preprocessing[name])) for name in _OF_PREPROCESSING if name in preprocessing]
    schemes, windows = preprocessing.get("normalization_schemes", ()), preprocessing.get(INTENSITIES, {})
    for channel, scheme in enumerate(schemes):
        window = windows.get(str(channel))
        if scheme == CT and window is not None:
            of_channel = f" of channel {channel}" if len(schemes) > 1 else ""
            told = f"{window['percentile_00_5']:g} to {window['percentile_99_5']:g} HU, mean {window['mean']:g}"
            rows.append((f"CT window{of_channel}", f"{told}, standard deviation {window['std']:g}"))
    return rows


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def export(checkpoint: str, folder: Path, licence: str | None) -> str:
    """Write model.safetensors and README.md into a new folder, which appears when both are complete.

    Returns the options of misfm_plan for the network that the weights are of, each with a space before it.

    Args:
        checkpoint: of a network that is known here.
        folder: must not exist.
        licence: for the card, by its name on the Hub; the card asks for it if there is none.

    Raises:
        CheckpointError: if the checkpoint does not say which network it holds, or cannot be read.
    """
    source = read_source(checkpoint)
    if source.info is None:
        raise CheckpointError(
            f"{checkpoint} does not say which network it holds, a {source.network_name}; only checkpoints of this "
            f"package, of nnU-Net's U-Nets and published MIS-FM files can be exported."
        )
    source.check_is_3d()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        trained = [part for part in LEARNING_PARTS if part not in source.untrained]
        write_safetensors(source.weights, source.info, temporary / EXPORTED, trained, source.channels)
        (temporary / "README.md").write_text(model_card(source, licence, temporary / EXPORTED), encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _network_options(source.info)


def model_card(source: Source, licence: str | None, exported: Path) -> str:
    """The card of exported weights: what they are, how to use them, how they were made."""
    assert source.info is not None
    network = source.info.network_class_name.rpartition(".")[2]
    task = [source.info.task.replace("_", "-")] if source.info.task in PRETEXT_TASKS else []
    tags = ["medical", "segmentation", "nnunet", *task]
    of_misfm = source.info.task == "volume_fusion"
    method = "\nMethod: MIS-FM ([arXiv 2306.16925](https://arxiv.org/abs/2306.16925))." if of_misfm else ""
    front = ["library_name: nnunetv2_misfm", f"tags: [{', '.join(tags)}]"]
    front += [f"license: {licence}"] if licence else []
    to_fill = "" if licence else "\n\n> No licence was given; add one to the first lines of this file."
    header = "\n".join(["---", *front, "---"])
    return f"""{header}

# {network}, {source.info.task.replace("_", " ")}{to_fill}

Weights for fine-tuning in [nnU-Net v2](https://github.com/MIC-DKFZ/nnUNet) with the plugin nnunetv2_misfm.{method}

```bash
misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights hf:OWNER/NAME{_network_options(source.info)}
nnUNetv2_train DATASET_ID 3d_fullres 0 -tr MisFMTrainer -p nnUNetMisFMPlans
```

How they were made:

```
{describe(source, exported)}
```
"""


def _network_options(info: CheckpointInfo) -> str:
    """Of misfm_plan, for the network that the weights are of."""
    if own_network_name(info.network_class_name) is not None:
        return ""
    if is_complete_unet(info):
        return " -network pretrained"
    return f" -p PLANS  # which name {info.network_class_name}"
