"""The dense solve."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache import BadInput
from infl_cache.maths.solvers import Exact, solve
from infl_cache.maths.solvers import exact as exact_module
from tests.driving import operator_of
from tests.tasks import TASKS, normal
from tests.twins import dense_ggn, dense_hessian, gradient_rows, relative_error


def symmetric(eigenvalues):
    """A float64 matrix with the given eigenvalues."""
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=13))[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def of(matrix):
    return lambda v: v @ matrix.T


def true_residual(matrix, solution, rhs):
    return (solution.value @ matrix.T - rhs).norm(dim=1) / rhs.norm(dim=1)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_solutions_equal_those_of_linalg_on_every_task(name, kind):
    task = TASKS[name](weight_decay=0.02)
    rhs = gradient_rows(task, range(4), data="test")
    dense = (dense_ggn if kind == "ggn" else dense_hessian)(task) + 0.12 * torch.eye(rhs.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(dense, rhs.T).T
    with operator_of(task, kind, damping=0.1) as operator:
        found = solve(operator, rhs, Exact())
    assert relative_error(found.value, expected) < 1e-6
    assert found.converged.all()
    assert found.reasons == ("",) * 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 13), st.integers(0, 10))
def test_any_number_of_columns_at_a_time_gives_numpy_s_solution(size, sides, columns, seed):
    matrix = symmetric([0.1 + i for i in range(size)])
    rhs = normal(sides, size, seed=seed)
    found = solve(of(matrix), rhs, Exact(columns=columns))
    expected = np.linalg.solve(matrix.numpy(), rhs.numpy().T).T
    assert relative_error(found.value, torch.tensor(expected)) < 1e-10


def test_an_indefinite_matrix_is_solved_too():
    matrix = symmetric([-2.0, -0.5, 0.3, 1.0, 4.0])
    rhs = normal(3, 5)
    found = solve(of(matrix), rhs, Exact())
    assert relative_error(found.value, torch.linalg.solve(matrix, rhs.T).T) < 1e-10
    assert found.converged.all()


def test_the_matrix_is_built_and_factorised_once():
    matrix, asked = symmetric([1.0, 2.0, 3.0]), []

    def operator(v):
        asked.append(len(v))
        return v @ matrix

    solver = Exact().prepare(operator)
    for seed in range(3):
        rhs = normal(2, 3, seed=seed)
        assert relative_error(solver(rhs).value, torch.linalg.solve(matrix, rhs.T).T) < 1e-12
    assert asked == [3, 2, 2, 2]


def test_the_residual_is_the_true_one():
    matrix = symmetric([1e-3, 1.0, 1e3])
    rhs = normal(2, 3)
    found = solve(of(matrix), rhs, Exact())
    torch.testing.assert_close(found.residual, true_residual(matrix, found, rhs), rtol=1e-6, atol=1e-12)
    unsymmetric = matrix + torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = solve(of(unsymmetric), rhs, Exact())
    assert (found.residual > 1e-3).all()
    torch.testing.assert_close(found.residual, true_residual(unsymmetric, found, rhs))
    symmetric_part = (unsymmetric + unsymmetric.T) / 2
    assert relative_error(found.value, torch.linalg.solve(symmetric_part, rhs.T).T) < 1e-9
    assert not found.converged.any()


def test_a_zero_right_hand_side_has_the_solution_zero():
    rhs = torch.zeros(2, 3, dtype=torch.float64)
    rhs[1] = 1.0
    found = solve(of(symmetric([1.0, 2.0, 3.0])), rhs, Exact())
    assert not found.value[0].any()
    assert found.value[1].any()
    assert found.residual[0] == 0
    assert found.converged.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("definite", [True, False])
def test_a_right_hand_side_that_is_not_finite_leaves_the_others_right(bad, definite):
    matrix = symmetric([1.0 if definite else -1.0, 2.0, 3.0, 4.0])
    rhs = normal(3, 4)
    rhs[1, 2] = bad
    found = solve(of(matrix), rhs, Exact())
    expected = torch.linalg.solve(matrix, rhs[[0, 2]].T).T
    assert relative_error(found.value[[0, 2]], expected) < 1e-12
    assert found.converged.tolist() == [True, False, True]
    assert not torch.isfinite(found.residual[1])
    assert found.reasons[1] == "not finite"


def test_a_singular_matrix_is_reported_and_never_called_converged():
    rhs = normal(2, 3)
    found = solve(of(symmetric([0.0, 1.0, 2.0])), rhs, Exact())
    assert not found.converged.any()
    assert all("singular or nearly so; use more damping" in reason for reason in found.reasons)
    zero = solve(lambda v: 0 * v, rhs, Exact())
    assert not zero.converged.any()


def test_float32_products_are_solved_in_float64():
    matrix = symmetric([0.5, 1.0, 2.0])
    rhs = normal(2, 3, dtype=torch.float32)
    found = solve(of(matrix.float()), rhs, Exact())
    assert found.value.dtype == torch.float64
    assert relative_error(found.value, torch.linalg.solve(matrix, rhs.double().T).T) < 1e-6
    assert found.converged.all()


def test_too_many_parameters_are_refused_with_a_remedy():
    rhs = torch.zeros(1, 20_001)
    message = r"solver exact: expected at most 20,000 parameters, found 20,001; use --solver cg, or fewer parameters="
    with pytest.raises(BadInput, match=message):
        solve(lambda v: v, rhs, Exact())
    assert exact_module.MAX_PARAMETERS == 20_000


def test_a_matrix_beyond_the_memory_is_refused_with_the_numbers():
    message = (
        r"solver exact: expected 9,600 bytes of memory for 20 parameters, found a budget of 9,599; give more --mem"
    )
    rhs = normal(1, 20)
    with pytest.raises(BadInput, match=message):
        solve(lambda v: v, rhs, Exact(memory=9_599))
    assert relative_error(solve(lambda v: v, rhs, Exact(memory=9_600)).value, rhs) < 1e-12
