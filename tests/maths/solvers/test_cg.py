"""Conjugate gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.maths.solvers import CG, solve
from infl_cache.maths.solvers.cg import INDEFINITE
from tests.driving import operator_of
from tests.tasks import TASKS, normal
from tests.twins import dense_ggn, gradient_rows, relative_error


def symmetric(eigenvalues, dtype=torch.float64):
    """A matrix with the given eigenvalues."""
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=13))[0]
    return (basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T).to(dtype)


def of(matrix):
    return lambda v: v @ matrix.T


SPREAD = [0.1 * 1.2**i for i in range(25)]


@pytest.mark.parametrize("name", TASKS)
def test_solutions_equal_those_of_linalg_on_every_task(name):
    task = TASKS[name](weight_decay=0.02)
    rhs = gradient_rows(task, range(4), data="test")
    dense = dense_ggn(task) + 0.12 * torch.eye(rhs.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(dense, rhs.T).T
    with operator_of(task, damping=0.1) as operator:
        found = solve(operator, rhs, CG(1e-10))
    assert relative_error(found.value, expected) < 1e-6
    assert found.converged.all()
    assert found.reasons == ("",) * 4


@pytest.mark.parametrize("name", TASKS)
def test_float32_converges_with_the_default_tolerance_on_every_task(name):
    rhs = gradient_rows(TASKS[name](), range(4), data="test")
    dense = dense_ggn(TASKS[name]()) + 0.1 * torch.eye(rhs.shape[1], dtype=torch.float64)
    with operator_of(TASKS[name](torch.float32), damping=0.1) as operator:
        found = solve(operator, rhs.float(), CG())
    assert found.value.dtype == torch.float32
    assert found.converged.all()
    assert relative_error(found.value, torch.linalg.solve(dense, rhs.T).T) < 0.01


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=15), st.integers(1, 4), st.integers(0, 20))
def test_any_positive_definite_system_is_solved_to_its_tolerance(eigenvalues, sides, seed):
    matrix, rhs = symmetric(eigenvalues), normal(sides, len(eigenvalues), seed=seed)
    found = solve(of(matrix), rhs, CG(1e-10))
    assert relative_error(found.value, torch.linalg.solve(matrix, rhs.T).T) < 1e-6
    assert found.converged.all()
    assert (found.residual <= 1e-10).all()


@pytest.mark.parametrize("tolerance", [1e-1, 1e-4, 1e-8])
def test_the_residual_is_the_true_one_and_meets_the_tolerance(tolerance):
    matrix, rhs = symmetric(SPREAD), normal(3, 25)
    found = solve(of(matrix), rhs, CG(tolerance))
    true = (found.value @ matrix - rhs).norm(dim=1) / rhs.norm(dim=1)
    torch.testing.assert_close(found.residual, true, rtol=1e-5, atol=1e-15)
    assert (true <= tolerance).all()
    assert found.converged.all()


def test_the_residual_is_the_true_one_in_float32_though_the_recursion_s_is_smaller():
    matrix, rhs = symmetric(SPREAD, torch.float32), normal(3, 25, dtype=torch.float32)
    found = solve(of(matrix), rhs, CG(1e-4))
    true = (found.value.double() @ matrix.double() - rhs.double()).norm(dim=1) / rhs.double().norm(dim=1)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.residual, true, rtol=0.05, atol=3e-6)
    hopeless = solve(of(matrix), rhs, CG(1e-12))
    assert not hopeless.converged.any()
    assert set(hopeless.reasons) == {"stopped at its iterations or at rounding"}
    assert int(hopeless.iterations.max()) < 1000


def test_the_tolerance_is_relative_to_the_right_hand_side():
    matrix = symmetric(SPREAD)
    rhs = normal(1, 25)
    large, small = (solve(of(matrix), factor * rhs, CG(1e-4)) for factor in (1e8, 1e-8))
    assert relative_error(large.value * 1e-16, small.value) < 1e-6
    assert torch.equal(large.iterations, small.iterations)


def test_sides_at_once_equal_one_by_one():
    matrix, rhs = symmetric(SPREAD), normal(5, 25) * torch.tensor([[1.0], [1e6], [1e-6], [1.0], [3.0]])
    together = solve(of(matrix), rhs, CG(1e-10))
    for k in range(5):
        alone = solve(of(matrix), rhs[k : k + 1], CG(1e-10))
        assert relative_error(together.value[k], alone.value[0]) < 1e-8
        assert abs(together.iterations[k] - alone.iterations[0]) <= 2


def test_a_side_that_has_converged_leaves_the_products():
    matrix, asked = symmetric(SPREAD), []

    def operator(v):
        asked.append(len(v))
        return v @ matrix

    easy = torch.linalg.eigh(matrix)[1][:, -2:].T  # two eigenvectors: one step each
    found = solve(operator, torch.cat([easy, normal(1, 25)]), CG(1e-8))
    assert found.iterations[:2].tolist() == [1, 1]
    assert found.iterations[2] > 10
    assert asked[:2] == [3, 1]


def test_equals_the_textbook_recursion():
    matrix, rhs = symmetric(SPREAD), normal(1, 25)
    x, r = torch.zeros(25, dtype=torch.float64), rhs[0].clone()
    p = r.clone()
    for _ in range(7):
        step = (r @ r) / (p @ matrix @ p)
        x, new = x + step * p, r - step * (matrix @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
    found = solve(of(matrix), rhs, CG(1e-14, max_iterations=7))
    assert relative_error(found.value[0], x) < 1e-9
    assert found.iterations.tolist() == [7]


def test_it_stops_at_its_iterations_and_says_so():
    matrix, rhs = symmetric(SPREAD), normal(3, 25)
    found = solve(of(matrix), rhs, CG(1e-10, max_iterations=4))
    assert found.iterations.tolist() == [4, 4, 4]
    assert not found.converged.any()
    assert set(found.reasons) == {"stopped at its iterations or at rounding"}
    assert (found.residual > 1e-10).all()


def test_a_zero_right_hand_side_has_the_solution_zero():
    rhs = normal(3, 25)
    rhs[1] = 0
    found = solve(of(symmetric(SPREAD)), rhs, CG(1e-6))
    assert not found.value[1].any()
    assert found.residual[1] == 0
    assert found.iterations[1] == 0
    assert found.converged.all()
    only = solve(of(symmetric(SPREAD)), torch.zeros(1, 25, dtype=torch.float64), CG(1e-6))
    assert only.converged.tolist() == [True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_right_hand_side_that_is_not_finite_leaves_the_others_right(bad):
    matrix, rhs = symmetric(SPREAD), normal(3, 25)
    rhs[1, 7] = bad
    found = solve(of(matrix), rhs, CG(1e-10))
    assert relative_error(found.value[[0, 2]], torch.linalg.solve(matrix, rhs[[0, 2]].T).T) < 1e-6
    assert found.converged.tolist() == [True, False, True]
    assert found.reasons == ("", "not finite", "")
    assert found.residual[1].isnan()
    assert not found.value[1].isfinite().all()


def test_an_indefinite_operator_is_reported_with_a_reason():
    found = solve(of(symmetric([-1.0, -0.5, 1.0, 2.0, 3.0])), normal(3, 5), CG(1e-8))
    assert not found.converged.any()
    assert set(found.reasons) == {INDEFINITE}
    assert "use ggn or more damping" in INDEFINITE
    assert found.value.isfinite().all()


def test_negative_curvature_of_one_side_leaves_the_others_right():
    matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    rhs = torch.tensor([[0.0, 1.0, 1.0, 1.0], [5.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    found = solve(of(matrix), rhs, CG(1e-10))
    assert found.converged.tolist() == [True, False]
    assert found.reasons == ("", INDEFINITE)
    assert relative_error(found.value[:1], rhs[:1] / torch.diag(matrix).abs()) < 1e-9


def test_the_zero_operator_is_reported():
    found = solve(lambda v: 0 * v, normal(2, 4), CG(1e-8))
    assert not found.converged.any()
    assert (found.residual == 1).all()


def test_an_operator_that_gives_nan_is_never_taken_for_converged():
    found = solve(lambda v: v * float("nan"), normal(2, 4), CG(1e-8))
    assert not found.converged.any()
    assert all(found.reasons)


def test_right_hand_sides_are_not_changed():
    rhs = normal(2, 25)
    before = rhs.clone()
    solve(of(symmetric(SPREAD)), rhs, CG(1e-8))
    assert torch.equal(rhs, before)
