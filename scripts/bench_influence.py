"""Stage 3 from the disk beside products in memory, a memory map, zarr's slices, and other libraries.

python scripts/bench_influence.py --workloads W1,dense --json bench_influence.jsonl

The contestants take turns: a round is one turn of each, with a hot and with a cold page cache, and a ratio is one of
two turns of one round. The rows of s_test are gradients of test samples: what they solve does not matter here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import plain_scores
import psutil
import torch
from contestants import (
    DECODE,
    MAP,
    MM,
    SLICES,
    Contestant,
    Setting,
    Turn,
    own_contestants,
    peer_contestants,
    plain_contestants,
    table_of,
    turn,
)
from head import at_least_one, command_line, publish
from measuring import between, bytes_below, chosen, in_turns, number, say, spread, table
from peer_influence import SCORERS
from stage3 import FACTORED, MADE, OURS, about, prepared, report_head, run_of
from workloads import Workload

SAMPLES, TESTS = 20_000, "20,256,1000"
QUICK_SAMPLES, QUICK_TESTS = 64, "3"
MACHINE = "machine"
KEYS = (*(own.key for own in OURS), MM, MAP, SLICES, DECODE, *(peer.key for peer in SCORERS))
PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache", *(peer.distribution for peer in SCORERS))


def bench_scores(name: str, settings: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Stage 3 and its rivals over one workload: a record for each number of test samples, as soon as it is measured."""
    say(f"{name}: making the model and its data")
    workload = prepared(name, settings.samples, max(settings.tests), settings.quick)
    ours = [own for own in (OURS if name == "dense" else FACTORED) if own.key in settings.only]
    stores = {own.store: own for own in (OURS[0], *ours)}
    for store, own in stores.items():
        say(f"{name}: stage 1 of {len(workload.train):,} samples, {store}")
        run_of(folder / store, workload, 1, own).grads()
    mapped = max(1, min(len(workload.train), settings.rows_bytes // (4 * workload.n_params)))
    say(f"{name}: plain rows of {mapped:,} samples")
    plain_scores.write_map(run_of(folder / OURS[0].store, workload, 1), mapped, table_of(folder))
    rows, fastest = plain_scores.held(table_of(folder), workload.n_params), plain_scores.fastest_product(settings.quick)
    for tests in settings.tests:
        say(f"{name}: s_test of {tests} test samples")
        for store, own in stores.items():
            run_of(folder / store, workload, tests, own).stest(force=True)
        exact = run_of(folder / OURS[0].store, workload, tests)
        s_test = torch.from_numpy(exact.s_test(slice(0, tests)))
        setting = Setting(workload, folder, exact, s_test, rows, mapped, settings.cache, settings.only,
                          settings.turn_seconds)  # fmt: skip
        say(f"{name}: how many samples the others take in a turn")
        peers, absent = peer_contestants(setting)
        mine = [each for own in ours for each in own_contestants(setting, own)]
        every = [*mine, *plain_contestants(setting, ours), *peers]
        turns = in_turns({MACHINE: fastest, **{each.name: partial(turn, each) for each in every}}, settings.rounds)
        machine = turns.pop(MACHINE)
        yield {
            "tests": tests, "samples": len(workload.train), "row_samples": len(rows), "mapped_samples": mapped,
            "machine_gflops": spread(machine), "turn_seconds": settings.turn_seconds, "skipped": absent,
            "store_bytes": {store: bytes_below(folder / store / "grad_z.zarr") for store in stores},
            "row_bytes": 4 * workload.n_params * len(workload.train),
            "contestants": [figures(each, turns, every, machine, tests, workload) for each in every],
        }  # fmt: skip


def figures(
    contestant: Contestant,
    turns: Mapping[str, Sequence[Turn]],
    every: Sequence[Contestant],
    machine: Sequence[float],
    tests: int,
    workload: Workload,
) -> dict[str, Any]:
    """What is known of a contestant; ratios are those of one round's turns."""
    pairs = {each.name: each.samples * tests for each in every}
    rates = {name: [pairs[name] / one.seconds for one in those] for name, those in turns.items()}
    mine, those = rates[contestant.name], turns[contestant.name]
    # As many as the product with plain rows takes, whatever is really multiplied.
    gflops = [2e-9 * workload.n_params * each for each in mine]
    known: dict[str, Any] = {
        "key": contestant.key,
        "title": contestant.title,
        "cache": contestant.cache,
        "samples": contestant.samples,
        "pairs": pairs[contestant.name],
        "seconds": spread([one.seconds for one in those]),
        "pairs_per_second": spread(mine),
        "gflops": spread(gflops),
        "of_machine": over(gflops, machine),
        "memory_mb": max(one.memory for one in those),
        "of_mm": over(mine, rates[MM]),
    }
    if contestant.files and contestant.samples == len(workload.train):
        read = sum(path.stat().st_size if path.is_file() else bytes_below(path) for path in contestant.files)
        known["stored_gb_per_second"] = spread([1e-9 * read / one.seconds for one in those])
    if contestant.error:
        known["error"] = max(one.error for one in those if one.error is not None)
    if (slow := f"{MAP} {contestant.cache}") in rates and contestant.name != slow:
        known["of_memmap"] = over(mine, rates[slow])
    if contestant.halves and all(name in rates for name in contestant.halves):
        # Seconds a pair: all of it over the sum of both halves, each alone on all cores.
        halves = zip(*(rates[name] for name in contestant.halves), strict=True)
        known["over_halves"] = over([1 / each for each in mine], [sum(1 / each for each in pair) for pair in halves])
    return known


def over(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Ratios round by round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def report(record: dict[str, Any]) -> str:
    """A row for each contestant and cache."""
    head = ["contestant", "cache", "samples", "pairs/s", "of torch.mm (low-high)", "over decode + mm", "of memmap",
            "GB/s stored", "GFLOP/s", "of machine", "error", "MB"]  # fmt: skip
    sizes = ", ".join(f"{store} {number(1e-6 * size)} MB" for store, size in record["store_bytes"].items())
    return "\n".join([
        report_head(record),
        table(head, [cells(each) for each in record["contestants"]]),
        f"  {record['samples']:,} x {record['tests']:,}; plain rows {number(1e-6 * record['row_bytes'])} MB, of which"
        f" {record['row_samples']:,} are multiplied in memory, again and again, and {record['mapped_samples']:,} are"
        f" mapped; {sizes}",
        f"  machine: {between(record['machine_gflops'])} GFLOP/s, the fastest of a few float32 products",
        *(f"  {who}: skipped, {why}" for who, why in record["skipped"].items()),
    ])  # fmt: skip


def cells(each: dict[str, Any]) -> list[str]:
    """The row of a contestant; decoding alone makes no scores."""
    scores = not each["key"].startswith(DECODE)
    return [
        each["title"],
        each["cache"] or "-",
        number(each["samples"]),
        number(each["pairs_per_second"]["median"]) if scores else "-",
        between(each["of_mm"]) if scores else "-",
        between(each["over_halves"]) if "over_halves" in each else "-",
        number(each["of_memmap"]["median"]) if "of_memmap" in each and scores else "-",
        number(each["stored_gb_per_second"]["median"]) if "stored_gb_per_second" in each else "-",
        number(each["gflops"]["median"]) if scores else "-",
        number(each["of_machine"]["median"]) if scores else "-",
        f"{each['error']:.0e}" if "error" in each else "-",
        number(each["memory_mb"]),
    ]


def default_rows_bytes() -> int:
    """4 GB of plain rows, but no more than a fifth of the memory: a memory map is to be hot."""
    return min(4 * 10**9, int(0.2 * psutil.virtual_memory().total))


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--workloads", default=",".join(MADE), help=f"some of {','.join(MADE)}; all by default")
    parser.add_argument("--only", default=",".join(KEYS), help=f"some of {','.join(KEYS)}; mm always is one")
    parser.add_argument("--cache", default="hot,cold", help="page cache before each turn: hot, cold or both")
    parser.add_argument("--samples", type=int, help=f"training samples; {SAMPLES:,} if not given")
    parser.add_argument("--tests", help=f"numbers of test samples; {TESTS} if not given")
    parser.add_argument("--rows-bytes", type=int, default=default_rows_bytes(), help="most bytes of the memory map")
    parser.add_argument("--turn-seconds", type=float, default=20.0,
                        help="who would take longer takes fewer samples; infl_cache always takes all")  # fmt: skip
    settings = parser.parse_args(arguments)
    settings.workloads = chosen(parser, "workloads", settings.workloads, list(MADE))
    settings.only = chosen(parser, "only", settings.only, KEYS)
    settings.cache = chosen(parser, "cache", settings.cache, ["hot", "cold"])
    settings.samples = (QUICK_SAMPLES if settings.quick else SAMPLES) if settings.samples is None else settings.samples
    words = (settings.tests or (QUICK_TESTS if settings.quick else TESTS)).split(",")
    settings.tests = [int(word) if word.strip().isdigit() else 0 for word in words]
    if min(settings.tests) < 1:
        parser.error(f"--tests: expected numbers of at least 1, found {','.join(words)}")
    if not settings.turn_seconds > 0:
        parser.error(f"--turn-seconds: expected more than 0, found {settings.turn_seconds}")
    at_least_one(parser, settings, "rounds", "samples", "rows_bytes")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, print a table for each number of test samples, append its figures to the file."""
    settings = asked(arguments)
    for name in settings.workloads:
        publish(settings, about(name, "scores"), partial(bench_scores, name, settings), report, PACKAGES)


if __name__ == "__main__":
    main()
