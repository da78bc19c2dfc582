"""Self-influence through a run folder: dense numbers for every solver, kills, refusals, and wrong labels found."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from infl_cache import BadInput, ForeignRun, IncompleteStore, Interrupted, Run
from infl_cache.maths.solvers.fisher import Fisher
from infl_cache.stages import fisher as fisher_stage
from infl_cache.stages import keeping
from infl_cache.stages import self_influence as stage
from infl_cache.stages.suspects import suspects_report
from infl_cache.stages.verify import verify
from tests import tasks
from tests.tasks import TASKS
from tests.twins import dense_ggn, gradient_rows

QUIET = {"progress": False}
NAMES = [("exact", "mlp"), ("exact", "tied"), ("fisher", "tokens"), ("fisher", "convnet"), ("identity", "tied"),
         ("identity", "attention")]  # fmt: skip


def dense_self_influence(task, kind, damping, fitted=slice(None)):
    """Of plain autograd's gradients and a matrix that is written out, in float64."""
    grads = gradient_rows(task, range(len(task.train))).double()
    matrix = torch.eye(grads.shape[1], dtype=torch.float64)
    if kind != "identity":
        some = grads[fitted]
        curvature = some.T @ some / len(some) if kind == "fisher" else dense_ggn(task).double()
        matrix = curvature + (damping + task.weight_decay) * matrix
    return (grads * torch.linalg.solve(matrix, grads.T).T).sum(1).numpy()


def made(path, task, **options):
    run = Run(path, task, **{"damping": 0.05, **QUIET, **options})
    run.grads()
    run.self_influence()
    return run


def values(run):
    with np.load(run.path / "self_influence.npz") as file:
        return file["values"]


def worst(found, expected):
    return (np.abs(found - expected) / np.abs(expected)).max()


@pytest.mark.parametrize(("solver", "name"), NAMES)
def test_equals_a_dense_solve(name, solver, tmp_path):
    task = TASKS[name](weight_decay=0.01)
    run = made(tmp_path / "r", task, solver=solver, block_rows=4)
    assert worst(values(run), dense_self_influence(task, solver, 0.05)) <= 1e-9
    assert not (tmp_path / "r" / "s_test.zarr").exists()


@pytest.mark.parametrize("options", [{"solver": "cg"}, {"solver": "pcg", "curvature": "fisher"}], ids=str)
def test_iterations_equal_a_dense_solve(options, tmp_path):
    task = tasks.mlp(n_train=20)
    run = made(tmp_path / "r", task, tolerance=1e-9, **options)
    assert worst(values(run), dense_self_influence(task, options.get("curvature", "ggn"), 0.05)) <= 1e-6


def test_ekfac_is_s_test_of_ekfac_and_says_how_far_off_it_is(tmp_path):
    task = dataclasses.replace(tasks.mlp(), test=tasks.mlp().train)
    run = made(tmp_path / "r", task, solver="ekfac")
    run.stest()
    assert worst(values(run), (run.s_test(slice(None)) * run.grad_z(slice(None))).sum(1)) <= 1e-9
    residual = stage.column(run.folder, "residual")
    assert np.isfinite(residual[:4]).all()
    assert np.isnan(residual[4:]).all()


def small_and_kept(solver, **changes):
    return Fisher(solver.tolerance, 1, side=8, panel=16, **changes)


def test_fisher_from_tiles_on_the_disk_and_of_a_subsample(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher_stage, "replace", small_and_kept)
    task = tasks.mlp(n_train=40)
    run = made(tmp_path / "r", task, solver="fisher", curvature_samples=30)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(42))[:30]
    assert worst(values(run), dense_self_influence(task, "fisher", 0.05, order)) <= 1e-9
    assert (tmp_path / "r" / "fisher.tiles").exists()


def test_wrong_labels_are_on_top(tmp_path):
    x = tasks.normal(200, 10, seed=20)
    y = (x[:, 0] + x[:, 1] > 0).long()
    wrong = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:10]
    y[wrong] = 1 - y[wrong]
    data = torch.utils.data.TensorDataset(x, y)
    model = tasks.built(lambda: nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2)), torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30)

    def objective():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(objective)
    task = tasks.Task(model=model, train=data, test=data, loss=tasks.cross_entropy, weight_decay=2e-3)
    run = made(tmp_path / "r", task, solver="fisher", damping=0.01)
    assert len(set(run.suspects(10).ids.tolist()) & set(wrong.tolist())) >= 7, "chance would find half of one"


@pytest.mark.parametrize("solver", ["cg", "fisher"])
def test_an_interrupted_stage_goes_on_after_the_last_block_with_the_same_bytes(solver, tmp_path, monkeypatch):
    options = {"solver": solver, "damping": 0.05, **QUIET}
    made(tmp_path / "calm", tasks.mlp(), block_rows=3, **options)
    run = Run(tmp_path / "r", tasks.mlp(), block_rows=3, **options)
    run.grads()
    original, calls = stage._stored, []

    def signalled(found, rows, block):
        calls.append(block.index)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(found, rows, block)

    monkeypatch.setattr(stage, "_stored", signalled)
    with pytest.raises(Interrupted):
        run.self_influence()
    assert "self-influence 6 of 10 rows" in str(run.status())
    assert Run(tmp_path / "r", tasks.mlp(), **QUIET).self_influence().computed == 4
    assert calls == [0, 1, 2, 3]
    files = [p for p in (tmp_path / "calm" / "self_influence.zarr").rglob("*") if p.is_file()]
    for file in [*files, tmp_path / "calm" / "self_influence.npz"]:
        assert file.read_bytes() == (tmp_path / "r" / file.relative_to(tmp_path / "calm")).read_bytes()


