"""Pages from templates: one HTML file that needs nothing else, in light and dark, on a screen or a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from nnunetv2_misfm.files import written_whole

_BASE = "base.html.j2"


def write_page(
    path: Path, template: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> None:
    """Write a page; it appears complete or not at all.

    Args:
        path: of the HTML file.
        template: text of a Jinja template that extends `base.html.j2` and fills its blocks `title` and `content`.
        values: what the template names.
        filters: that it uses besides Jinja's own and `number`.
    """
    base = files(__package__).joinpath(_BASE).read_text(encoding="utf-8")
    environment = Environment(
        loader=DictLoader({_BASE: base}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": number, **(filters or {})}
    text = environment.from_string(template).render(values)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def number(value: float, digits: int = 1) -> str:
    """With so many digits after the point; a dash for nan."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
