"""LiSSA neither explodes nor goes on for nothing: the scale, the depth and r, and what is said about them."""

import json
import tempfile

import numpy as np
import pytest
import torch

import infl_cache.ptif as ptif
from infl_cache.errors import BadInput
from tests.ptif.conftest import old
from tests.ptif.test_calculating import dense_influences, matrix


def meta(config):
    with open(f"{config['outdir']}/influence_results_0_all.meta.json") as file:
        return json.load(file)


def steep():
    """A problem whose curvature is far above the default scale of 25."""
    given = old()
    for loader in (given.trainloader, given.testloader):
        x, y = loader.dataset.tensors
        loader.dataset.tensors = (30 * x, y)
    with torch.no_grad():
        given.model.weight /= 30
    return given


def test_a_scale_that_would_explode_is_raised_and_the_result_is_the_same_system(config, caplog):
    given = steep()
    config.update(damp=20.0, recursion_depth=500)
    with caplog.at_level("INFO"):
        influences, _, _ = ptif.calc_img_wise(config, *given.given)
    expected = dense_influences(given, 20.0)
    assert np.abs(matrix(influences) - expected).max() < 0.02 * np.abs(expected).max()
    assert "scale: 25 could diverge" in caplog.text
    found = meta(config)["lissa"]
    assert found["scale_asked"] == 25
    assert found["scale"] > found["largest_eigenvalue"] > 25


def test_without_readjust_such_a_scale_is_refused_with_one_that_will_do(config):
    with pytest.raises(BadInput, match=r"config\['scale'\]: expected more than \d+.*LiSSA could diverge; give \d+"):
        ptif.calc_img_wise({**config, "damp": 20.0, "readjust": False}, *steep().given)


def test_a_scale_that_takes_more_steps_than_are_allowed_is_lowered(given, config, tmp_path):
    config.update(recursion_depth=150)
    influences, _, _ = ptif.calc_img_wise(config, *given.given)
    expected = dense_influences(given, 0.1)
    assert np.abs(matrix(influences) - expected).max() < 0.02 * np.abs(expected).max()
    assert meta(config)["lissa"]["scale"] < 25
    assert meta(config)["not_converged"] == []
    config.update(readjust=False, outdir=str(tmp_path / "as_asked"))
    slow, _, _ = ptif.calc_img_wise(config, *given.given)
    assert meta(config)["lissa"]["scale"] == 25
    assert len(meta(config)["not_converged"]) > 0
    assert np.abs(matrix(slow) - expected).max() > 0.02 * np.abs(expected).max()


def test_depth_and_r_are_lowered_where_it_costs_no_precision_and_that_is_said(given, config, caplog):
    config.update(r=10)
    with caplog.at_level("INFO"):
        influences, _, _ = ptif.calc_img_wise(config, *given.given)
    found = meta(config)["lissa"]
    assert found["steps_allowed"] == 50_000
    assert found["steps_most"] < 1000
    assert found["steps_saved"] > 0.98
    assert "of recursion_depth 5,000 times r 10 a test sample took" in caplog.text
    expected = dense_influences(given, 0.1)
    assert np.abs(matrix(influences) - expected).max() < 0.02 * np.abs(expected).max()


def test_r_recursions_are_averaged_where_one_does_not_suffice(config, tmp_path):
    given = old(n_train=200)
    expected = dense_like(given)
    errors = []
    for r in (1, 8):
        asked = {**config, "r": r, "recursion_depth": 60, "tolerance": 1e-6, "outdir": str(tmp_path / str(r)),
                 "options": {"sample_batch": 16}, "scale": None}  # fmt: skip
        influences, _, _ = ptif.calc_img_wise(asked, *given.given)
        assert meta(asked)["lissa"]["steps_most"] > 13 * (r - 1)
        errors.append(np.abs(matrix(influences) - expected).max())
    assert errors[1] < 0.7 * errors[0]


def dense_like(given):
    """The influences by the solver that writes everything out."""
    config = {"solver": "exact", "damp": 0.1, "display_progress": False, "json_filename": "exact"}
    with tempfile.TemporaryDirectory() as folder:
        return matrix(ptif.calc_img_wise({**config, "outdir": folder}, *given.given)[0])


def test_scale_and_damp_can_be_left_to_the_spectrum(given, config):
    config.update(scale=None, damp=None)
    influences, _, _ = ptif.calc_img_wise(config, *given.given)
    damping = meta(config)["system"]["damping"]
    assert 0 < damping < 0.01
    assert np.isfinite(matrix(influences)).all()


def test_what_did_not_converge_is_named(given, config, caplog):
    config.update(recursion_depth=2)
    influences, _, _ = ptif.calc_img_wise(config, *given.given)
    assert np.isfinite(matrix(influences)).all()
    assert meta(config)["not_converged"] == list(range(12))
    assert "s_test of 12 test samples did not converge" in caplog.text
