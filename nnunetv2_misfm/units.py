"""Numbers with their units, for people."""

from __future__ import annotations


def format_duration(hours: float) -> str:
    """A time for people, in minutes (at least one), hours or days."""
    if hours < 1.5:
        minutes = max(1, round(60 * hours))
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def format_bytes(number: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:  # which would be rounded to 1e+03
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
