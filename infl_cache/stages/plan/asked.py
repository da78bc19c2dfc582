"""What `plan` alone may be asked: other sizes, another machine, another disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from infl_cache.config import option, parse_size, short
from infl_cache.config.checking import LARGEST
from infl_cache.errors import BadInput
from infl_cache.stages.plan.machines import MACHINES

_COUNT = re.compile(r"([0-9][0-9_,]*)(?:\.([0-9]+))?(?:(?:e\+?|\s*\*?\s*10\s*(?:\^|\*\*)\s*)([0-9]{1,2}))?")
_POWER = re.compile(r"10\s*(?:\^|\*\*)\s*([0-9]{1,2})")


@dataclass(frozen=True)
class PlanOptions:
    """Of plan: sizes, a machine and a disk that are not here. What is not given is that of the task, or measured."""

    n_train: int | None = option(None, "plan for so many training samples: 50_000, 1e6, 10^9; those of the task")
    n_test: int | None = option(None, "plan for so many test samples; those of the task that are asked about")
    disk: int | None = option(None, "bytes a second that the disk reads and writes: 7GB/s; measured if not given")
    free: int | None = option(None, "bytes that are free on the disk: 2TB; those of the run folder's if not given")


def asked_of(given: Mapping[str, Any]) -> tuple[PlanOptions, str | None, dict[str, Any]]:
    """Plan's own options, the machine of the table that `device` names if it names one, and all other options.

    Raises `BadInput` for a size or rate that is none.
    """
    readers: dict[str, Callable[[Any], int]] = {
        "n_train": parse_count, "n_test": parse_count, "disk": parse_rate, "free": parse_size
    }  # fmt: skip
    words = {"n_train": "a count such as 50_000, 1e6 or 10^9", "disk": "a rate such as 7GB/s", "free": "a size as 2TB"}
    found: dict[str, int] = {}
    for name, read in readers.items():
        if (value := given.get(name)) is None:
            continue
        try:
            found[name] = read(value)
        except (ValueError, OverflowError, TypeError):
            found[name] = 0
        if not 0 < found[name] <= LARGEST:
            expected = words.get(name, words["n_train"])
            raise BadInput(f"{name.replace('_', '-')}: expected {expected}, found {short(value)}")
    rest = {name: value for name, value in given.items() if name not in {field.name for field in fields(PlanOptions)}}
    machine = str(rest.get("device")).lower()
    if machine not in MACHINES:
        return PlanOptions(**found), None, rest
    del rest["device"]
    return PlanOptions(**found), machine, rest


def parse_count(text: str | int | float) -> int:
    """A number of samples from a number or from text.

    >>> parse_count("1e6"), parse_count("50_000"), parse_count("10^9"), parse_count("1.5e3"), parse_count("2*10^6")
    (1000000, 50000, 1000000000, 1500, 2000000)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool) and text == int(text):
        return int(text)
    plain = text.strip().lower() if isinstance(text, str) else ""
    if power := _POWER.fullmatch(plain):
        return int(10 ** int(power[1]))
    match = _COUNT.fullmatch(plain)
    if match is None or len(match[2] or "") > int(match[3] or 0):
        raise ValueError(f"expected a whole number, found {short(text)}")
    behind = match[2] or ""
    digits = int(match[1].replace("_", "").replace(",", "") + behind)
    return digits * int(10 ** (int(match[3] or 0) - len(behind)))


def parse_rate(text: str | int | float) -> int:
    """Bytes a second.

    >>> parse_rate("7GB/s"), parse_rate("500 MB/s"), parse_rate(1e9)
    (7000000000, 500000000, 1000000000)
    """
    return parse_size(re.sub(r"/\s*s$", "", text.strip(), flags=re.IGNORECASE) if isinstance(text, str) else text)
