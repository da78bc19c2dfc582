"""The solver that the options name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from infl_cache import Options
from infl_cache.config import StestOptions
from infl_cache.maths.solvers import CG, Exact, LiSSA, make_solver, solve
from tests.driving import operator_of
from tests.tasks import logistic, normal
from tests.twins import gradient_rows, relative_error


def made(memory=None, **given):
    return make_solver(Options.resolve(given).stest, memory)


def test_defaults():
    assert make_solver(StestOptions()) == CG(tolerance=1e-4, max_iterations=1000)
    assert made(solver="exact") == Exact()
    assert made(solver="lissa") == LiSSA(tolerance=0.02)


def test_options_reach_the_solver_they_belong_to():
    assert made(tolerance=1e-8, max_iterations=7) == CG(1e-8, 7)
    assert made(solver="exact", memory=10**6) == Exact(memory=10**6)
    given = {"tolerance": 0.1, "scale": 3.0, "depth": 9, "repeats": 2, "sample_batch": 32, "seed": 7}
    assert made(solver="lissa", **given) == LiSSA(**given)


def test_a_tolerance_of_zero_is_not_taken_for_none():
    assert made(tolerance=0.0) == CG(tolerance=0.0)
    assert made(solver="lissa", tolerance=0.0) == LiSSA(tolerance=0.0)


def test_solvers_are_plain_data_that_compares_and_cannot_be_changed():
    for solver in (CG(), Exact(), LiSSA()):
        assert type(solver)(**dataclasses.asdict(solver)) == solver
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.tolerance = 1.0


def test_all_solvers_agree_on_a_task():
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(4), data="test")
    with operator_of(task, damping=0.1) as operator:
        found = {name: solve(operator, rhs, made(solver=name)) for name in ("exact", "cg", "lissa")}
    assert all(each.converged.all() for each in found.values())
    assert relative_error(found["cg"].value, found["exact"].value) < 1e-3
    assert relative_error(found["lissa"].value, found["exact"].value) < 0.02


@pytest.mark.parametrize("solver", [CG(), Exact()], ids=lambda solver: type(solver).__name__)
def test_a_solution_has_an_entry_for_every_side(solver):
    found = solve(lambda v: 2 * v, normal(3, 5), solver)
    assert found.value.shape == (3, 5)
    assert len(found.residual) == len(found.iterations) == len(found.converged) == len(found.reasons) == 3
    assert found.residual.dtype == torch.float64
    assert found.iterations.dtype == torch.int64
    assert found.converged.dtype == torch.bool
