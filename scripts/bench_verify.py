"""How fast `verify` is, beside reading the same files with crc32c alone: on a store of gradients, from the page cache.

python scripts/bench_verify.py --workload W1 --samples 16384 --json bench_verify.jsonl

Both ways take turns: a ratio is one of two turns of one round, the plain way's seconds over those of `verify`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from bench_store import ratios
from head import command_line
from measuring import device_name, number, say, spread, table, versions
from workloads import WORKLOADS

from infl_cache import Run
from infl_cache.disk.run import RunFolder
from infl_cache.stages.verify import verify

PACKAGES = ("torch", "numpy", "google_crc32c", "infl_cache")
PIECE = 1 << 22


def crc32c_alone(files: Sequence[Path]) -> int:
    """Read files one after the other through one piece of memory; the sum of their checksums."""
    memory, total = np.empty(PIECE, np.uint8), 0
    for path in files:
        crc = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(memory):  # type: ignore[arg-type]
                crc = google_crc32c.extend(crc, memory[:count])  # type: ignore[arg-type]
        total += crc
    return total


def plain_ways(path: Path) -> dict[str, Callable[[], object]]:
    """Reading every file of the stores, by one thread and by as many as there are processors."""
    files = sorted(each for store in path.glob("*.zarr") for each in store.rglob("*") if each.is_file())
    count = os.cpu_count() or 1

    def by_threads() -> int:
        with ThreadPoolExecutor(count) as pool:
            return sum(pool.map(crc32c_alone, [files[first::count] for first in range(count)]))

    return {"crc32c alone, one thread": lambda: crc32c_alone(files), f"crc32c alone, {count} threads": by_threads}


def bench(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one run, as it goes into the file."""
    count = max(64, settings.samples // (64 if settings.quick else 1))
    say(f"{settings.workload}: gradients of {count:,} samples")
    workload = WORKLOADS[settings.workload](n_train=count, n_fit=32)
    run = Run(folder / "run", workload.task(count), progress=False, codec=settings.codec)
    run.grads()
    verdict = verify(RunFolder(run.path), show=False)
    assert verdict.sound

    def ours() -> object:
        return verify(RunFolder(run.path), show=False)

    found = {title: spread(ratios(way, ours, settings.rounds)) for title, way in plain_ways(run.path).items()}
    return {
        "workload": settings.workload,
        "samples": count,
        "codec": settings.codec,
        "files": verdict.files,
        "bytes": verdict.n_bytes,
        "ratios": found,
        "rounds": settings.rounds,
        "quick": settings.quick,
        "device_name": device_name(torch.device("cpu")),
        "versions": versions(PACKAGES),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one run, append its figures to the file, print one table."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--workload", default="W1", choices=sorted(WORKLOADS), help="whose gradients; W1 by default")
    parser.add_argument("--samples", type=int, default=16384, help="how many; 16384 by default")
    parser.add_argument(
        "--codec", default="none", choices=("none", "lz4", "zstd"), help="of the chunks; none by default"
    )
    settings = parser.parse_args(arguments)
    if settings.rounds < 1 or settings.samples < 1:
        parser.error("--rounds and --samples: expected at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-verify-", dir=settings.folder.resolve()) as folder:
        record = bench(settings, Path(folder))
    if settings.json:
        with settings.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
    rows = [[title, f"{number(r['median'])} ({number(r['low'])}-{number(r['high'])})"]
            for title, r in record["ratios"].items()]  # fmt: skip
    size = f"{record['bytes'] / 1e6:,.0f} MB in {record['files']:,} files"
    print(table([f"seconds over those of verify, {size}", "ratio"], rows))


if __name__ == "__main__":
    main()
