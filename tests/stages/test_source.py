"""Gradients that are not kept: stage 3 computes them again, the same ones, of the same samples."""

import numpy as np
import pytest
import torch
import zarr

from infl_cache import BadInput, ForeignRun, IncompleteStore, Run, Task
from infl_cache.stages import source
from tests import tasks
from tests.tasks import TASKS

QUIET = {"progress": False}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_matrix_is_the_same_without_a_store_of_gradients(name, tmp_path):
    options = {"solver": "exact", "damping": 0.1, "block_rows": 4, "batch_size": 3, **QUIET}
    kept, fresh = (
        Run(tmp_path / "kept", TASKS[name](), **options),
        Run(tmp_path / "not", TASKS[name](), cache=False, **options),
    )
    kept.all(), fresh.all()
    assert np.allclose(kept.scores(), fresh.scores(), rtol=1e-6, atol=1e-6 * np.abs(kept.scores()).max())


def test_losses_and_digests_are_all_that_is_stored(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), cache=False, **QUIET)
    assert run.grads().computed == 10
    assert sorted(zarr.open_group(tmp_path / "run" / "grad_z.zarr", mode="r").array_keys()) == [
        "digest",
        "loss",
        "target",
    ]
    assert "not kept" in str(run.status())
    with pytest.raises(IncompleteStore, match="--no-cache"):
        run.grad_z(0)


def test_stage_3_does_stage_1_itself_where_nothing_is_kept(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), cache=False, **QUIET)
    run.stest()
    run.influence()
    assert run.scores().shape == (4, 10)


def test_keeping_and_not_keeping_are_different_runs(tmp_path):
    Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()
    with pytest.raises(ForeignRun, match="cache"):
        Run(tmp_path / "run", tasks.mlp(), cache=False, **QUIET).influence()


def test_a_sample_that_has_changed_since_stage_1_is_named(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", tasks.mlp(), cache=False, **QUIET)
    run.grads(), run.stest()
    real = source.batches

    def other(dataset, name, collate, groups, device, workers=0):
        for batch in real(dataset, name, collate, groups, device, workers):
            batch.digests[-1] += 1
            yield batch

    monkeypatch.setattr(source, "batches", other)
    with pytest.raises(ForeignRun, match=r"train\[9\]"):
        run.influence()


def test_a_gradient_that_is_not_finite_stops_or_is_skipped(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", tasks.mlp(torch.float32), cache=False, **QUIET)
    run.grads(), run.stest()
    real = source.capture

    def broken(task, forms, batch, measure=False):
        found = real(task, forms, batch, measure)
        for inputs, _ in found.factors.values():
            inputs[list(batch.indices).index(3)] = torch.nan
        if found.dense.shape[1]:
            found.dense[list(batch.indices).index(3)] = torch.nan
        return found

    monkeypatch.setattr(source, "capture", broken)
    with pytest.raises(IncompleteStore, match=r"NaN or Inf at train samples 3;"):
        run.influence()
    skipping = Run(tmp_path / "run", tasks.mlp(torch.float32), nonfinite="skip", **QUIET)
    skipping.influence()
    assert np.isnan(skipping.scores()).all(0).tolist() == [index == 3 for index in range(10)]
    assert 3 not in skipping.helpful(0, k=10).ids


def root_loss(outputs, targets):
    """Zero with a gradient that is not a number where output and target are equal."""
    return (outputs - targets).square().sum(1).sqrt()


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_a_finite_loss_with_a_gradient_that_is_not_is_named_or_skipped(tmp_path, solver):
    x, y = tasks.normal(14, 5), tasks.normal(14, 2, seed=3)
    x[6], y[6] = 0, 0
    model = tasks.built(lambda: torch.nn.Linear(5, 2, bias=False), torch.float64)
    train, test = tasks.split(x, y, n_train=10)
    task = Task(model=model, train=train, test=test, loss=root_loss)
    options = {"cache": False, "solver": solver, "damping": 0.1, "batch_size": 4, **QUIET}
    with pytest.raises(BadInput, match=r"train samples 6;"):
        Run(tmp_path / "stop", task, **options).grads()
    run = Run(tmp_path / "skip", task, nonfinite="skip", **options)
    run.all()
    assert np.isnan(run.scores()).any(0).tolist() == [index == 6 for index in range(10)]
