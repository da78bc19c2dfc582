"""What is found out of the curvature once a run, and what follows from it: damping, advice."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from infl_cache import BadInput, Run
from infl_cache.maths.curvature import Spectrum
from infl_cache.stages import spectrum as module
from infl_cache.stages.spectrum import auto_damping
from tests import tasks
from tests.tasks import TASKS, normal
from tests.twins import dense_ggn, dense_hessian

QUIET = {"progress": False}


def kept(path):
    return Run(path).folder.plan("stest")


@pytest.mark.parametrize(
    ("solver", "name"), [("cg", "mlp"), ("cg", "dicts"), ("pcg", "tokens"), ("pcg", "convnet"), ("pcg", "attention")]
)
def test_automatic_damping_makes_every_hessian_solvable(solver, name, tmp_path):
    task = TASKS[name]()
    true = torch.linalg.eigvalsh(dense_hessian(task))
    options = {"solver": solver, "curvature": "hessian", "damping": "auto", "tolerance": 1e-4}
    run = Run(tmp_path / "r", task, **options, **QUIET)
    assert run.stest().notes == ()
    damping = kept(run.path)["damping"]
    assert damping + float(true[0]) > 0.2e-3 * float(true[-1])
    matrix = dense_hessian(task) + damping * torch.eye(len(true), dtype=torch.float64)
    store, (block,) = run.folder.store("stest"), run.folder.stage_blocks("stest")
    found = store.read_block(block, ["s_test", "residual", "converged"])
    assert found["converged"].all()
    rhs = found["s_test"] @ matrix.numpy()
    again = Run(tmp_path / "i", task, solver="identity", **QUIET)
    again.stest()
    expected = again.s_test(slice(None))
    assert (np.linalg.norm(rhs - expected, axis=1) <= 1.01e-4 * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.parametrize("name", ["logistic", "mlp", "badly_scaled"])
def test_automatic_damping_of_ggn_is_a_thousandth_of_its_largest_eigenvalue(name, tmp_path):
    task = TASKS[name]()
    run = Run(tmp_path / "r", task, damping="auto", **QUIET)
    run.stest()
    largest = float(torch.linalg.eigvalsh(dense_ggn(task))[-1])
    assert kept(run.path)["damping"] == pytest.approx(1e-3 * largest, rel=0.02)
    assert kept(run.path)["spectrum"]["smallest"] >= 0


def test_a_margin_below_zero_is_not_taken_for_the_spectrum_of_a_sum_of_squares(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "spectrum_of", lambda *_: Spectrum(largest=2.0, smallest=-0.01, mean=0.1, steps=24))
    for curvature, expected in (("ggn", 0.002), ("hessian", 0.015)):
        run = Run(tmp_path / curvature, tasks.mlp(), damping="auto", curvature=curvature, **QUIET)
        run.stest()
        assert kept(run.path)["damping"] == pytest.approx(expected)


def test_the_damping_chosen_once_holds_after_a_stop(tmp_path, monkeypatch, lights_out):
    options = {"damping": "auto", "curvature": "hessian", "test_block_rows": 1, **QUIET}
    Run(tmp_path / "calm", tasks.mlp(), **options).stest()
    lights_out()
    with pytest.raises(RuntimeError, match="lights"):
        Run(tmp_path / "r", tasks.mlp(), **options).stest()
    before = kept(tmp_path / "r")["damping"]
    monkeypatch.setattr(module, "spectrum_of", lambda *_: pytest.fail("estimated once more"))
    resumed = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    resumed.stest()
    assert kept(tmp_path / "r")["damping"] == before == kept(tmp_path / "calm")["damping"] > 0
    assert np.array_equal(resumed.s_test(slice(None)), Run(tmp_path / "calm").s_test(slice(None)))


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_an_indefinite_hessian_is_advised_against_and_ggn_is_not(kind, tmp_path, caplog):
    task = tasks.mlp()
    lowest = float(torch.linalg.eigvalsh(dense_hessian(task))[0])
    with caplog.at_level(logging.WARNING, logger="infl_cache"):
        Run(tmp_path / "r", task, curvature=kind, damping=-0.5 * lowest, **QUIET).stest()
    assert ("the damped Hessian is indefinite" in caplog.text) == (kind == "hessian")
    if kind == "hessian":
        assert "use --curvature ggn, or --damping" in caplog.text
        enough = float(caplog.text.split("or --damping ")[1].split()[0])
        assert enough > -lowest
        caplog.clear()
        Run(tmp_path / "s", task, curvature=kind, damping=enough, **QUIET).stest()
        assert "indefinite" not in caplog.text


def test_a_definite_hessian_is_not_advised_against(tmp_path, caplog):
    # Convex, and flat in many directions: many features, few samples.
    task = tasks.logistic(
        model=tasks.built(lambda: torch.nn.Linear(40, 3), torch.float64),
        train=torch.utils.data.TensorDataset(normal(30, 40), tasks.labels(30)),
        test=torch.utils.data.TensorDataset(normal(4, 40), tasks.labels(4)),
    )
    with caplog.at_level(logging.WARNING, logger="infl_cache"):
        Run(tmp_path / "r", task, curvature="hessian", damping=1e-3, **QUIET).stest()
    assert "indefinite" not in caplog.text


@pytest.mark.parametrize("options", [{"damping": "auto"}, {"solver": "ekfac", "damping": 0.1}])
def test_products_that_are_not_finite_end_the_stage_with_a_remedy(options, tmp_path):
    task = tasks.logistic()
    task.train.tensors[0][3] = torch.inf
    with pytest.raises(BadInput, match=r"expected finite products, found NaN or Inf.*--nonfinite skip"):
        Run(tmp_path / "r", task, **options, **QUIET).stest()


def test_automatic_damping_counts_weight_decay():
    spectrum = Spectrum(largest=1.0, smallest=-0.1, mean=0.0, steps=9)
    assert auto_damping(spectrum, 0.04) == pytest.approx(0.09)
    assert auto_damping(spectrum, 0.2) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({"solver": "ekfac"}, False),
        ({"solver": "fisher"}, False),
        ({"solver": "cg"}, True),
        ({"solver": "ekfac", "damping": "auto"}, True),
        ({"solver": "ekfac", "curvature": "hessian"}, True),
        ({"solver": "lissa", "scale": 50.0, "depth": 5}, False),
        ({"solver": "lissa", "depth": 5}, True),
        ({"solver": "lissa", "scale": 50.0, "depth": 5, "curvature": "hessian"}, True),
    ],
)
def test_only_who_chooses_or_is_to_be_warned_looks_at_the_spectrum(options, looks, tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), **{"damping": 0.1, **options}, **QUIET)
    run.grads()
    run.stest()
    assert ("spectrum" in kept(run.path)) == looks
