"""The account of a transfer: what became of each parameter of the target, and of each tensor of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nnunetv2_misfm.checkpoints.names import LEARNING_PARTS, PARTS

TRANSFERRED, ADAPTED, FRESH = "transferred", "adapted", "fresh"
_MOST_LINES = 12
_NEARLY_ALL = 0.9  # stems for other anisotropies, statistics


def percent(share: float) -> float:
    """A share in percent, which is 100 only for all: what a report says is whole has nothing fresh in it."""
    return 100.0 if share == 1 else min(100 * share, 99.99)


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
class Unused:
    """A tensor of the checkpoint that the target does not start from.

    Attributes:
        name: in the checkpoint.
        part: one of `PARTS`, or "other".
        reason: why it is not used.
        numel: its elements.
    """

    name: str
    part: str
    reason: str
    numel: int


@dataclass(frozen=True)
class TransferReport:
    """The account of one transfer.

    Attributes:
        source: name of the checkpoint.
        entries: one for each parameter of the target.
        expected: the parts that the checkpoint can be expected to fill.
        unused: what the target does not start from.
        notes: what should be known of how the two fit.
    """

    source: str
    entries: tuple[Entry, ...]
    expected: tuple[str, ...] = LEARNING_PARTS
    unused: tuple[Unused, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TransferReport:
        """The report that `as_json` has written."""
        entries = (Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in content["parameters"])
        unused = (Unused(**tensor) for tensor in content.get("unused", ()))
        return cls(
            content["source"],
            tuple(entries),
            tuple(content.get("expected", LEARNING_PARTS)),
            tuple(unused),
            tuple(content.get("notes", ())),
        )

    def coverage(self, parts: Iterable[str] = PARTS) -> float:
        """Share of elements in `parts` that came from the source, adapted ones included; 1 if there are none."""
        chosen = set(parts)
        entries = [entry for entry in self.entries if entry.part in chosen]
        total = sum(entry.numel for entry in entries)
        return sum(entry.numel for entry in entries if entry.status != FRESH) / total if total else 1.0

    def share_of_source(self) -> float:
        """Share of the checkpoint's elements in the expected parts that the target starts from."""
        left_out = sum(tensor.numel for tensor in self.unused if tensor.part in self.expected)
        used = sum(entry.numel for entry in self.entries if entry.status != FRESH)
        return used / (used + left_out) if used else 0.0

    def share(self) -> str:
        """One line: how much of what can be expected comes from the checkpoint, of which part, and if much is left."""
        by_part = [
            f"{part} {percent(self.coverage([part])):.4g} %"
            for part in LEARNING_PARTS
            if any(entry.part == part for entry in self.entries)
        ]
        found = f"{percent(self.coverage(self.expected)):.4g} % of {', '.join(self.expected)} ({', '.join(by_part)})"
        share = self.share_of_source()
        if share > _NEARLY_ALL:
            return found
        return f"{found}, but only {100 * share:.0f} % of the checkpoint's are used: it has stages or layers more"

    def table(self) -> str:
        """Totals by part for a terminal of 80 columns, what is not simply transferred, and what is not used."""
        rows = [f"Weights from {self.source}", f"{'part':<20}{'parameters':>12}{'transferred':>13}{'adapted':>10}"]
        rows[1] += f"{'fresh':>10}{'used':>9}"
        for part in PARTS:
            entries = [entry for entry in self.entries if entry.part == part]
            if entries:
                rows.append(_row(part, entries))
        rows.append(_row("total", list(self.entries)))
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            if entry.status != TRANSFERRED:
                groups.setdefault((entry.status, entry.reason), []).append(entry)
        for (status, reason), entries in list(groups.items())[:_MOST_LINES]:
            first = f"{entries[0].name} {list(entries[0].shape)}"
            some = f"{len(entries)} parameters such as {first}" if len(entries) > 1 else first
            rows.append(f"  {status}: {some} ({reason})")
        if len(groups) > _MOST_LINES:
            rows.append(f"  ... and for {len(groups) - _MOST_LINES} more reasons")
        rows += self.unused_lines()
        return "\n".join([*rows, *(f"Note: {note}" for note in self.notes)])

    def unused_lines(self) -> Iterator[str]:
        """What of the checkpoint is not used, one line for each part and reason."""
        groups: dict[tuple[str, str], list[Unused]] = {}
        for tensor in self.unused:
            groups.setdefault((tensor.part, tensor.reason), []).append(tensor)
        if groups:
            yield "Not used of the checkpoint:"
        for (part, reason), tensors in sorted(groups.items()):
            count = f"{len(tensors)} tensors such as {tensors[0].name}" if len(tensors) > 1 else tensors[0].name
            yield f"  {part}: {count} ({reason})"

    def as_json(self) -> dict[str, Any]:
        """The whole account as plain data."""
        return {
            "source": self.source,
            "coverage": {part: self.coverage([part]) for part in PARTS} | {"total": self.coverage()},
            "expected": list(self.expected),
            "notes": list(self.notes),
            "parameters": [asdict(entry) for entry in self.entries],
            "unused": [asdict(tensor) for tensor in self.unused],
        }


def _row(name: str, entries: list[Entry]) -> str:
    by_status = {s: sum(e.numel for e in entries if e.status == s) for s in (TRANSFERRED, ADAPTED, FRESH)}
    total = sum(by_status.values())
    used = percent((total - by_status[FRESH]) / total if total else 1.0)
    return (
        f"{name:<20}{total:>12,}{by_status[TRANSFERRED]:>13,}{by_status[ADAPTED]:>10,}{by_status[FRESH]:>10,}"
        f"{used:>8.2f}%"
    )
