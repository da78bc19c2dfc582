"""What `plan` predicts beside what the stages then do: bytes, memory and time of each, on the benchmark's networks.

python scripts/bench_plan.py --workloads W1,W2,W3 --json bench_plan.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import device_name, number, peak_memory, say, table, versions
from workloads import WORKLOADS

from infl_cache import Run

PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache")
# Training and test samples.
SIZES = {"W1": (2000, 20), "W2": (1000, 16), "W3": (256, 8)}
QUICK = {"W1": (64, 2), "W2": (24, 2), "W3": (8, 2)}
STAGES = ("grads", "stest", "influence")


def bench(name: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Plan a workload, run it, and put both side by side."""
    n_train, n_test = (QUICK if settings.quick else SIZES)[name]
    say(f"{name}: {n_train} training and {n_test} test samples")
    task = WORKLOADS[name](n_train=n_train, n_test=n_test, n_fit=32 if settings.quick else 500).task()
    run = Run(folder / "run", task, progress=False, tolerance=0.1 if settings.quick else 1e-3, memory=settings.memory)
    plan = run.plan()
    stages = {}
    for stage in STAGES:
        planned = getattr(plan, stage)
        with peak_memory(torch.device("cpu")) as peak:
            result = getattr(run, stage)()
        size = planned.matrix_bytes if stage == "influence" else planned.n_bytes
        written = (run.path / "influence.npy").stat().st_size if stage == "influence" else result.n_bytes
        stages[stage] = {
            "bytes": [size, written], "memory": [plan.base + planned.memory, 1e6 * peak["peak_rss_mb"]],
            "seconds": [planned.seconds, result.seconds],
        }  # fmt: skip
    return {
        "workload": name,
        "samples": [n_train, n_test],
        "stages": stages,
        "quick": settings.quick,
        "device_name": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(PACKAGES),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """A line for each stage: planned, actual, and their ratio."""
    lines = []
    for stage, found in record["stages"].items():
        cells = [f"{record['workload']} {stage}"]
        for name, unit in (("bytes", 1e6), ("memory", 1e6), ("seconds", 1.0)):
            planned, actual = found[name]
            cells += [number(planned / unit), number(actual / unit), f"{planned / actual:.2f}"]
        lines.append(cells)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, append its figures to the file, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default=",".join(SIZES), help="some of W1,W2,W3; all by default")
    parser.add_argument("--memory", default="1GB", help="budget of the stages")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; the times say little")
    parser.add_argument("--json", type=Path, help="append one JSON object for each workload to this file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the scratch folder is made and deleted")
    settings = parser.parse_args(arguments)
    names = settings.workloads.split(",")
    if not set(names) <= set(SIZES):
        parser.error(f"--workloads: expected some of {','.join(SIZES)}")
    records = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-plan-", dir=settings.folder.resolve()) as folder:
            records.append(bench(name, settings, Path(folder)))
        if settings.json:
            with settings.json.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    head = ["planned, actual, ratio", "MB", "", "", "memory, MB", "", "", "s", "", ""]
    print(table(head, [row for record in records for row in rows_of(record)]))


if __name__ == "__main__":
    main()
