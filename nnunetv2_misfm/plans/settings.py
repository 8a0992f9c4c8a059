"""Settings: each declared once, with its type, limits, help and whether a run that goes on may change it.

A group of settings (a run, fusion, augmentation, a pool) is a class of `setting(...)` fields that lives beside the code
it steers. Its values are plain JSON types, so the same object can be written into a plans file and read back. Checks,
the options of the commands, the JSON in the plans and the comparison of runs all come from the declaration.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from nnunetv2_misfm.errors import UserError


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    may_change: bool = False,
    former: Mapping[str, str] | None = None,
    off: str = "",
) -> Any:
    """Declare a setting as a field of a `Settings` class.

    Args:
        default: its value where none is given; plans of older versions, which lack it, are read with it.
        help: what it does, with its unit, as one phrase; the help text of its option too.
        low, high, above: limits of a number, or of each of several numbers; `above` is not reached itself.
        may_change: whether a run that goes on may have another value.
        former: values under the names that older plans and scripts give them, with the names of today.
        off: for a switch that is on by default, what its option does, which switches it off.
    """
    limits: dict[str, Any] = {"low": low, "high": high, "above": above}
    extra: dict[str, Any] = {"limits": limits, "may_change": may_change, "former": dict(former or {}), "off": off}
    return Field(default, description=help, json_schema_extra=extra)


class Settings(BaseModel):
    """A group of settings. Fields are declared by `setting`; two numbers of one setting are a range, lowest first."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any, info: ValidationInfo) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if value is None or any(isinstance(number, (str, bool)) for number in numbers):
            return value
        limits = declared(cls, str(info.field_name), "limits")
        low, high, above = limits["low"], limits["high"], limits["above"]
        good = all(
            (low is None or number >= low) and (high is None or number <= high) and (above is None or number > above)
            for number in numbers
        )
        if not good:
            words = {"low": "at least {:g}", "above": "above {:g}", "high": "at most {:g}"}
            wanted = " and ".join(words[name].format(limits[name]) for name in words if limits[name] is not None)
            raise ValueError(f"must be {wanted}")
        if len(numbers) == 2 and numbers[0] > numbers[1]:
            raise ValueError("must be two numbers, the lower one first")
        return value


SettingsT = TypeVar("SettingsT", bound=Settings)


class SettingsError(UserError, ValueError):
    """One or more settings cannot be used; the message lists all of them with the place they come from."""

    def __init__(self, where: str, problems: Iterable[str]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{where} cannot be used:\n{lines}")


def declared(cls: type[Settings], name: str, what: str) -> Any:
    """What `setting` was told about a field: its `limits`, `may_change`, `former` or `off`."""
    extra = cls.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra[what]


def as_of_today(cls: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the values that have had another name under the name of today."""
    former = {name: declared(cls, name, "former") for name in cls.model_fields}
    return {
        name: former[name].get(value, value) if name in former and isinstance(value, str) else value
        for name, value in values.items()
    }


def read_settings(
    cls: type[SettingsT], values: Mapping[str, Any], where: str, defaults: SettingsT | None = None
) -> SettingsT:
    """Build `cls` from a JSON mapping; unknown names, wrong types and bad values are reported together.

    Args:
        cls: the group of settings.
        values: the mapping as read from JSON; lists become tuples.
        where: what the values are and where they come from, for the error message.
        defaults: of settings that are not among the values, in place of the declared ones.

    Raises:
        SettingsError: with one line per setting that cannot be used.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(where, [f"it must be an object with named settings, not {values!r}"])
    if defaults is not None:
        values = {**defaults.model_dump(mode="json", exclude_defaults=True), **values}
    try:
        return cls(**as_of_today(cls, {str(name): as_tuples(value) for name, value in values.items()}))
    except ValidationError as error:
        problems: dict[str, str] = {}
        for detail in error.errors():
            name = str(detail["loc"][0])
            problems.setdefault(name, _problem(cls, name, values.get(name), detail["type"], detail["msg"]))
        raise SettingsError(where, problems.values()) from error


def write_settings(settings: Settings) -> dict[str, Any]:
    """The settings as a JSON mapping that `read_settings` turns back into an equal object."""
    return settings.model_dump(mode="json")


def is_number(value: Any) -> bool:
    """Whether a value of a plans file is a finite number; true and false are not numbers here."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def as_tuples(value: Any) -> Any:
    """A JSON value with tuples for its lists."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(map(as_tuples, value))


def _problem(cls: type[Settings], name: str, value: Any, kind: str, message: str) -> str:
    """One line about a setting, from what pydantic says of it."""
    if kind != "extra_forbidden":
        return f"{name} = {value!r} {message.removeprefix('Value error, ').replace('Input should be', 'must be')}"
    close = difflib.get_close_matches(name, cls.model_fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known names are {', '.join(cls.model_fields)}"
    return f"{name!r} is not a setting; {hint}"
