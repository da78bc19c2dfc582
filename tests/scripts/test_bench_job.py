import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


@pytest.fixture
def workload(scripts):
    """A small classifier."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 10))
    return scripts("workloads").classifier("tiny", "tiny", model, (5,), (70, 3, 70), epochs=1)


def test_quick_jobs_are_set_beside_one_another(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_job.py"), "--quick", "--samples", "8",
         "--tests", "2", "--rounds", "1", "--only", "ekfac,plain,bergson-dot", "--json", "figures.jsonl"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]
    record = json.loads((tmp_path / "figures.jsonl").read_text())
    assert (record["workload"], record["n_train"], record["n_test"], record["rounds"]) == ("W1", 8, 2, 1)
    ours, plain = record["contestants"]
    assert (ours["key"], plain["key"]) == ("ekfac", "plain")
    assert ours["over"]["ekfac"] == {"median": 1, "low": 1, "high": 1}
    assert 0 < plain["over"]["ekfac"]["low"] <= plain["over"]["ekfac"]["high"] < math.inf
    assert "bergson, no curvature" in record["skipped"]
    assert all(each["title"] in done.stdout for each in (ours, plain))


def test_a_job_that_fails_is_named_and_a_smaller_one_counts_in_proportion(scripts, workload, tmp_path, monkeypatch):
    script = scripts("bench_job")
    clock = {"lissa": 2.0, "small": 3.0}

    def broken(folder):
        raise ValueError("no such model")

    made = [
        script.Contestant("lissa", "ours", 70, lambda folder: clock["lissa"]),
        script.Contestant("small", "a part", 35, lambda folder: clock["small"]),
        script.Contestant("broken", "does not work", 70, broken),
    ]
    monkeypatch.setattr(script, "contestants_of", lambda *given: (made, {"absent": "not installed"}))
    monkeypatch.setattr(script, "elapsed", lambda work: work())
    (found,) = script.bench(workload, script.asked(["--rounds", "2", "--only", "lissa"]), tmp_path)
    assert found["skipped"] == {"absent": "not installed", "does not work": "ValueError: no such model"}
    ours, small = found["contestants"]
    assert ours["seconds"]["median"] == 2.0
    assert small["seconds"] == {"median": 6.0, "low": 6.0, "high": 6.0}
    assert small["over"]["lissa"]["median"] == 3.0


def test_every_job_is_called_once_before_the_clock_runs(scripts, workload, tmp_path, monkeypatch):
    script, calls = scripts("bench_job"), []

    def contestants(workload, only, depth):
        calls.append(len(workload.train))
        job = calls.append
        return [script.Contestant("plain", "plain", len(workload.train), lambda folder: job("called"))], {}

    monkeypatch.setattr(script, "FEW", 9)
    monkeypatch.setattr(script, "contestants_of", contestants)
    script.bench(workload, script.asked(["--rounds", "2", "--only", "plain"]), tmp_path)
    assert calls == [70, 9, "called", "called", "called"]


def test_our_own_failure_is_no_line_in_a_table(scripts, tmp_path):
    script = scripts("bench_job")
    with pytest.raises(ZeroDivisionError):
        script.turn(script.Contestant("ekfac", "ours", 1, lambda folder: 1 / 0), tmp_path, {})


def test_our_job_ends_with_rankings(scripts, workload, tmp_path):
    ranking = scripts("bench_job").own_job(workload, "ekfac", 5, tmp_path)
    assert len(ranking.ids) == 10
    assert sorted(ranking.values) == list(ranking.values)
    assert (tmp_path / "run" / "influence.npy").exists()


def test_the_plain_job_is_lissa_and_a_product(scripts, workload, tmp_path):
    plain = scripts("plain_job")
    parameters = list(workload.model.parameters())
    x, y = workload.train.tensors

    def gradient(x, y, graph=False):
        found = torch.autograd.grad(workload.loss(workload.model(x), y).mean(), parameters, create_graph=graph)
        return torch.cat([each.reshape(-1) for each in found])

    rows = torch.stack([gradient(*pair) for pair in zip(x.split(1), y.split(1), strict=True)])
    assert torch.allclose(plain.gradient_rows(workload, x, y), rows, atol=1e-6)
    vectors = torch.randn(2, rows.shape[1], generator=torch.Generator().manual_seed(0))
    whole = gradient(x, y, graph=True)
    products = []
    for vector in vectors:
        found = torch.autograd.grad(whole, parameters, vector, retain_graph=True)
        products.append(torch.cat([each.reshape(-1) for each in found]))
    assert torch.allclose(plain.hessian_rows(workload, x, y, vectors), torch.stack(products), atol=1e-5)
    rhs = plain.gradient_rows(workload, *workload.test.tensors)
    wanted = plain.lissa(workload, rhs, 70, STEPS) @ rows.T / -70
    assert torch.allclose(plain.plain_job(workload, tmp_path, 70, STEPS), wanted, atol=1e-6)


def test_the_recursion_of_the_plain_job_goes_to_the_solution(scripts, workload, monkeypatch):
    plain = scripts("plain_job")
    monkeypatch.setattr(plain, "SCALE", 4.0)
    monkeypatch.setattr(plain, "DAMPING", 1.0)
    matrix = torch.diag(torch.linspace(0.5, 2.0, 4))
    monkeypatch.setattr(plain, "hessian_rows", lambda workload, x, y, rows: rows @ matrix)
    rhs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.solve(matrix + torch.eye(4), rhs.T).T
    assert torch.allclose(plain.lissa(workload, rhs, 70, STEPS), wanted, atol=1e-5)


@pytest.mark.parametrize("wrong", [["--workloads", "W3"], ["--only", "fast"], ["--rounds", "0"], ["--tests", "0"]])
def test_it_refuses_what_it_does_not_know(wrong, scripts, capsys):
    with pytest.raises(SystemExit, match="2"):
        scripts("bench_job").asked(wrong)
    assert wrong[0] in capsys.readouterr().err
