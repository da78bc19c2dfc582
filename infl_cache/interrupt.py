"""Signals become a flag that is read between blocks, so that no write is ever cut in half by us."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from infl_cache.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_between_blocks() -> Iterator[Callable[[], None]]:
    """Yield `check()`, which raises `Interrupted` once SIGINT or SIGTERM has arrived.

    A second signal is delivered as usual (at once). Outside the main thread, where Python
    allows no handlers, `check` never raises. Handlers are put back on leaving.
    """
    received: list[int] = []
    said = False

    def check() -> None:
        nonlocal said
        if received:
            said = True
            name = signal.Signals(received[0]).name
            raise Interrupted(f"stopped by {name} between two blocks; what is done is kept", received[0])

    if threading.current_thread() is not threading.main_thread():
        yield check
        return

    def remember(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for each in previous:
            signal.signal(each, previous[each])

    # A signal that whoever started us wants ignored (nohup, a job in the background) stays ignored.
    previous = {each: found for each in SIGNALS if (found := signal.getsignal(each)) != signal.SIG_IGN}
    for each in previous:
        signal.signal(each, remember)
    try:
        yield check
        if not said:
            check()
    finally:
        for each in previous:
            signal.signal(each, previous[each])
