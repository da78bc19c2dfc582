"""One writer in a run folder: a kernel lock, free at once when its holder dies, that says who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from infl_cache.errors import BadInput, Locked

# Of this process; what is to be closed in a forked child. One handler for all, for none can be taken back.
_HELD: set[FileLock] = set()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or raise `Locked` that names the process and host that hold it."""
    # The holder is named in a second file: whoever tries to lock truncates the first.
    holder = folder / ".lock-holder"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout):
            raise Locked(
                f"{folder}: expected no other writer, found {_named(holder)}; wait for it or stop it"
            ) from None
        raise BadInput(f"{folder}: cannot be written: {error.strerror}; choose another --run") from error
    _HELD.add(lock)
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        _HELD.discard(lock)
        lock.release()


def _let_go() -> None:
    """In a forked child (a data loader's worker): close the locks' files, or they would outlive a killed parent."""
    for lock in _HELD:
        if lock._context.lock_file_fd is not None:
            os.close(lock._context.lock_file_fd)
            lock._context.lock_file_fd = None
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def _named(holder: Path) -> str:
    """The process that holds the lock, as far as its own note tells."""
    try:
        who = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {int(who['pid'])} on {str(who['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
