"""Memory that was freed stays with the process while a stage runs, as far as the C library lets us say so.

glibc gives large blocks back to the system at once and asks for them anew each time; a page that is new to a process is
zeroed and mapped first, which for vectors that come and go costs more than their arithmetic (a job of 100 LiSSA steps
took 1.5 times as long, scripts/bench_job.py).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

# Options of mallopt (malloc.h), and their values: blocks below 1 GiB come from the heap, whose end is kept.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: 2**31 - 1}
# What glibc itself comes to, at most, by adjusting its thresholds.
USUAL = {MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory is used again; afterwards it is given back. Nothing happens without glibc."""
    library = _glibc()
    if library is None:
        yield
        return
    for option, value in KEPT.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    return library
