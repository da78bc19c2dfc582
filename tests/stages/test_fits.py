"""Fits are made once a run, kept, and made anew where they are damaged or belong to another run."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from infl_cache import Run
from infl_cache.maths.solvers import ekfac
from infl_cache.stages.fits import FIT
from tests import tasks

QUIET = {"progress": False}
SOLVERS = [{"solver": "ekfac"}, {"solver": "pcg", "preconditioner": "ekfac"}]


@pytest.fixture
def fits(monkeypatch):
    made, original = [], ekfac.fit
    monkeypatch.setattr(ekfac, "fit", lambda *given: made.append(1) or original(*given))
    return made


@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_a_fit_is_made_once_for_all_calls(options, fits, tmp_path):
    calm = Run(tmp_path / "calm", tasks.mlp(), test_block_rows=1, **options, **QUIET)
    calm.stest()
    assert len(fits) == 1
    first = Run(tmp_path / "r", tasks.mlp(), test="0", test_block_rows=1, **options, **QUIET)
    first.stest()
    more = Run(tmp_path / "r", tasks.mlp(), test="0:4", **QUIET)
    assert more.stest().computed == 3
    assert len(fits) == 2
    assert np.array_equal(more.s_test(slice(None)), calm.s_test(slice(None)))


@pytest.mark.parametrize("options", [*SOLVERS, {"solver": "pcg"}], ids=str)
@pytest.mark.parametrize("place", [0, 30, -40, -1])
def test_a_damaged_fit_is_made_anew(options, place, tmp_path, caplog):
    Run(tmp_path / "r", tasks.mlp(), test="0", test_block_rows=1, **options, **QUIET).stest()
    content = bytearray((tmp_path / "r" / FIT).read_bytes())
    whole = bytes(content)
    content[place] ^= 1
    (tmp_path / "r" / FIT).write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="infl_cache"):
        run = Run(tmp_path / "r", tasks.mlp(), test="0:4", **QUIET)
        run.stest()
    assert "it is fitted anew" in caplog.text
    assert (tmp_path / "r" / FIT).read_bytes() == whole
    assert np.isfinite(run.s_test(slice(None))).all()


def test_a_fit_of_another_system_is_not_taken(fits, tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), solver="ekfac", **QUIET)
    run.stest()
    other = tasks.mlp()
    with torch.no_grad():
        other.model[0].weight.mul_(1.5)
    stale = (tmp_path / "r" / FIT).read_bytes()
    fresh = Run(tmp_path / "s", other, solver="ekfac", test_block_rows=1, test="0", **QUIET)
    fresh.stest()
    expected = fresh.s_test(0)
    (tmp_path / "s" / FIT).write_bytes(stale)
    again = Run(tmp_path / "s", other, test="0:2", **QUIET)
    again.stest()
    assert len(fits) == 3
    assert np.array_equal(again.s_test(0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_outputs_that_are_no_tensor_are_fitted_by_the_gradients_of_the_loss(options, dtype, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="infl_cache"):
        run = Run(tmp_path / "r", tasks.dicts(dtype), damping=0.1, **options, **QUIET)
        run.stest()
    assert "EK-FAC is fitted to the empirical Fisher matrix" in caplog.text
    assert np.isfinite(run.s_test(slice(None))).all()
    if options["solver"] == "pcg":
        exact = Run(tmp_path / "e", tasks.dicts(), damping=0.1, solver="exact", **QUIET)
        exact.stest()
        found, expected = run.s_test(slice(None)), exact.s_test(slice(None))
        assert (np.linalg.norm(found - expected, axis=1) <= 1e-2 * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_without_damping_what_no_sample_touches_stays_zero(options, tmp_path):
    # Tokens that the training samples do not have leave zeros in the approximation.
    run = Run(tmp_path / "r", tasks.tokens(n_train=3), damping=0.0, **options, **QUIET)
    run.stest()
    assert np.isfinite(run.s_test(slice(None))).all()
