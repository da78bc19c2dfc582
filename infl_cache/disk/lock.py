"""One writer in a run folder: a kernel lock, free at once when its holder dies, that says who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from infl_cache.errors import Locked


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or raise `Locked` that names the process and host that hold it."""
    # The holder is named in a second file: whoever tries to lock truncates the first.
    holder = folder / ".lock-holder"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        try:
            who = json.loads(holder.read_text(encoding="utf-8"))
            named = f"process {int(who['pid'])} on {str(who['host'])[:80]}"
        except (OSError, ValueError, KeyError, TypeError):
            named = "another process"
        raise Locked(f"{folder}: expected no other writer, found {named}; wait for it or stop it") from None
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
