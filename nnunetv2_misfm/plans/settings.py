"""Reading groups of settings from JSON, with every problem reported in one error.

Each group of settings (fusion, augmentation, a run) is a frozen dataclass that lives beside the code it steers. Its
field values are plain JSON types, so the same object can be written into a plans file and read back. A group checks
itself in `problems()`; nothing else in the package validates settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, TypeVar

from nnunetv2_misfm.errors import UserError


class Settings(Protocol):
    """What `read_settings` needs: a dataclass that lists what is wrong with its own values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problems(self) -> list[str]:
        """One sentence per bad value, each naming the field, its value and what would be accepted."""
        ...


SettingsT = TypeVar("SettingsT", bound=Settings)


class SettingsError(UserError, ValueError):
    """One or more settings cannot be used; the message lists all of them with the place they come from."""

    def __init__(self, where: str, problems: Iterable[str]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{where} cannot be used:\n{lines}")


def read_settings(cls: type[SettingsT], values: Mapping[str, Any], where: str) -> SettingsT:
    """Build `cls` from a JSON mapping; unknown names, wrong types and bad values are reported together.

    Args:
        cls: a frozen dataclass with defaults for every field and a `problems()` method.
        values: the mapping as read from JSON; lists become tuples.
        where: what the values are and where they come from, for the error message.

    Raises:
        SettingsError: with one line per problem.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(where, [f"it must be an object with named settings, not {values!r}"])
    names = [field.name for field in dataclasses.fields(cls)]
    found, known = [], {}
    for name, value in values.items():
        if name in names:
            known[name] = as_tuples(value)
            continue
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known names are {', '.join(names)}"
        found.append(f"{name!r} is not a setting; {hint}")
    settings = cls(**known)
    try:
        found += settings.problems()
    except TypeError as error:
        # A check such as `0 < value` meets a string or null: say which values were given rather than show a traceback.
        found.append(f"a value has the wrong type ({error}); given: {dict(values)}")
    if found:
        raise SettingsError(where, found)
    return settings


def write_settings(settings: Settings) -> dict[str, Any]:
    """The settings as a JSON mapping that `read_settings` turns back into an equal object."""
    return {field.name: _as_lists(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number; true and false are not numbers here."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number; true and false are not numbers here."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def as_tuples(value: Any) -> Any:
    """A JSON value with tuples for its lists."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
