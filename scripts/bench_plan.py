"""What `plan` predicts beside what the stages then do: bytes, memory and time of each, on the benchmark's networks.

python scripts/bench_plan.py --workloads W1,W2,W3 --json bench_plan.jsonl

Each round plans a workload and then runs it, in a fresh folder; what a ratio is of lies at most a minute apart.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import chosen, circumstances, number, peak_memory, published, say, table
from workloads import WORKLOADS

from infl_cache import Run, Task

PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache")
STAGES = ("grads", "stest", "influence")


@dataclass(frozen=True)
class Job:
    """Training and test samples, and the options of the run; `quick` are the sizes of a short form."""

    sizes: tuple[int, int]
    quick: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)


JOBS = {
    "W1": Job((4000, 20), (64, 2), {"solver": "fisher", "memory": "1GB"}),
    "W2": Job((2000, 20), (24, 2), {"solver": "pcg", "tolerance": 1e-2, "memory": "1GB"}),
    "W3": Job((96, 8), (8, 2), {"solver": "cg", "max_iterations": 8, "tolerance": 1e-2, "memory": "4GB"}),
}


def one_round(task: Task, job: Job, folder: Path) -> dict[str, Any]:
    """Plan, run, and both figures of each stage."""
    run = Run(folder / "run", task, progress=False, **job.options)
    started = time.perf_counter()
    plan = run.plan()
    found: dict[str, Any] = {"plan": time.perf_counter() - started}
    for stage in STAGES:
        planned = getattr(plan, stage)
        with peak_memory(torch.device("cpu")) as peak:
            before = 1e6 * peak["peak_rss_mb"]
            result = getattr(run, stage)()
        found[stage] = {
            "bytes": [planned.n_bytes, written(run, stage, result.n_bytes)],
            "memory": [planned.memory, 1e6 * peak["peak_rss_mb"] - before],
            "seconds": [planned.seconds, result.seconds],
        }
    shutil.rmtree(folder / "run")
    return found


def written(run: Run, stage: str, n_bytes: int) -> int:
    """What a stage left on the disk."""
    if stage != "influence":
        return n_bytes
    return sum((run.path / name).stat().st_size for name in ("influence.npy", "rankings.npz"))


def bench(name: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The rounds of a workload, after one small job that pays for what is paid once."""
    job = JOBS[name]
    n_train, n_test = job.quick if settings.quick else job.sizes
    task = WORKLOADS[name](n_train=n_train, n_test=n_test, n_fit=32 if settings.quick else 500).task()
    if not settings.quick:
        small = WORKLOADS[name](n_train=16, n_test=2, n_fit=32).task()
        Run(folder / "warm", small, progress=False, solver="identity", memory=job.options["memory"]).all()
    rounds = []
    for turn in range(1 if settings.quick else settings.rounds):
        say(f"{name}: {n_train} training and {n_test} test samples, round {turn + 1}")
        rounds.append(one_round(task, job, folder))
    return {
        "workload": name, "samples": [n_train, n_test], "options": job.options, "rounds": rounds,
        "quick": settings.quick, **circumstances(PACKAGES),
    }  # fmt: skip


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """A line for each stage: the medians of what was planned, of what was, and of their ratio."""
    lines = []
    for stage in STAGES:
        cells = [f"{record['workload']} {stage}"]
        for name, unit in (("bytes", 1e6), ("memory", 1e6), ("seconds", 1.0)):
            pairs = [turn[stage][name] for turn in record["rounds"]]
            planned, actual = (statistics.median(pair[which] for pair in pairs) for which in (0, 1))
            ratio = statistics.median(pair[0] / max(pair[1], 1e-9) for pair in pairs)
            cells += [number(planned / unit), number(actual / unit), number(ratio) if ratio < 1e3 else "-"]
        lines.append(cells)
    seconds = statistics.median(turn["plan"] for turn in record["rounds"])
    return [*lines, [f"{record['workload']} plan itself", *[""] * 7, number(seconds), ""]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, print its table and append its figures to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default=",".join(JOBS), help="some of W1,W2,W3; all by default")
    parser.add_argument("--rounds", type=int, default=2, help="plans and runs of each")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; the times say little")
    parser.add_argument("--json", type=Path, help="append one JSON object for each workload to this file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the scratch folder is made and deleted")
    settings = parser.parse_args(arguments)
    head = ["planned, actual, ratio", "MB", "", "", "memory, MB", "", "", "s", "", ""]
    for name in chosen(parser, "workloads", settings.workloads, list(JOBS)):
        with tempfile.TemporaryDirectory(prefix="bench-plan-", dir=settings.folder.resolve()) as folder:
            record = bench(name, settings, Path(folder))
        published(record, table(head, rows_of(record)), settings.json)


if __name__ == "__main__":
    main()
