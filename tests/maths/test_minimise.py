import pytest
import torch

from infl_cache.maths.minimise import minimise


def quadratic(size, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.logspace(0, -condition, size, dtype=torch.float64)) @ basis.T
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_quadratic_is_solved_to_rounding_at_any_scale(scale):
    matrix, right = quadratic(30, 4)
    found = minimise(lambda x: scale * (matrix @ x - right), torch.zeros(30).double(), 1e-10 * scale)
    assert found.converged
    torch.testing.assert_close(found.point, torch.linalg.solve(matrix, right), rtol=1e-5, atol=1e-5)


def test_with_the_curvature_it_takes_a_step_or_two():
    matrix, right = quadratic(30, 6)
    found = minimise(
        lambda x: matrix @ x - right, torch.zeros(30).double(), 1e-9, lambda v: torch.linalg.solve(matrix, v)
    )
    assert found.converged
    assert found.iterations <= 2


def test_steps_that_are_far_too_long_or_short_are_mended():
    # log-sum-exp: nearly flat far away, curved at the minimum; and a fourth power, which is flat there.
    def logsumexp(x):
        return torch.tanh(x) + 1e-3 * x

    for gradient, begin in ((logsumexp, 40.0), (lambda x: x**3, 5.0), (lambda x: 1e8 * x, 1.0)):
        start = torch.full((3,), begin, dtype=torch.float64)
        found = minimise(gradient, start, 1e-10)
        assert found.converged, (begin, found)
        assert float(found.point.abs().max()) < 1e-3


def test_a_function_that_overflows_on_the_way_is_no_obstacle():
    found = minimise(lambda x: torch.exp(x) - 2, torch.tensor([-8.0], dtype=torch.float64), 1e-12)
    assert found.point.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_what_has_no_minimum_is_not_called_converged():
    found = minimise(lambda x: torch.ones_like(x), torch.zeros(2).double(), 1e-3)
    assert not found.converged
    assert not minimise(lambda x: torch.sign(x - 0.3), torch.zeros(1).double(), 1e-3).converged
