"""Moving pretrained weights into another network, with an account of every parameter.

`transfer` is a pure function: source weights and a target network in, a state dict and a `TransferReport` out. Nothing
is loaded and nothing is left out silently: each parameter of the target ends as transferred, adapted (how) or fresh
(why), and too little coverage is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.transfer.adaptation import fit_bias_table, fit_input_channels, fit_kernel, fit_upsampling_kernel
from nnunetv2_misfm.transfer.alignment import source_names

PARTS = ("stem", "encoder", "decoder", "segmentation layers")
TRANSFERRED, ADAPTED, FRESH = "transferred", "adapted", "fresh"

_OWN_STEM = re.compile(r"(?:encoder\.stems|decoder\.heads)\.(\d)\.")
# PCT-Net's and FMUNet's first layers; in other networks it is the first convolution.
_INPUT_LAYER = re.compile(r"encoder\.stems\.\d\.project\.weight|encoder\.stem\.weight")


class TransferError(UserError, RuntimeError):
    """Too little of the source fits the target; the message lists the first mismatches and what would allow it."""


@dataclass(frozen=True)
class Entry:
    """What happened to one parameter of the target.

    Attributes:
        name: in the target.
        part: one of `PARTS`.
        status: "transferred", "adapted" or "fresh".
        reason: how it was adapted or why it is fresh; empty if transferred.
        numel: elements of the parameter.
        shape: in the target.
    """

    name: str
    part: str
    status: str
    reason: str
    numel: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TransferReport:
    """The account of one transfer, one entry per parameter, each parameter once."""

    source: str
    entries: tuple[Entry, ...]

    def coverage(self, parts: Iterable[str] = PARTS) -> float:
        """Share of elements in `parts` that came from the source, adapted ones included; 1 if there are none."""
        chosen = set(parts)
        entries = [entry for entry in self.entries if entry.part in chosen]
        total = sum(entry.numel for entry in entries)
        return sum(entry.numel for entry in entries if entry.status != FRESH) / total if total else 1.0

    def table(self) -> str:
        """Totals by part for a terminal of 80 columns, followed by what is not simply transferred."""
        rows = [f"Weights from {self.source}", f"{'part':<20}{'parameters':>12}{'transferred':>13}{'adapted':>10}"]
        rows[1] += f"{'fresh':>10}{'used':>9}"
        for part in PARTS:
            entries = [entry for entry in self.entries if entry.part == part]
            if entries:
                rows.append(self._row(part, entries))
        rows.append(self._row("total", list(self.entries)))
        special = [entry for entry in self.entries if entry.status != TRANSFERRED]
        rows += [f"  {entry.status}: {entry.name} {list(entry.shape)} ({entry.reason})" for entry in special[:12]]
        if len(special) > 12:
            rows.append(f"  ... and {len(special) - 12} more; training writes all of them to transfer_report.json")
        return "\n".join(rows)

    def as_json(self) -> dict[str, Any]:
        """The whole account as plain data."""
        return {
            "source": self.source,
            "coverage": {part: self.coverage([part]) for part in PARTS} | {"total": self.coverage()},
            "parameters": [asdict(entry) for entry in self.entries],
        }

    @staticmethod
    def _row(name: str, entries: list[Entry]) -> str:
        by_status = {s: sum(e.numel for e in entries if e.status == s) for s in (TRANSFERRED, ADAPTED, FRESH)}
        total = sum(by_status.values())
        used = 100 * (total - by_status[FRESH]) / total if total else 100.0
        return (
            f"{name:<20}{total:>12,}{by_status[TRANSFERRED]:>13,}{by_status[ADAPTED]:>10,}{by_status[FRESH]:>10,}"
            f"{used:>8.2f}%"
        )


def transfer(
    source: Mapping[str, Tensor],
    source_name: str,
    target: nn.Module,
    *,
    source_arguments: Mapping[str, Any] | None = None,
    source_images: int | None = None,
    num_images: int | None = None,
    encoder_only: bool = False,
    mix_input_channels: bool = False,
    min_coverage: float = 1.0,
) -> tuple[dict[str, Tensor], TransferReport]:
    """The state dict that `target` should load to start from `source`.

    Segmentation layers always start fresh. Everything else is taken over as it is where the shapes agree, and adapted
    where what it computes can be kept (see `adaptation.py`): other input channels, kernels of another degree of
    anisotropy, other attention windows. Stems and stages are matched first (see `alignment.py`).

    Args:
        source: weights of the pretrained network.
        source_name: for the report and errors, usually the file's path.
        target: the network as built, its initial values used where something is fresh.
        source_arguments: constructor arguments of the pretrained network, as far as they are known.
        source_images: how many of the source's input channels are images, if not all.
        num_images: how many of the target's input channels are images; the rest are labels of a cascade's first stage.
        encoder_only: leave the decoder fresh, as most other tools do.
        mix_input_channels: allow several input channels of the source to be mixed for another number of channels.
        min_coverage: share of the elements outside the segmentation layers that must come from the source.

    Raises:
        TransferError: if the coverage is below `min_coverage`.
    """
    own = target.state_dict()
    result = {name: value.clone() for name, value in own.items()}
    names_of = _names_by_identity(target)
    find = source_names(source, source_arguments or {}, target)
    fit = _Fitting(target, source_images, num_images, encoder_only, mix_input_channels)
    entries = []
    for name, parameter in target.named_parameters():
        name_in_source = find(name)
        value, status, reason = fit.value_for(name, parameter, name_in_source, source)
        part = part_of(name)
        entries.append(Entry(name, part, status, reason, parameter.numel(), tuple(parameter.shape)))
        if value is not None:
            for alias in names_of[id(parameter)]:
                result[alias] = value.to(parameter.dtype)
    for name, buffer in target.named_buffers():
        # Buffers (BatchNorm statistics) belong to the weights around them; they are not counted as parameters.
        name_in_source = find(name)
        if name not in own or name_in_source is None or _left_out(part_of(name), encoder_only):
            continue
        in_source = source.get(name_in_source)
        if in_source is not None and in_source.shape == buffer.shape:
            for alias in names_of[id(buffer)]:
                result[alias] = in_source.to(buffer.dtype)
    report = TransferReport(source_name, tuple(entries))
    _require(report, min_coverage, encoder_only)
    return result, report


def part_of(name: str) -> str:
    """The part of the network a parameter belongs to, from its name in a network of ours or of nnU-Net."""
    if ".seg_layers." in f".{name}":
        return "segmentation layers"
    if name.startswith(("encoder.stem", "decoder.encoder.stem")):
        return "stem"
    if name.startswith(("encoder.", "decoder.encoder.")):
        return "encoder"
    return "decoder"


def is_alias(name: str) -> bool:
    """Whether a state dict of nnU-Net's networks names a parameter a second time: decoders hold the encoder too."""
    return name.startswith("decoder.encoder.") or ".all_modules." in name


