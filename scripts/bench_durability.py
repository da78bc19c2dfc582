"""What it costs stage 1 to lose nothing: the pipeline as it is beside itself without ledger, fsync and checksums.

python scripts/bench_durability.py --workloads W1,W2,W3 --json bench_durability.jsonl

A round is one turn of each. The pipeline writes past the page cache, which without fsync is also tried the ordinary
way: the files are then still in the page cache when the clock stops, unless everything is put on the disk once, at the
end, before it does (`synced`). There is no such option in the package: this script replaces the parts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from head import at_least_one, command_line, publish
from measuring import between, bytes_below, chosen, in_turns, number, spread, sync_below, table
from workloads import WORKLOADS, Workload

from infl_cache import Run
from infl_cache.disk import codecs, direct, run

NAMES = ("W1", "W2", "W3")
QUICK_SAMPLES, QUICK_FIT = {"W1": 1000, "W2": 128, "W3": 16}, 32
PARTS = ("ledger", "fsync", "checksum")
TITLES = {
    "ours": "infl_cache",
    "without": "the same without {}",
    "cached": "  and written through the page cache",
    "synced": "  and one sync at the end",
}
PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache")


class NoLedger:
    """In the ledger's place: knows of nothing, keeps nothing."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        del path, read_only

    def commit(self, record: object) -> None:
        """Forget it."""

    def clear(self, stage: str) -> None:
        """There is nothing."""

    def done(self, stage: str) -> dict[int, Any]:
        """Nothing is."""
        return {}

    def close(self) -> None:
        """There is no file."""


@contextmanager
def careless(parts: Sequence[str], cached: bool = False) -> Iterator[None]:
    """The pipeline without these parts of its care; `cached` writes through the page cache."""
    with ExitStack() as stack:
        if "ledger" in parts:
            stack.enter_context(patch.object(run, "Ledger", NoLedger))
        if "fsync" in parts:
            stack.enter_context(patch.object(os, "fsync", lambda descriptor: None))
        if "checksum" in parts:
            stack.enter_context(patch.object(codecs, "google_crc32c", SimpleNamespace(value=lambda body: 0)))
        if cached:
            stack.enter_context(patch.object(direct, "DIRECT", 0))
        yield


def turn(workload: Workload, folder: Path, parts: Sequence[str], cached: bool, sync: bool) -> tuple[float, int]:
    """Seconds of stage 1 into a new store, and its bytes; the disk is idle and the folder gone afterwards."""
    made = Run(folder, workload.task(), progress=False)
    with careless(parts, cached):
        started = time.perf_counter()
        made.grads()
    if sync:
        sync_below(folder)
    seconds = time.perf_counter() - started
    size = bytes_below(folder / "grad_z.zarr")
    sync_below(folder)
    shutil.rmtree(folder)
    return seconds, size


def bench_durability(settings: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Seconds of each contestant, and what ours takes over the others, round by round."""
    sizes = {"n_train": QUICK_SAMPLES[name], "n_fit": QUICK_FIT} if settings.quick else {}
    workload = WORKLOADS[name](**sizes)
    contestants = {
        "ours": ((), False, False),
        "without": (settings.without, False, False),
        "cached": (settings.without, True, False),
        "synced": (settings.without, True, True),
    }
    turns = {key: partial(turn, workload, folder / key, *how) for key, how in contestants.items()}
    found = in_turns(turns, settings.rounds)
    seconds = {key: [each for each, _ in value] for key, value in found.items()}
    return {
        "workload": name,
        "title": workload.title,
        "samples": len(workload.train),
        "without": list(settings.without),
        "bytes": found["ours"][-1][1],
        "contestants": [
            {
                "key": key,
                "seconds": spread(seconds[key]),
                "ours_over_it": spread([a / b for a, b in zip(seconds["ours"], seconds[key], strict=True)]),
            }
            for key in contestants
        ],
    }


def report(record: dict[str, Any]) -> str:
    """The table of one workload."""
    head = (
        f"{record['workload']}: {record['title']}, {record['samples']:,} samples, {number(record['bytes'] / 1e6)} MB"
        f" ({record['device_name']}, {record['threads']} threads, {record['rounds']} rounds)"
    )
    rows = [
        [TITLES[each["key"]].format(", ".join(record["without"])), between(each["seconds"]),
         between(each["ours_over_it"])]
        for each in record["contestants"]
    ]  # fmt: skip
    return "\n".join([head, table(["stage 1", "seconds (low-high)", "infl_cache over it"], rows)])


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--workloads", default=",".join(NAMES), help=f"some of {','.join(NAMES)}; all by default")
    parser.add_argument("--without", default=",".join(PARTS), help=f"what is left out: some of {','.join(PARTS)}")
    settings = parser.parse_args(arguments)
    settings.workloads = chosen(parser, "workloads", settings.workloads, list(NAMES))
    settings.without = chosen(parser, "without", settings.without, list(PARTS))
    at_least_one(parser, settings, "rounds")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, print its table, append its figures to the file."""
    settings = asked(arguments)
    publish(
        settings, {}, lambda folder: (bench_durability(settings, name, folder) for name in settings.workloads),
        report, PACKAGES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
