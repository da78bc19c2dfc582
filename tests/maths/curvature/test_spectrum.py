"""The ends of a spectrum by a few products, against `eigvalsh`."""

from __future__ import annotations

import math

import pytest
import torch

from infl_cache.maths.curvature import spectrum_of
from infl_cache.stages.spectrum import auto_damping
from tests.tasks import normal


def with_eigenvalues(values, seed=13):
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def found_of(matrix):
    return spectrum_of(lambda v: v @ matrix, len(matrix), matrix)


EVEN = torch.linspace(0.1, 1.0, 20, dtype=torch.float64)
SPECTRA = {
    "definite": EVEN,
    "indefinite": EVEN - 0.5,
    "negative": -EVEN,
    "rank one": torch.tensor([0.0] * 29 + [3.0], dtype=torch.float64),
    "minus rank one": torch.tensor([0.0] * 29 + [-3.0], dtype=torch.float64),
    "zero": torch.zeros(7, dtype=torch.float64),
    "one number": torch.tensor([-2.0], dtype=torch.float64),
    "repeated": torch.tensor([-1.0] * 20 + [2.0] * 30, dtype=torch.float64),
    "a multiple of the identity": torch.full((30,), 4.0, dtype=torch.float64),
    "far apart": torch.logspace(-8, 0, 20, dtype=torch.float64),
}


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_those_of_eigvalsh_where_the_products_suffice(name, dtype, scale):
    matrix = scale * with_eigenvalues(SPECTRA[name])
    true = torch.linalg.eigvalsh(matrix)
    found = found_of(matrix.to(dtype))
    near = (5e-3 if name == "far apart" else 1e-4 if dtype == torch.float32 else 1e-6) * float(true.abs().max())
    assert abs(found.largest - float(true[-1])) <= near
    assert abs(found.smallest - float(true[0])) <= near
    assert float(true[0]) - near <= found.mean <= float(true[-1]) + near
    assert 1 <= found.steps <= len(matrix)


@pytest.mark.parametrize("seed", range(10))
def test_many_eigenvalues_are_bounded_within_a_few_percent(seed):
    matrix = normal(120, 120, seed=seed)
    matrix = matrix + matrix.T
    true = torch.linalg.eigvalsh(matrix)
    found, width = found_of(matrix), float(true[-1] - true[0])
    assert abs(found.largest - float(true[-1])) <= 0.03 * width
    assert abs(found.smallest - float(true[0])) <= 0.03 * width
    assert found.steps == 24


@pytest.mark.parametrize(
    "rows", [[[0, 1], [1, 0]], [[1, -1], [-1, 1]], [[1, 1], [1, 1]], [[2, -1, -1], [-1, 2, -1], [-1, -1, 2]]], ids=str
)
def test_matrices_whose_eigenvectors_are_signs_hide_nothing(rows):
    matrix = torch.tensor(rows, dtype=torch.float64)
    true, found = torch.linalg.eigvalsh(matrix), found_of(matrix)
    assert (found.smallest, found.largest) == pytest.approx((float(true[0]), float(true[-1])), abs=1e-9)


def test_the_mean_is_estimated_without_a_bias():
    values = [found_of(with_eigenvalues(SPECTRA["repeated"], seed)).mean for seed in range(60)]
    assert sum(values) / 60 == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_are_told_apart(bad):
    found = spectrum_of(lambda v: v * bad, 5, torch.zeros(1))
    assert math.isnan(found.largest)
    assert math.isnan(found.smallest)


def test_nothing_random_is_drawn_from_the_global_generator():
    state = torch.get_rng_state()
    assert found_of(torch.eye(5)) == found_of(torch.eye(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("lowest", [0.0, 1e-4, -1e-4, -7e-4, -1e-3, -2e-3, -0.3, -5.0])
def test_automatic_damping_leaves_every_operator_definite(lowest, weight_decay):
    spectrum = found_of(torch.diag(torch.tensor([lowest, 0.3, 1.0], dtype=torch.float64)))
    damping = auto_damping(spectrum, weight_decay)
    assert damping > 0
    assert damping + weight_decay + lowest >= 0.3e-3 * max(1.0, -lowest)


def test_automatic_damping_of_nothing_is_positive():
    assert auto_damping(found_of(torch.zeros(4, 4)), 0.0) > 0
