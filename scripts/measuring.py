"""What every benchmark needs: the most memory, medians, tables, sizes on disk, and where it was measured."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def in_turns(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What one turn of each after the other gives, `rounds` times."""
    found: dict[str, list[Any]] = {key: [] for key in turns}
    for done in range(rounds):
        for key, turn in turns.items():
            say(f"round {done + 1} of {rounds}: {key}")
            gc.collect()
            found[key].append(turn())
    return found


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


def between(values: dict[str, float]) -> str:
    """A median with its range."""
    return f"{number(values['median'])} ({number(values['low'])}-{number(values['high'])})"


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


def forget(folders: Iterable[Path]) -> None:
    """Take all files of the folders out of the page cache, once they are on the disk: the next reader finds it cold."""
    for path in files_of(folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def recall(folders: Iterable[Path]) -> None:
    """Read all files of the folders once, so that the next reader finds them in the page cache."""
    buffer = bytearray(2**22)
    for path in files_of(folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def files_of(folders: Iterable[Path]) -> list[Path]:
    """Every file below the folders; a file stands for itself."""
    return [path for folder in folders for path in (folder, *sorted(folder.rglob("*"))) if path.is_file()]


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


def circumstances(packages: Iterable[str]) -> dict[str, Any]:
    """Where, when and with what it was measured."""
    return {
        "device_name": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(packages),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def published(record: dict[str, Any], text: str, file: Path | None) -> None:
    """Print a record's table, and append the record to the file as one line of JSON."""
    print(text, end="\n\n", flush=True)
    if file:
        with file.open("a") as opened:
            opened.write(json.dumps(record) + "\n")


def chosen(parser: argparse.ArgumentParser, name: str, text: str, known: Sequence[str]) -> list[str]:
    """The words of a list with commas, each of which must be known."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        parser.error(f"--{name}: expected some of {','.join(known)}, found {','.join(unknown) or 'none'}")
    return list(dict.fromkeys(words))


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
