"""The head of a benchmark: the options that all of them have, the scratch folder, and what becomes of each record."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import circumstances, published

Record = dict[str, Any]


def command_line(about: str | None, rounds: int | None = 3) -> argparse.ArgumentParser:
    """A command line described by the first line of `about`, with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contestant")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; the figures say little")
    parser.add_argument("--json", type=Path, help="append one JSON object for each table to this file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the scratch folder is made and deleted")
    return parser


def at_least_one(parser: argparse.ArgumentParser, settings: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1; what was not given is none."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, found {value}")


def publish(
    settings: argparse.Namespace,
    about: Record,
    measure: Callable[[Path], Iterable[Record]],
    report: Callable[[Record], str],
    packages: Sequence[str],
) -> list[Record]:
    """Measure in a scratch folder; each record is printed and appended to the file as soon as it is there."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    done = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=settings.folder.resolve()) as folder,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="There is a performance drop")
        for found in measure(Path(folder)):
            where = {"rounds": settings.rounds, "quick": settings.quick, **circumstances(packages)}
            record = {**where, **about, **found}
            published(record, report(record), settings.json)
            done.append(record)
    return done
