"""Stage 3 when the stores grow: seconds a pair when n_train or n_test grows, and the most memory over its budget.

python scripts/bench_scaling.py --parts scaling,memory --json bench_scaling.jsonl

A round is one turn of each size. The rows of s_test are gradients of test samples.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from head import at_least_one, command_line, publish
from measuring import between, bytes_below, chosen, in_turns, number, peak_memory, say, spread, table
from plain_scores import elapsed
from stage3 import about, dense, prepared, report_head, run_of
from workloads import Workload

# Which workload each part is measured with.
PARTS = {"scaling": "W1", "memory": "dense"}
# Scaling: the smallest stage, and by what n_train and n_test are multiplied.
BASE, QUICK_BASE, FACTORS, QUICK_FACTORS = (4000, 50), (32, 2), (1, 2, 4, 8), (1, 2)
# Memory: the budget, and how many times as large plain rows are, which take about half of that in the store.
BUDGET, QUICK_BUDGET, TIMES, TESTS = 200_000_000, 10_000_000, 20, 256
PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache")


def bench_scaling(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of stage 3 over W1 when n_train or n_test grows, and seconds a pair over those of the smallest."""
    n_train, n_test = QUICK_BASE if settings.quick else BASE
    factors = QUICK_FACTORS if settings.quick else FACTORS
    sizes = list(dict.fromkeys([*((n_train * f, n_test) for f in factors), *((n_train, n_test * f) for f in factors)]))
    workload = prepared("W1", n_train * factors[-1], n_test * factors[-1], settings.quick)
    turns = {}
    for size in sizes:
        say(f"W1: all stages of {size[0]:,} x {size[1]:,}")
        run = run_of(folder / "x".join(map(str, size)), workload, size[1], n_train=size[0])
        run.all()
        turns[str(size)] = partial(elapsed, partial(run.influence, force=True))
    found = in_turns(turns, settings.rounds)
    pair = {size: [seconds / (size[0] * size[1]) for seconds in found[str(size)]] for size in sizes}
    return {
        "sizes": [
            {
                "n_train": size[0],
                "n_test": size[1],
                "seconds": spread(found[str(size)]),
                "a_pair_of_smallest": spread([a / b for a, b in zip(pair[size], pair[sizes[0]], strict=True)]),
            }
            for size in sizes
        ],
    }


def memory_of_stage(folder: Path, workload: Workload, tests: int, budget: int) -> tuple[float, float]:
    """Memory (MB) before stage 3 and its peak within, in this process."""
    run = run_of(folder, workload, tests, memory=budget)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the libraries take their own buffers now
    with peak_memory(torch.device("cpu")) as peak:
        before = peak["peak_rss_mb"]
        run.influence(force=True)
    return before, peak["peak_rss_mb"]


def bench_memory(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The most memory of stage 3 above what its process had, over a store of ten times the budget."""
    budget = QUICK_BUDGET if settings.quick else BUDGET
    tests = QUICK_BASE[1] if settings.quick else TESTS
    n_params = dense(1, 1, 0).n_params
    workload = prepared("dense", -(-TIMES * budget // (4 * n_params)), tests, settings.quick)
    say(f"dense: stages 1 and 2 of {len(workload.train):,} x {tests}")
    run = run_of(folder / "run", workload, tests)
    run.grads()
    run.stest()
    found = []
    for done in range(settings.rounds):
        say(f"round {done + 1} of {settings.rounds}: memory")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(memory_of_stage, run.path, workload, tests, budget).result())
    return {
        "samples": len(workload.train),
        "tests": tests,
        "budget_mb": budget / 1e6,
        "row_mb": 4e-6 * n_params * len(workload.train),
        "store_mb": bytes_below(run.path / "grad_z.zarr") / 1e6,
        "before_mb": spread([before for before, _ in found]),
        "above_mb": spread([peak - before for before, peak in found]),
    }


def report(record: dict[str, Any]) -> str:
    """The table of one part."""
    made = {"scaling": scaling_lines, "memory": memory_lines}[record["part"]](record)
    return "\n".join([report_head(record), *made])


def scaling_lines(record: dict[str, Any]) -> list[str]:
    """A row for each size."""
    head = ["n_train x n_test", "seconds (low-high)", "a pair, of the smallest's"]
    rows = [[f"{each['n_train']:,} x {each['n_test']:,}", between(each["seconds"]), between(each["a_pair_of_smallest"])]
            for each in record["sizes"]]  # fmt: skip
    return [table(head, rows)]


def memory_lines(record: dict[str, Any]) -> list[str]:
    """Budget, store, and what was taken."""
    return [
        f"  {record['samples']:,} x {record['tests']:,}; plain rows {number(record['row_mb'])} MB, stored in"
        f" {number(record['store_mb'])} MB; --memory {number(record['budget_mb'])} MB",
        f"  before {between(record['before_mb'])} MB, at most {between(record['above_mb'])} MB more:"
        f" {number(record['above_mb']['high'] - record['budget_mb'])} MB above the budget",
    ]


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; all by default")
    settings = parser.parse_args(arguments)
    settings.parts = chosen(parser, "parts", settings.parts, list(PARTS))
    at_least_one(parser, settings, "rounds")
    return settings


def measured(part: str, settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The one record of a part."""
    return [{"scaling": bench_scaling, "memory": bench_memory}[part](settings, folder)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each part, print its table, append its figures to the file."""
    settings = asked(arguments)
    for part in settings.parts:
        publish(settings, about(PARTS[part], part), partial(measured, part, settings), report, PACKAGES)


if __name__ == "__main__":
    main()
