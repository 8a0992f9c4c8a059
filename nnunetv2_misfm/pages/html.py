"""Pages from templates: one HTML file that needs nothing else, in light and dark, on a screen or a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nnunetv2_misfm.files import written_whole


def write_page(
    path: Path, template: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> None:
    """Write a page; it appears complete or not at all.

    Args:
        path: of the HTML file.
        template: a Jinja template of this package, such as `trainers/run_page.html.j2`; it extends
            `pages/base.html.j2` and fills its blocks `title` and `content`.
        values: what the template names.
        filters: that it uses besides Jinja's own and `number`.
    """
    environment = Environment(
        loader=PackageLoader("nnunetv2_misfm", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": number, **(filters or {})}
    text = environment.get_template(template).render(values)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def number(value: float, digits: int = 1) -> str:
    """With so many digits after the point; a dash for nan."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