def test_a_long_iteration_is_kept_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0.0)
    kept = []
    monkeypatch.setattr(keeping.Keeping, "forget", lambda self: kept.append(self._kept.path))
    run = made(tmp_path / "r", tasks.mlp(), solver="cg")
    assert kept[0].name == "self_influence.state"
    assert kept[0].exists()
    run.self_influence(force=True)
    assert not (tmp_path / "r" / "s_test.state").exists()


def test_refusals(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.05, solver="exact", **QUIET)
    with pytest.raises(IncompleteStore, match="run infl-cache grads"):
        run.self_influence()
    run.grads()
    with pytest.raises(IncompleteStore, match="run infl-cache self-influence"):
        run.suspects()
    run.self_influence()
    with pytest.raises(ForeignRun, match=r"damping: expected 0\.05, found 0\.2"):
        Run(tmp_path / "r", tasks.mlp(), damping=0.2, **QUIET).self_influence()
    other = tasks.mlp()
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.5)
    with pytest.raises(ForeignRun, match="weights"):
        Run(tmp_path / "r", other, **QUIET).self_influence(force=True)
    with pytest.raises(BadInput, match="solver fisher: expected damping"):
        Run(tmp_path / "r", tasks.mlp(), solver="fisher", damping=0.0, **QUIET).self_influence(force=True)
    with pytest.raises(BadInput, match="k: expected at least 1, found 0"):
        run.suspects(0)
    assert run.self_influence().computed == 0
    assert Run(tmp_path / "r", tasks.mlp(), damping=0.2, **QUIET).self_influence(force=True).computed == 10
    run = Run(tmp_path / "r", tasks.mlp(), dtype="float32", **QUIET)
    run.grads(force=True)
    assert not (tmp_path / "r" / "self_influence.npz").exists()


def test_another_solver_than_that_of_stage_2_leaves_stage_2_alone(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), damping=0.05, solver="exact", **QUIET).all()
    run = Run(tmp_path / "r", tasks.mlp(), solver="identity", **QUIET)
    assert run.self_influence().computed == 10
    again = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    assert again.options.stest.solver == "exact"
    assert [result.computed for result in again.all()] == [0, 0, 0]
    assert again.self_influence().computed == 0
    assert worst(values(again), dense_self_influence(tasks.mlp(), "identity", 0)) <= 1e-9


@pytest.mark.parametrize("solver", ["fisher", "cg", "identity"])
def test_samples_without_a_gradient_are_nan_and_not_ranked(solver, tmp_path):
    task = tasks.logistic()
    task.train.tensors[0][3] = torch.inf
    run = Run(tmp_path / "r", task, nonfinite="skip", solver=solver, damping=0.05, tolerance=1e-9, **QUIET)
    run.grads()
    result = run.self_influence()
    assert "train samples 3 have no finite gradient" in result.notes[0]
    found, others = values(run), [i for i in range(10) if i != 3]
    assert np.flatnonzero(np.isnan(found)).tolist() == [3]
    assert sorted(run.suspects(10).ids.tolist()) == others
    clean = dataclasses.replace(tasks.logistic(), train=torch.utils.data.Subset(tasks.logistic().train, others))
    assert worst(found[others], dense_self_influence(clean, solver, 0.05)) <= 1e-6
    with pytest.raises(IncompleteStore, match="grads: expected finite rows"):
        Run(tmp_path / "r", task, nonfinite="stop", **QUIET).self_influence()


def test_values_that_did_not_converge_are_named(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=1e-4, tolerance=1e-12, max_iterations=2, **QUIET)
    run.grads()
    assert "self-influence of 10 train samples did not converge: 0, 1" in run.self_influence().notes[0]
    assert "converged: 0 of 10" in str(run.status())


def test_verify_finds_damage(tmp_path):
    run = made(tmp_path / "r", tasks.mlp(), solver="identity")
    assert verify(run.folder, show=False).faults == ()
    for name in ("self_influence.zarr/residual/c.0", "self_influence.npz"):
        content = bytearray((tmp_path / "r" / name).read_bytes())
        content[-9] ^= 1
        (tmp_path / "r" / name).write_bytes(content)
        assert any(name in str(fault) for fault in verify(run.folder, show=False).faults)


def test_the_table_and_the_picture(tmp_path, uninstalled, caplog):
    model = tasks.built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.float64)
    task = tasks.classified(model, tasks.normal(24, 1, 8, 8), 20)
    run = made(tmp_path / "r", task, solver="identity")
    text = suspects_report(run.folder, task)
    top = run.suspects(1)
    assert text.splitlines()[3].split()[::2] == [str(top.ids[0]), f"{top.values[0]:.3e}"]
    picture = tmp_path / "r" / "report" / "self_influence.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    picture.unlink()
    uninstalled("matplotlib")
    with caplog.at_level(logging.WARNING, logger="infl_cache"):
        suspects_report(run.folder, task)
    assert "matplotlib is not installed" in caplog.text
    assert not picture.exists()
