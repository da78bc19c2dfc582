"""Large blocks that come and go: the same pages inside, given back afterwards."""

import resource

import numpy as np
import psutil
import pytest

from infl_cache import heap

BLOCK = 48 * 2**20
PAGES = BLOCK // resource.getpagesize()


def faults(count):
    """Pages that were new to the process while blocks came and went."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        # Bytes of a library that asks for memory in the plain way.
        bytes(bytearray(BLOCK))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(heap._glibc() is None, reason="another C library")
def test_freed_memory_is_used_again_and_then_given_back():
    outside = faults(4)
    with heap.freed_memory_kept():
        faults(1)
        inside = faults(4)
        held = np.ones(BLOCK, np.uint8)
        del held
        kept = psutil.Process().memory_info().rss
    assert inside < outside / 4
    assert outside >= 4 * PAGES
    assert psutil.Process().memory_info().rss < kept - BLOCK // 2


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.freed_memory_kept():
        assert faults(1) >= 0
