"""What the processor is, where what is fastest hangs on its maker."""

from __future__ import annotations

import functools
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def made_by_intel() -> bool:
    """Whether Intel made it, as far as the system tells; False where it does not.

    Nothing that is computed may hang on a trial of speed: a process that goes on with another's work must do the same
    arithmetic.
    """
    try:
        return "GenuineIntel" in CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
