"""The system of stage 2: which curvature, over which training samples."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from infl_cache import ForeignRun, IncompleteStore, Run
from infl_cache.maths.curvature import jacobian
from tests import tasks
from tests.tasks import TASKS
from tests.twins import dense_ggn, gradient_rows

QUIET = {"progress": False}


def worst_row(found, expected):
    return (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


def solved(matrix, task, damping):
    matrix = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    rows = gradient_rows(task, range(len(task.test)), data="test")
    return torch.linalg.solve(matrix, rows.T).T.numpy()


def fisher_of(task, indices=None):
    rows = gradient_rows(task, range(len(task.train)) if indices is None else indices)
    return rows.T @ rows / len(rows)


WAYS = [("cg", torch.float64, True), ("pcg", torch.float64, False), ("pcg", torch.float32, True)]


@pytest.mark.parametrize(("solver", "dtype", "cache"), WAYS)
@pytest.mark.parametrize("name", TASKS)
def test_fisher_is_the_mean_square_of_the_stored_gradients(name, solver, dtype, cache, tmp_path):
    options = {"curvature": "fisher", "damping": 0.1, "tolerance": 1e-9 if dtype == torch.float64 else 1e-6}
    run = Run(tmp_path / "r", TASKS[name](dtype), solver=solver, cache=cache, block_rows=4, **options, **QUIET)
    run.grads()
    run.stest()
    task = TASKS[name]()
    near = 1e-7 if dtype == torch.float64 else 1e-4
    assert worst_row(run.s_test(slice(None)), solved(fisher_of(task), task, 0.1)) <= near


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("memory", [None, 30_000])
def test_fisher_leaves_out_what_is_not_finite(memory, cache, tmp_path):
    task = tasks.logistic()
    task.train.tensors[0][3] = torch.inf
    options = {"curvature": "fisher", "damping": 0.1, "tolerance": 1e-9, "nonfinite": "skip", "block_rows": 2}
    run = Run(tmp_path / "r", task, cache=cache, memory=memory, **options, **QUIET)
    run.all()
    clean = tasks.logistic()
    expected = solved(fisher_of(clean, [i for i in range(10) if i != 3]), clean, 0.1)
    assert worst_row(run.s_test(slice(None)), expected) <= 1e-7


def test_fisher_needs_the_gradients_first(tmp_path):
    with pytest.raises(IncompleteStore, match="grads"):
        Run(tmp_path / "r", tasks.mlp(), curvature="fisher", **QUIET).stest()


def chosen_samples(count, n=31, seed=42):
    return sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist())


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("solver", ["exact", "cg", "pcg"])
def test_the_curvature_is_the_mean_over_exactly_the_fixed_subsample(solver, curvature, tmp_path):
    task = tasks.mlp(n_train=31)
    few = chosen_samples(12)
    assert few != list(range(12))
    options = {"curvature_samples": 12, "damping": 0.05, "tolerance": 1e-10, "curvature": curvature}
    run = Run(tmp_path / "r", task, solver=solver, **options, **QUIET)
    run.grads()
    run.stest()
    matrix = fisher_of(task, few) if curvature == "fisher" else dense_ggn(tasks.mlp(train=Subset(task.train, few)))
    assert worst_row(run.s_test(slice(None)), solved(matrix, task, 0.05)) <= 1e-6


@pytest.mark.parametrize("solver", ["cg", "pcg", "ekfac"])
def test_a_resumed_run_takes_the_same_subsample(solver, tmp_path, lights_out):
    task, options = tasks.mlp(n_train=31), {"solver": solver, "curvature_samples": 12, "test_block_rows": 1, **QUIET}
    Run(tmp_path / "calm", task, **options).stest()
    lights_out()
    with pytest.raises(RuntimeError, match="lights"):
        Run(tmp_path / "r", task, **options).stest()
    with pytest.raises(ForeignRun, match="curvature_samples: expected 12, found 13") as refused:
        Run(tmp_path / "r", task, curvature_samples=13, **QUIET).stest()
    assert refused.value.exit_code == 3
    resumed = Run(tmp_path / "r", task, **QUIET)
    resumed.stest()
    assert np.array_equal(resumed.s_test(slice(None)), Run(tmp_path / "calm").s_test(slice(None)))


def test_more_samples_than_there_are_is_all_of_them(tmp_path):
    task = tasks.mlp()
    runs = [Run(tmp_path / f"{count}", task, curvature_samples=count, **QUIET) for count in (None, 1000)]
    assert [run.stest().computed for run in runs] == [4, 4]
    assert np.array_equal(*(run.s_test(slice(None)) for run in runs))


def test_rows_that_are_wrong_go_the_other_way_with_a_note_and_right_numbers(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jacobian, "times", lambda *given, original=jacobian.times: 1.01 * original(*given))
    task = tasks.mlp()
    run = Run(tmp_path / "r", task, damping=0.05, tolerance=1e-9, **QUIET)
    with caplog.at_level(logging.WARNING, logger="infl_cache"):
        run.stest()
    assert "differ from differentiating twice" in caplog.text
    assert worst_row(run.s_test(slice(None)), solved(dense_ggn(task), task, 0.05)) <= 1e-6


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["mlp", "tokens", "convnet", "dicts"])
def test_without_a_curvature_influences_are_products_of_gradients(name, cache, tmp_path):
    task = TASKS[name]()
    run = Run(tmp_path / "r", task, solver="identity", cache=cache, **QUIET)
    run.all()
    train, test = gradient_rows(task, range(10)), gradient_rows(task, range(4), data="test")
    expected = -(test @ train.T / 10).numpy()
    np.testing.assert_allclose(run.scores(), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(run.s_test(slice(None)), test.numpy(), rtol=1e-11, atol=1e-14)
    assert "spectrum" not in run.folder.plan("stest")