def _left_out(part: str, encoder_only: bool) -> bool:
    return part == "segmentation layers" or (encoder_only and part == "decoder")


class _Fitting:
    """Finds the value of one parameter of the target after another."""

    def __init__(
        self,
        target: nn.Module,
        source_images: int | None,
        num_images: int | None,
        encoder_only: bool,
        mix_input_channels: bool,
    ):
        self.encoder_only = encoder_only
        self.mix_input_channels = mix_input_channels
        convolutions = [(f"{n}.weight", m) for n, m in target.named_modules() if isinstance(m, (nn.Conv3d, nn.Conv2d))]
        stems = [name for name, _ in convolutions if _INPUT_LAYER.match(name)]
        self.input_layers = stems or [name for name, _ in convolutions[:1]]
        self.upsampling = {f"{n}.weight" for n, m in target.named_modules() if isinstance(m, nn.ConvTranspose3d)}
        self.source_images = source_images
        self.num_images = num_images

    def value_for(
        self, name: str, parameter: Tensor, name_in_source: str | None, source: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, str, str]:
        """The value, or None; the status; how it was adapted or why it is fresh."""
        part = part_of(name)
        if part == "segmentation layers":
            return None, FRESH, "segmentation layers always start fresh"
        if _left_out(part, self.encoder_only):
            return None, FRESH, "only the encoder was asked for"
        if name_in_source is None or name_in_source not in source:
            return None, FRESH, "not in the source"
        value, steps = source[name_in_source], []
        stem = _OWN_STEM.match(name_in_source)
        if stem is not None and not name.startswith(stem[0]):
            steps.append(f"from degree of anisotropy {stem[1]}")
        if name in self.input_layers:
            return self._input_layer(parameter, value, steps)
        if value.shape == parameter.shape:
            return (value, ADAPTED, steps[0]) if steps else (value, TRANSFERRED, "")
        fitted: Tensor | None = value
        if name.endswith("relative_position_bias_table") and value.ndim == 2:
            fitted = fit_bias_table(value, parameter.shape[0])
            steps.append(f"interpolated from {value.shape[0]} to {parameter.shape[0]} relative positions")
        elif value.ndim == parameter.ndim == 5:
            if value.shape[2:] != parameter.shape[2:]:
                fit = fit_upsampling_kernel if name in self.upsampling else fit_kernel
                fitted = fit(value, parameter.shape[2:])
                steps.append(f"kernel {list(value.shape[2:])} to {list(parameter.shape[2:])}")
        if fitted is None or fitted.shape != parameter.shape:
            return None, FRESH, f"shape {list(value.shape)} in the source"
        return fitted, ADAPTED, ", ".join(steps)

    def _input_layer(self, parameter: Tensor, value: Tensor, steps: list[str]) -> tuple[Tensor | None, str, str]:
        """As `value_for`, for a first convolution, which sees images and, in a cascade, labels after them."""
        have = self.source_images or value.shape[1]
        images = self.num_images or parameter.shape[1]
        fitted: Tensor | None = value
        if value.shape[2:] != parameter.shape[2:]:
            fitted = fit_kernel(value, parameter.shape[2:])
            steps = [*steps, f"kernel {list(value.shape[2:])} to {list(parameter.shape[2:])}"]
        if fitted is not None and (value.shape[1], have) != (parameter.shape[1], images):
            if have not in (1, images) and not self.mix_input_channels:
                return None, FRESH, f"{have} input channels in the source; --mix_input_channels would mix them"
            fitted = fit_input_channels(fitted[:, :have], images, parameter.shape[1])
            steps = [*steps, f"input channels {value.shape[1]} to {parameter.shape[1]}"]
        if fitted is None or fitted.shape != parameter.shape:
            return None, FRESH, f"shape {list(value.shape)} in the source"
        return (fitted, ADAPTED, ", ".join(steps)) if steps else (fitted, TRANSFERRED, "")


def _names_by_identity(network: nn.Module) -> dict[int, list[str]]:
    # nnU-Net's U-Nets list their encoder's parameters a second time under the decoder.
    names: dict[int, list[str]] = {}
    for listed in (network.named_parameters, network.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return names


def _require(report: TransferReport, min_coverage: float, encoder_only: bool) -> None:
    parts = ["stem", "encoder"] if encoder_only else ["stem", "encoder", "decoder"]
    coverage = report.coverage(parts)
    if coverage >= min_coverage:
        return
    wrong = [entry for entry in report.entries if entry.status == FRESH and entry.part in parts]
    lines = [f"  {entry.name} {list(entry.shape)}: {entry.reason}" for entry in wrong[:8]]
    if len(wrong) > 8:
        lines.append(f"  ... and {len(wrong) - 8} more")
    raise TransferError(
        f"{report.source} covers {100 * coverage:.2f} % of the network's {', '.join(parts)}; the plan asks for "
        f"{100 * min_coverage:.2f} %. First mismatches:\n" + "\n".join(lines) + "\n"
        "Use a checkpoint of the same network, or allow this with misfm_plan -min_coverage or --encoder_only."
    )
