"""What is planned of three of the benchmark's networks is what their stages then write and hold."""

import sys
from pathlib import Path

import pytest
import torch

from infl_cache import Run

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
BUDGET, ALLOWANCE = 200_000_000, 300_000_000
JOBS = {"W1": (1000, 6, "fisher"), "W2": (200, 4, "ekfac"), "W3": (24, 4, "identity")}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import measuring
    import workloads

    yield measuring, workloads
    for name in ("measuring", "workloads"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", JOBS)
def test_bytes_within_a_twentieth_and_memory_within_what_was_planned(name, tmp_path, scripts):
    measuring, workloads = scripts
    n_train, n_test, solver = JOBS[name]
    task = workloads.WORKLOADS[name](n_train=n_train, n_test=n_test, n_fit=32).task()
    run = Run(tmp_path / "run", task, solver=solver, memory=BUDGET, progress=False)
    plan = run.plan()
    for stage in ("grads", "stest", "influence"):
        planned = getattr(plan, stage)
        with measuring.peak_memory(torch.device("cpu")) as peak:
            before = peak["peak_rss_mb"]
            result = getattr(run, stage)()
        size = result.n_bytes
        if stage == "influence":
            size = sum((run.path / name).stat().st_size for name in ("influence.npy", "rankings.npz"))
        assert planned.n_bytes == pytest.approx(size, rel=0.05), stage
        assert 1e6 * (peak["peak_rss_mb"] - before) <= planned.memory, stage
        assert planned.memory <= BUDGET + ALLOWANCE, stage
