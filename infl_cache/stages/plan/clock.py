"""How long a piece of work takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# What takes less is done once more: the first time pays for memory and kernels that are there afterwards.
SHORT = 0.1


def clocked(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `work`: the shorter of two times, of something long the only one."""
    seconds = once(work, device)
    return min(seconds, once(work, device)) if seconds < SHORT else seconds


def line(short: tuple[int, float], long: tuple[int, float]) -> tuple[float, float]:
    """Seconds at zero and for each unit, from (units, seconds) of a small and of a larger piece of work; none negative.

    >>> line((1, 3.0), (5, 11.0)), line((4, 2.0), (4, 2.0)), line((1, 2.0), (2, 1.0))
    ((1.0, 2.0), (0.0, 0.5), (1.0, 0.0))
    """
    if long[0] == short[0]:
        return 0.0, long[1] / long[0]
    each = max(0.0, (long[1] - short[1]) / (long[0] - short[0]))
    return max(0.0, long[1] - each * long[0]), each


def once(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `work`, done once."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
