"""Options of the commands that come from declared settings: their flags, types, choices and help texts."""

from __future__ import annotations

import argparse
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from nnunetv2_misfm.plans.settings import Settings, declared


def add_setting_options(parser: argparse.ArgumentParser, title: str, kind: type[Settings], *but: str) -> None:
    """Add an option for every setting of a group, named as the setting is; not given, it is None.

    Args:
        parser: of the command.
        title: of the group in the help.
        kind: the settings.
        but: settings that the command offers in another way.
    """
    group = parser.add_argument_group(title)
    for name, field in kind.model_fields.items():
        if name in but:
            continue
        flag, default = flag_of(kind, name), field.default
        help = str(field.description).replace("%", "%%")
        if isinstance(default, bool):
            text = declared(kind, name, "off").replace("%", "%%") if default else help
            group.add_argument(flag, dest=name, action="store_const", const=not default, help=text)
            continue
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = help if default is None or "default" in help else f"{help} (default: {shown})"
        former = declared(kind, name, "former")
        group.add_argument(flag, help=text, **_reading(field.annotation, former))


def flag_of(kind: type[Settings], name: str) -> str:
    """The option of a setting: one dash for values, two for switches away from the default."""
    default = kind.model_fields[name].default
    if not isinstance(default, bool):
        return f"-{name}"
    return f"--no_{name}" if default else f"--{name}"


def given(options: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """The settings of a group that the user gave."""
    values = {name: getattr(options, name, None) for name in kind.model_fields}
    return {name: _as_setting(value) for name, value in values.items() if value is not None}


def _reading(annotation: Any, former: dict[str, str]) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
    if len(kinds) > 1:
        return {"nargs": "+", "metavar": "V"}  # words or numbers, told apart by `given`
    (kind,) = kinds
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "type": lambda word: former.get(word, word)}
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return {"nargs": len(parts), "type": parts[0], "metavar": "N"}
    return {"type": kind, "metavar": "N"}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _as_setting(value: Any) -> Any:
    """An option's value as the setting has it: one word as it is, words that are numbers as numbers."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(part, str) for part in value):
        return tuple(value)
    try:
        return tuple(float(part) for part in value)
    except ValueError:
        return " ".join(value)
