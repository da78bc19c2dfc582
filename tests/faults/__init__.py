"""The fault table: what may happen to a run, injected into the real pipeline; `make faults` runs the long versions."""

import os


def times(short: int, long: int) -> int:
    """How often a fault is tried: `long` times with INFL_CACHE_FAULTS=long, else `short` times."""
    return long if os.environ.get("INFL_CACHE_FAULTS") == "long" else short
