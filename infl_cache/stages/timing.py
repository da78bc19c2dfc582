"""Where the time of a stage went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Timings:
    """Seconds by name. Names of different threads overlap in time: their sum may exceed the stage's.

    >>> timings = Timings()
    >>> with timings.of("compute"):
    ...     pass
    >>> sorted(timings.seconds)
    ['compute']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the time of getting them added to `name`."""
        iterator = iter(items)
        while True:
            with self.of(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
