"""The comparison of plan and run goes through, keeps each workload's figures, and refuses what it does not know."""

import json

import pytest

from tests.scripts.running import ran, refused


def test_a_short_run_prints_and_keeps_what_was_planned_and_what_was(tmp_path):
    done = ran("bench_plan", tmp_path, "--quick", "--workloads", "W1", "--json", "found.jsonl")
    assert done.returncode == 0, done.stderr
    assert "W1 influence" in done.stdout
    assert "W1 plan itself" in done.stdout
    (line,) = (tmp_path / "found.jsonl").read_text().splitlines()
    (turn,) = json.loads(line)["rounds"]
    for stage in ("grads", "stest", "influence"):
        planned, actual = turn[stage]["bytes"]
        assert planned == pytest.approx(actual, rel=0.1)
        assert min(turn[stage]["seconds"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["found.jsonl"]


def test_it_refuses_what_it_does_not_know(tmp_path):
    code, said = refused("bench_plan", tmp_path, "--workloads", "W4")
    assert code == 2
    assert "--workloads: expected some of W1,W2,W3, found W4" in said
