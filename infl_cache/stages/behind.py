"""One half of a loop in a thread of its own: compute the next block while the last one is written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.05


class Behind(Generic[T]):
    """Hands items, in order, to `work` in one thread; at most `waiting` items wait for it.

    An exception of `work` comes out of the next `put` or `check`, or of leaving the context, and ends the work.
    Leaving, also by an exception, finishes all items that were put; the thread is gone when the context is left.
    With r items waiting at most, item k is finished once `put` of item k + r + 1 has returned.

    >>> done = []
    >>> with Behind(done.append) as behind:
    ...     for number in range(3):
    ...         behind.put(number)
    >>> done
    [0, 1, 2]
    """

    def __init__(self, work: Callable[[T], None], waiting: int = 1) -> None:
        self._work = work
        # Queue's lock is Python's: it stays locked for good if a signal raises just where it would be released.
        self._items: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(waiting):
            self._places.put(None)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="infl_cache-writer", daemon=True)

    def __enter__(self) -> Behind[T]:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Hand over an item; waits for room, raises what `work` raised."""
        self.check()
        while self._thread.is_alive():
            try:
                self._places.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            self._items.put(item)
            break
        self.check()

    def check(self) -> None:
        """Raise what `work` raised, if anything."""
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._items.put(None)
        self._thread.join()
        if kind is None:
            self.check()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self._places.put(None)
            try:
                self._work(item)
            except BaseException as error:  # handed to the thread that waits for it
                self._error = error
                return
