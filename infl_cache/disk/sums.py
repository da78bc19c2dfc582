"""Checksums of what lies on the disk, through memory that is used again: fresh memory takes longer than the sum."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

# Bytes that are read at a time.
PIECE = 1 << 22

Bytes = NDArray[np.uint8]


class FileSums(NamedTuple):
    """Size of a file, CRC-32C of all but its last bytes, and these as a number (little endian)."""

    size: int
    crc: int
    tail: int


def room() -> Bytes:
    """Memory for `sums_of_file` and `extended`, of one thread at a time."""
    return np.empty(PIECE, np.uint8)


def size_of_file(path: Path) -> int:
    """Bytes of a file; `OSError` if there is none, or something that is not a file."""
    return _size(os.stat(path))


def sums_of_file(path: Path, memory: Bytes, tail: int = 0) -> FileSums:
    """Of a file whose last `tail` bytes are kept apart; `OSError` if it cannot be read, or is not a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not hang us
    try:
        size = _size(os.fstat(descriptor))
        body = max(0, size - tail)
        crc = extended(0, descriptor, 0, body, memory)
        return FileSums(size, crc, int.from_bytes(os.pread(descriptor, tail, body), "little"))
    finally:
        os.close(descriptor)


def extended(crc: int, descriptor: int, start: int, count: int, memory: Bytes) -> int:
    """CRC-32C of what had `crc` and then `count` bytes of an open file from `start` on; `OSError` if it ends early."""
    while count:
        found = os.preadv(descriptor, [memory[: min(count, len(memory))].data], start)
        if not found:
            raise OSError(errno.EIO, "ends early")
        crc = int(google_crc32c.extend(crc, cast(bytes, memory[:found])))
        start, count = start + found, count - found
    return crc


def _size(status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR, "not a file")
    return status.st_size
