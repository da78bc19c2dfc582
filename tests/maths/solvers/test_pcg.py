"""Block conjugate gradients: dense solutions, odd right-hand sides, the same bits after a stop."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from infl_cache.config import StestOptions
from infl_cache.maths.curvature import captured, output_rows
from infl_cache.maths.curvature.rows import Rows
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.solvers import CG, PCG, make_solver, solve
from infl_cache.maths.solvers.cg import INDEFINITE
from infl_cache.maths.solvers.pcg import orthonormal
from tests.driving import CPU, decided, operator_of
from tests.tasks import TASKS, normal
from tests.twins import dense_ggn, dense_hessian, gradient_rows, relative_error


@functools.cache
def dense_of(name, kind):
    return (dense_ggn if kind == "ggn" else dense_hessian)(TASKS[name]())


@functools.cache
def sides_of(name):
    return gradient_rows(TASKS[name](), range(4), data="test")


def symmetric(eigenvalues, dtype=torch.float64):
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=13))[0]
    return (basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T).to(dtype)


def of(matrix):
    return lambda v: v @ matrix.T


SPREAD = [0.1 * 1.2**i for i in range(25)]


def true_residual(matrix, found, rhs):
    return (found.value.double() @ matrix.double() - rhs.double()).norm(dim=1) / rhs.double().norm(dim=1)


def rows_to_fit(task, forms, dtype):
    """Rows of the outputs, as a stage finds them for an approximation."""
    found = output_rows(task, forms, probe_batch(task, range(4), CPU), dtype, lambda _: None)
    assert found is not None
    cast, forms, row_bytes, _ = found
    return Rows(forms, captured(cast, forms, lambda: [probe_batch(cast, range(len(cast.train)), CPU)]), row_bytes)


WITH_ROWS = sorted(set(TASKS) - {"reused", "dicts", "branching"})
CASES = [
    (name, made) for name in TASKS for made in ("none", "nystrom", "ekfac") if made != "ekfac" or name in WITH_ROWS
]


@pytest.mark.parametrize(("kind", "damping"), [("ggn", 0.05), ("hessian", 5.0)])
@pytest.mark.parametrize(("name", "made"), CASES)
def test_solutions_are_those_of_a_dense_solve_on_every_task(name, made, kind, damping):
    matrix = dense_of(name, kind) + damping * torch.eye(len(dense_of(name, kind)), dtype=torch.float64)
    expected = torch.linalg.solve(matrix, sides_of(name).T).T
    # In float32 the rounding of the solution itself leaves residuals of up to about 1e-6 on these tasks.
    for dtype, tolerance, near in ((torch.float64, 1e-10, 1e-8), (torch.float32, 3e-6, 1e-4)):
        task = TASKS[name](dtype)
        rows = functools.partial(rows_to_fit, task, decided(task, "dense")[0], dtype)
        fitted = {"other_rows": rows} if made == "ekfac" else {}
        with operator_of(task, kind, damping=damping, **fitted) as operator:
            options = StestOptions(solver="pcg", preconditioner=made, tolerance=tolerance)
            solver = make_solver(options, sampled=lambda operator=operator: operator)
            found = solve(operator, sides_of(name).to(dtype), solver)
        assert relative_error(found.value, expected) < near
        assert found.converged.all()
        true = true_residual(matrix, found, sides_of(name))
        torch.testing.assert_close(found.residual, true, rtol=1e-3, atol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_right_hand_sides_of_one_block(dtype):
    matrix, rhs = symmetric(SPREAD, dtype), normal(9, 25, dtype=dtype)
    rhs[1] = rhs[0]  # identical
    rhs[2] = 0
    rhs[3, 4] = math.nan
    rhs[4] = rhs[0] - 2 * rhs[5]  # dependent
    rhs[6] *= 1e-6
    rhs[7] *= 1e6
    rhs[8, 0] = math.inf
    found = solve(of(matrix), rhs, PCG(1e-5))
    fine = [0, 1, 4, 5, 6, 7]
    assert [row for row in range(9) if found.converged[row]] == sorted([*fine, 2])
    assert not found.value[2].any()
    assert [found.reasons[row] for row in (3, 8)] == ["not finite"] * 2
    assert found.value[[3, 8]].isnan().all()
    expected = torch.linalg.solve(matrix.double(), rhs[fine].double().T).T
    assert relative_error(found.value[fine], expected) < 1e-3
    assert (true_residual(matrix, found, rhs)[fine] <= 1.1e-5).all()


@pytest.mark.parametrize("count", [1, 3, 25, 60])
def test_more_right_hand_sides_than_parameters_need_no_more_products(count):
    matrix, rhs, asked = symmetric(SPREAD), normal(count, 25), []

    def operator(v):
        asked.append(len(v))
        return v @ matrix

    found = solve(operator, rhs, PCG(1e-9))
    assert found.converged.all()
    assert max(asked[:-1]) <= 25
    assert relative_error(found.value, torch.linalg.solve(matrix, rhs.T).T) < 1e-7


def test_no_right_hand_side_that_counts():
    for rhs in (torch.zeros(2, 4), torch.full((2, 4), math.nan)):
        found = solve(lambda v: v, rhs, PCG())
        assert found.converged.tolist() == [not bool(rhs.isnan().any())] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowest", [-1e-3, -0.5, -100.0])
def test_an_indefinite_operator_ends_with_a_reason(lowest, dtype):
    found = solve(of(symmetric([lowest, *SPREAD], dtype)), normal(3, 26, dtype=dtype), PCG(1e-8))
    assert not found.converged.any()
    assert set(found.reasons) == {INDEFINITE}
    assert found.value.isfinite().all()
    assert found.residual.isfinite().all()


@pytest.mark.parametrize("factor", [0.0, 1e-42, math.nan, math.inf, -1.0])
@pytest.mark.parametrize("solver", [PCG(), CG()], ids=["pcg", "cg"])
def test_an_operator_that_solves_nothing_raises_nothing(solver, factor):
    found = solve(lambda v: v * factor, normal(3, 6, dtype=torch.float32), solver)
    assert not found.converged.any()
    assert all(found.reasons)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_preconditioner_that_is_not_finite_raises_nothing(count, factor):
    found = solve(of(symmetric(SPREAD)), normal(count, 25), PCG(fit=lambda _: lambda rows: rows * factor))
    assert not found.converged.any()
    assert all(found.reasons)


def test_the_preconditioner_is_fitted_once_for_all_blocks():
    fits, matrix = [], symmetric(SPREAD)
    solved = PCG(1e-8, fit=lambda _: fits.append(1) or (lambda rows: rows)).prepare(of(matrix))
    solved(normal(2, 25)), solved(normal(3, 25))
    assert fits == [1]


class Kept:
    """Keeps the state of every iteration, and gives one of them back."""

    def __init__(self, start=None):
        self.start, self.states = start, []

    def found(self):
        return None if self.start is None else {name: each.clone() for name, each in self.start.items()}

    def offer(self, state):
        self.states.append({name: each.clone() for name, each in state().items()})


STOPPED = {
    "calm": (torch.float64, 1e-10, 3),
    "restarted": (torch.float32, 1e-7, 3),
    "restarted in vain": (torch.float32, 1e-9, 2),
    "one row": (torch.float32, 3e-8, 1),
}


@pytest.mark.parametrize("case", STOPPED)
@pytest.mark.parametrize("kind", [PCG, CG])
def test_going_on_from_any_iteration_gives_the_same_bits(kind, case):
    dtype, tolerance, count = STOPPED[case]
    matrix = symmetric(SPREAD, dtype)
    rhs, options = normal(count, 25, dtype=dtype), kind(tolerance)
    kept = Kept()
    calm = options.prepare(of(matrix))(rhs, kept)
    assert len(kept.states) >= 8
    for state in [*kept.states[::11], *kept.states[-3:]]:
        again = options.prepare(of(matrix))(rhs, Kept(state))
        assert torch.equal(again.value, calm.value)
        assert torch.equal(again.residual, calm.residual)
        assert torch.equal(again.iterations, calm.iterations)
        assert again.reasons == calm.reasons


def test_directions_are_orthonormal_and_span_the_rows():
    rows = normal(5, 40)
    rows = torch.cat([rows, rows[:2] + rows[2:4], 1e-9 * rows[:1], torch.zeros(1, 40, dtype=torch.float64)])
    found = orthonormal(rows)
    assert len(found) == 5
    torch.testing.assert_close(found @ found.T, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows @ found.T @ found, rows, atol=1e-11, rtol=0)
