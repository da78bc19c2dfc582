"""The only door to tqdm: one bar a stage with rate, ETA and bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Bar:
    """Counts what a stage has done; shows it where somebody is looking."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._bytes = 0

    def advance(self, count: int, n_bytes: int = 0, note: str = "") -> None:
        """Count `count` more units, `n_bytes` more bytes on disk, and show `note`."""
        self._bytes += n_bytes
        shown = [f"{human_bytes(self._bytes)}"] if self._bytes else []
        self._bar.set_postfix_str(", ".join([*shown, note] if note else shown), refresh=False)
        self._bar.update(count)


@contextmanager
def progress(name: str, total: int, done: int = 0, unit: str = "sample", show: bool = True) -> Iterator[Bar]:
    """A bar on stderr for work longer than two seconds; silent when stderr is a file or `show` is false."""
    with tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        unit_scale=True,
        disable=not (show and sys.stderr.isatty()),
        delay=2,
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        yield Bar(bar)


def human_bytes(n: float) -> str:
    """A size for people.

    >>> human_bytes(532), human_bytes(2_340_000)
    ('532 B', '2.3 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        text = f"{n:.0f}" if unit == "B" or round(n, 1) >= 100 else f"{n:.1f}"
        if float(text) < 1000:
            return f"{text} {unit}"
        n /= 1000
    return f"{n:,.1f} PB"


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> human_seconds(3.2), human_seconds(75), human_seconds(7380)
    ('3.2 s', '1 min 15 s', '2 h 03 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
