"""What every benchmark needs: the most memory, medians, tables, sizes on disk, and where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill a mapping with the most memory (MB) of this process, looked at 50 times a second, and of the GPU."""
    process, over = psutil.Process(), threading.Event()
    peak = {"peak_rss_mb": process.memory_info().rss / 1e6}

    def watch() -> None:
        while not over.wait(0.02):
            peak["peak_rss_mb"] = max(peak["peak_rss_mb"], process.memory_info().rss / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        if device.type == "cuda":
            peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 1e6


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and both ends."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """A number with three digits, or all of them before the point.

    >>> number(123456.7), number(12.345), number(0.61234)
    ('123,457', '12.3', '0.612')
    """
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def bytes_below(folder: Path) -> int:
    """The sizes of all files below a folder; holes in them take no room."""
    known = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(min(each.st_size, 512 * each.st_blocks) for each in known)


def sync_below(folder: Path) -> None:
    """Put every file below a folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
