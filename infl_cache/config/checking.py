"""A value that was given for an option, as the option's type, or an error that says what is allowed."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import reprlib
import types
from typing import Any, Literal, Union, get_args, get_origin

from infl_cache.errors import BadInput

# No option means anything beyond this, and larger integers do not fit the arithmetic behind them.
LARGEST = 2**62
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
EXPECTED = {
    "memory": "a size such as 2GB or 512MiB",
    "test": "a string such as '0:1000' or '5,7,100:200' (in a YAML file in quotes), or a list of indices",
}


def short(value: Any) -> str:
    """A value as text of a bounded length, whatever it holds.

    >>> len(short(list(range(10**6)))) < 100
    True
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write out an integer of more than some thousand digits
        return f"an integer of {int(value).bit_length()} bits"


def parse_size(text: str | int | float) -> int:
    """Bytes from a number or from text such as `2GB`, `512 MiB`.

    >>> parse_size("2GB"), parse_size("1.5 MiB"), parse_size(4096)
    (2000000000, 1572864, 4096)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return int(text)
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"expected a size such as 2GB or 512MiB, found {short(text)}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def checked(spec: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field's type, or `BadInput` that names field, value and what is allowed."""
    choices = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    words = next((get_args(each) for each in choices if len(choices) > 1 and get_origin(each) is Literal), ())
    if (value is None and type(None) in choices) or (isinstance(value, str) and value in words):
        return value
    kind = next(each for each in choices if each is not type(None))
    name, found = spec.name.replace("_", "-"), short(value)
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise BadInput(f"{name}: expected one of {', '.join(get_args(kind))}, found {found}")
        return value
    try:
        if spec.name == "test":
            value = _listed(value)
        value = parse_size(value) if spec.name == "memory" else _converted(kind, value)
    except (ValueError, OverflowError, TypeError):
        expected = EXPECTED.get(spec.name, " or ".join([kind.__name__, *words]))
        raise BadInput(f"{name}: expected {expected}, found {found}") from None
    if kind in (int, float):
        _check_range(name, spec.metadata["low"], spec.metadata["high"], value)
    return value


def _converted(kind: type, value: Any) -> Any:
    """`value` as `kind`; a number may come as text, as from a command line or from YAML, to which 1e-3 is text."""
    if isinstance(value, str) and kind in (int, float):
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    return value


def _listed(value: Any) -> Any:
    """Indices in a list, an array or a range as text; anything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return ",".join(str(operator.index(each)) for each in value) if isinstance(value, (list, tuple, range)) else value


def _check_range(name: str, low: float | None, high: float | None, value: float) -> None:
    highest = LARGEST if high is None and isinstance(value, int) else high
    outside = (low is not None and value < low) or (highest is not None and value > highest)
    if outside or not math.isfinite(value):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise BadInput(f"{name}: expected a finite number {allowed}, found {short(value)}")
