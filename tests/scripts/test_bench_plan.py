"""What is planned of small versions of the benchmark's networks, beside what the stages then write and hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_plan.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )


def test_bytes_are_planned_to_a_twentieth_and_memory_is_bounded(tmp_path):
    done = bench(tmp_path, "--quick", "--json", "figures.jsonl")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + 3 * 3
    records = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [record["workload"] for record in records] == ["W1", "W2", "W3"]
    for record in records:
        for stage, found in record["stages"].items():
            planned, actual = found["bytes"]
            assert planned == pytest.approx(actual, rel=0.05), (record["workload"], stage)
            planned, actual = found["memory"]
            assert actual <= planned + 300e6, (record["workload"], stage)
            assert min(found["seconds"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]


def test_it_refuses_what_it_does_not_know(tmp_path):
    done = bench(tmp_path, "--workloads", "W4")
    assert done.returncode == 2
    assert "--workloads" in done.stderr
