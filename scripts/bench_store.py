"""What the store's own ways are worth, each beside the plain one, on the gradients of the benchmark's networks.

python scripts/bench_store.py --workloads W1,W3 --json bench_store.jsonl

Both ways of a comparison take turns: a ratio is one of two turns of one round, the plain way's seconds over ours.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import zarr
from head import command_line
from measuring import device_name, number, say, spread, sync_below, table, versions
from numcodecs.blosc import Blosc
from workloads import WORKLOADS, Workload

from infl_cache import Run
from infl_cache.disk import direct
from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import Block
from infl_cache.disk.store import Array, Store, create_store
from infl_cache.maths.digest import row_digests

PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache")
# Samples of one block of some 50 to 80 MB.
SAMPLES = {"W1": 8192, "W2": 2048, "W3": 128, "W4": 32, "W5": 64}
CODEC = Codec("lz4", 5)

Way = Callable[[], object]


def block_of(workload: Workload, folder: Path) -> tuple[Store, Block, dict[str, Array]]:
    """An empty store, and the block of gradients that stage 1 would write into it."""
    count = len(workload.train)
    run = Run(folder / "run", workload.task(count), progress=False, codec="none", block_rows=count)
    run.grads()
    (block,), layouts = run.folder.stage_blocks("grads"), run.folder.array_layouts("grads")
    data = run.folder.store("grads").read_block(block)
    create_store(folder / "store", layouts, CODEC)
    return Store(folder / "store", layouts, "r+", CODEC), block, data


def comparisons(workload: Workload, folder: Path) -> dict[str, tuple[Way, Way]]:
    """Titles, each with the plain way and ours."""
    store, block, data = block_of(workload, folder)
    chunks = store.encode_block(block, data)
    parts = [np.ascontiguousarray(each) for each in data.values() if each.dtype.kind == "f" and each.ndim > 1]
    x, y = (each.repeat(1 + 1000 // len(each), *[1] * (each.dim() - 1)) for each in workload.train.tensors)

    def by_zarr() -> None:
        group = zarr.open_group(store.folder, mode="r+")
        for path, values in data.items():
            group[path][:] = values  # type: ignore[index]
        sync_below(store.folder)

    def buffered() -> None:
        with mock.patch.object(direct, "DIRECT", 0):
            store.write_encoded(chunks)

    def shuffled(how: int) -> int:
        return sum(len(Blosc(CODEC.name, CODEC.level, how).encode(part)) for part in parts)

    def in_a_thread(how: int) -> int:
        with ThreadPoolExecutor(1) as pool:  # outside the main thread Blosc takes one processor
            return pool.submit(shuffled, how).result()

    def hashed() -> list[bytes]:
        pairs = zip(x.numpy(), y.numpy(), strict=True)
        return [hashlib.blake2b(one.tobytes() + other.tobytes(), digest_size=8).digest() for one, other in pairs]

    return {
        "write a block: zarr's own way, synced / ours": (by_zarr, lambda: store.write_block(block, data)),
        "lz4: byte shuffle / bit shuffle": (lambda: in_a_thread(Blosc.SHUFFLE), lambda: in_a_thread(Blosc.BITSHUFFLE)),
        "files: through the page cache / direct": (buffered, lambda: store.write_encoded(chunks)),
        "digests: blake2b of each row / ours": (hashed, lambda: row_digests([x, y])),
    }


def ratios(plain: Way, ours: Way, rounds: int) -> list[float]:
    """Seconds of the plain way over seconds of ours, round by round, after a round to warm up."""
    found = []
    for turn in range(rounds + 1):
        seconds = {}
        for way in (plain, ours) if turn % 2 else (ours, plain):
            started = time.perf_counter()
            way()
            seconds[way] = time.perf_counter() - started
        found.append(seconds[plain] / seconds[ours])
    return found[1:]


def bench(name: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one workload, as it goes into the file."""
    say(f"{name}: gradients of one block")
    workload = WORKLOADS[name](n_train=max(4, SAMPLES[name] // (16 if settings.quick else 1)), n_fit=32)
    found = {title: spread(ratios(*ways, settings.rounds)) for title, ways in comparisons(workload, folder).items()}
    return {
        "workload": name,
        "ratios": found,
        "rounds": settings.rounds,
        "quick": settings.quick,
        "device_name": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(PACKAGES),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, append its figures to the file, print one table."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="some of W1,W2,W3,W4,W5; all by default")
    settings = parser.parse_args(arguments)
    names = settings.workloads.split(",")
    if settings.rounds < 1 or not set(names) <= set(WORKLOADS):
        parser.error(f"--rounds and --workloads: expected at least 1, and some of {','.join(WORKLOADS)}")
    records = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-store-", dir=settings.folder.resolve()) as folder:
            records.append(bench(name, settings, Path(folder)))
        if settings.json:
            with settings.json.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    shown = [[f"{number(r['median'])} ({number(r['low'])}-{number(r['high'])})" for r in each["ratios"].values()]
             for each in records]  # fmt: skip
    titles = list(records[0]["ratios"])
    print(table(["times as long", *names], [[t, *(row[i] for row in shown)] for i, t in enumerate(titles)]))


if __name__ == "__main__":
    main()
