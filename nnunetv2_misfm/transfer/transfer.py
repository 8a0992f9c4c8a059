"""Moving pretrained weights into another network, with an account of every parameter.

`transfer` is a pure function: source weights and a target network in, a state dict and a `TransferReport` out. Nothing
is loaded and nothing is left out silently: each parameter of the target ends as transferred, adapted (how) or fresh
(why), and too little coverage is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_misfm.errors import UserError

PARTS = ("stem", "encoder", "decoder", "segmentation layers")
TRANSFERRED, ADAPTED, FRESH = "transferred", "adapted", "fresh"


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
            rows.append(f"  ... and {len(special) - 12} more; the full list is in transfer_report.json")
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
    encoder_only: bool = False,
    min_coverage: float = 1.0,
) -> tuple[dict[str, Tensor], TransferReport]:
    """The state dict that `target` should load to start from `source`.

    Segmentation layers always start fresh. A stem with another number of input channels is adapted: each filter is
    summed over the source's channels and spread evenly over the target's, so that an image repeated over all channels
    gives the response the source gives to it.

    Args:
        source: weights of the pretrained network, under the target's names.
        source_name: for the report and errors, usually the file's path.
        target: the network as built, its initial values used where something is fresh.
        encoder_only: leave the decoder fresh, as most other tools do.
        min_coverage: share of the elements outside the segmentation layers that must come from the source.

    Raises:
        TransferError: if the coverage is below `min_coverage`.
    """
    own = target.state_dict()
    result = {name: value.clone() for name, value in own.items()}
    entries = []
    parameters = dict(target.named_parameters())
    names_of = _names_by_identity(target)
    for name, parameter in parameters.items():
        part = part_of(name)
        value, status, reason = _value_for(name, part, parameter, source, encoder_only)
        entries.append(Entry(name, part, status, reason, parameter.numel(), tuple(parameter.shape)))
        if value is not None:
            for alias in names_of[id(parameter)]:
                result[alias] = value.to(parameter.dtype)
    for name, value in own.items():
        # Buffers (BatchNorm statistics) belong to the weights around them; they are not counted as parameters.
        is_buffer = name not in {alias for aliases in names_of.values() for alias in aliases}
        usable = name in source and source[name].shape == value.shape and not _left_out(part_of(name), encoder_only)
        if is_buffer and usable:
            result[name] = source[name].to(value.dtype)
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


def _left_out(part: str, encoder_only: bool) -> bool:
    return part == "segmentation layers" or (encoder_only and part == "decoder")


def _value_for(
    name: str, part: str, parameter: Tensor, source: Mapping[str, Tensor], encoder_only: bool
) -> tuple[Tensor | None, str, str]:
    if part == "segmentation layers":
        return None, FRESH, "segmentation layers always start fresh"
    if _left_out(part, encoder_only):
        return None, FRESH, "only the encoder was asked for"
    if name not in source:
        return None, FRESH, "not in the source"
    value = source[name]
    if value.shape == parameter.shape:
        return value, TRANSFERRED, ""
    adapted = _spread_over_input_channels(value, parameter.shape)
    if part == "stem" and adapted is not None:
        return adapted, ADAPTED, f"input channels {value.shape[1]} to {parameter.shape[1]}"
    return None, FRESH, f"shape {list(value.shape)} in the source"


def _spread_over_input_channels(value: Tensor, shape: torch.Size) -> Tensor | None:
    same_otherwise = value.ndim == len(shape) == 5 and value.shape[0] == shape[0] and value.shape[2:] == shape[2:]
    if not same_otherwise:
        return None
    return value.sum(1, keepdim=True).expand(shape) / shape[1]


def _names_by_identity(network: nn.Module) -> dict[int, list[str]]:
    # nnU-Net's U-Nets list their encoder's parameters a second time under the decoder.
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
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
        "Use a checkpoint of the same network, with stems for the same degree of anisotropy, or allow this with "
        "misfm_plan -min_coverage or --encoder_only."
    )
