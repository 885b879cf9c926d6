"""Checks of values that users give: every choice, range and mapping is refused in the same words."""

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from a3_jax.errors import InputError, nearest

MAX_SEED = 2**32 - 1
_LONGEST_SHOWN = 100
T = TypeVar("T")


def shown(value) -> str:
    """Returns a value as an error names it, cut where it is long: files may hold anything."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def one_of(name: str, value, choices: Collection) -> None:
    """Refuses a value that is none of the choices, with the nearest of them."""
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"must be one of {known}, got {shown(value)}{nearest(value, choices)}", field=name)


def is_number(value) -> bool:
    """Returns whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(name: str, value, least: int, most: int | None = None) -> None:
    """Refuses what is not an int (no bool) with least <= value <= most."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole and least <= value and (most is None or value <= most)):
        upper = "" if most is None else f" and at most {most}"
        raise InputError(f"must be a whole number, at least {least}{upper}, got {shown(value)}", field=name)


def number(name: str, value, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """Refuses what is not a finite number with least <= value <= most; `above`: least < value."""
    in_range = is_number(value) and least <= value <= most and abs(value) <= sys.float_info.max
    if not in_range or (above and value == least):
        lower = f"above {least}" if above else f"at least {least}"
        upper = "" if most == math.inf else f" and at most {most}"
        raise InputError(f"must be a number, {lower}{upper}, got {shown(value)}", field=name)


def check_seed(seed) -> None:
    """Refuses a seed that random keys can't be made from: the same ones in every command."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) <= MAX_SEED:
        raise InputError(f"must be from 0 to {MAX_SEED}, got {shown(seed)}", field="seed")


def from_mapping(
    cls: Callable[..., T],
    fields: Mapping[str, Any],
    where: str = "",
    convert: Callable | None = None,
    noun: str = "field",
) -> T:
    """Makes a dataclass of a mapping, each field of it known and none missing.

    Args:
      cls: the dataclass; what its `__post_init__` refuses is named in full.
      fields: a dictionary or ConfigDict.
      where: where the mapping stands, in front of each field's name: `stages[0]`.
      convert: of (name, value, the field's type), gives the value that is stored.
      noun: what users call a field of it.
    """
    prefix = f"{where}." if where else ""
    if not hasattr(fields, "keys"):  # `ConfigDict` is no `Mapping`
        raise InputError(f"must be a mapping of fields, got {shown(fields)}", field=where or None)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise InputError(f"no such {noun}{nearest(name, known)}", field=f"{prefix}{name}")
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise InputError("is missing", field=f"{prefix}{name}")
    given = dict(fields)
    try:
        if convert is not None:
            given = {name: convert(name, value, known[name].type) for name, value in given.items()}
        return cls(**given)
    except InputError as error:
        raise InputError(error.message, field=f"{prefix}{error.field}") from error
