"""Write a file past the page cache, where the system can: no copy there, and nothing thrown out of it.

A block that has just been computed is not read again for hours. Writing it directly (`O_DIRECT`) leaves the page
cache to what is read, and takes as long as the ordinary way within about a tenth (medians, scripts/bench_store.py);
where a file system does not know it, the same bytes go the ordinary way.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1 << 20
PIECE = 4 << 20
# Addresses, lengths and offsets must be multiples of the device's sector; none in use is larger.
SECTOR = 4096
DIRECT = getattr(os, "O_DIRECT", 0)

_own = threading.local()


def write_durably(path: Path, *parts: bytes) -> None:
    """Write a file whole: its content is on the disk before it has its name. The folder is the caller's to sync."""
    temporary = path.with_name(path.name + ".partial")
    direct = DIRECT and sum(map(len, parts)) >= SMALLEST
    descriptor = _opened(temporary, DIRECT if direct else 0)
    try:
        for piece in _pieces(parts):
            whole = len(piece) - len(piece) % SECTOR
            _write(descriptor, piece[:whole])
            if whole < len(piece):  # the last one
                _write_through_cache(descriptor)
                _write(descriptor, piece[whole:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def _opened(path: Path, extra: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | extra, 0o666)
    except OSError as error:
        if not extra or error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system that knows no direct writing


def _pieces(parts: Iterable[bytes]) -> Iterable[memoryview]:
    """The parts one after the other, in pieces of one length that lie in this thread's aligned buffer."""
    if not hasattr(_own, "buffer"):
        _own.buffer = np.frombuffer(mmap.mmap(-1, PIECE), np.uint8)
    buffer: NDArray[np.uint8] = _own.buffer
    filled = 0
    for part in parts:
        left = np.frombuffer(part, np.uint8)
        while len(left):
            taken = min(len(left), PIECE - filled)
            np.copyto(buffer[filled : filled + taken], left[:taken])  # other threads run on meanwhile
            filled, left = filled + taken, left[taken:]
            if filled == PIECE:
                yield buffer.data
                filled = 0
    yield buffer[:filled].data


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _write_through_cache(descriptor):
                raise


def _write_through_cache(descriptor: int) -> bool:
    """Go on the ordinary way; False if that was the way already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
    return True
