"""LiSSA: within its tolerance of the dense solution, the paper's recursion, honest about divergence."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from infl_cache.maths.curvature import Curvature, Spectrum, spectrum_of
from infl_cache.maths.solvers import LiSSA, solve
from tests.driving import operator_of
from tests.tasks import TASKS, logistic, mlp, normal, squared_error
from tests.twins import dense_ggn, gradient_rows, relative_error


def identity(task):
    return torch.eye(sum(parameter.numel() for parameter in task.model.parameters()), dtype=torch.float64)


def dense_solution(task, damping, rhs):
    matrix = dense_ggn(task) + (damping + task.weight_decay) * identity(task)
    return torch.linalg.solve(matrix, rhs.T).T


WHOLE = [
    ("logistic", 60, 0.02),
    ("mlp", 60, 0.05),
    ("badly_scaled", 60, 0.3),
    ("tokens", 40, 0.3),
    ("inplace", 40, 0.1),
    ("tied", 40, 0.5),
    ("multilabel", 60, 0.02),
]


@pytest.mark.parametrize(("name", "n_train", "damping"), WHOLE, ids=lambda value: str(value))
def test_solutions_are_near_the_dense_ones_with_options_it_chooses(name, n_train, damping):
    task = TASKS[name](n_train=n_train)
    rhs = gradient_rows(task, range(3), data="test")
    with operator_of(task, damping=damping) as operator:
        found = solve(operator, rhs, LiSSA())
    assert relative_error(found.value, dense_solution(task, damping, rhs)) < 0.05
    assert found.converged.all()
    assert found.reasons == ("", "", "")


SAMPLED = [("logistic", 400, 0.05), ("mlp", 300, 0.05), ("badly_scaled", 200, 1.0), ("regression", 300, 0.2)]


@pytest.mark.parametrize(("name", "n_train", "damping"), SAMPLED, ids=lambda value: str(value))
def test_solutions_from_sampled_batches_are_near_the_dense_ones(name, n_train, damping):
    task = TASKS[name](n_train=n_train)
    rhs = gradient_rows(task, range(3), data="test")
    picked = []
    with operator_of(task, damping=damping, size=256) as operator:
        pick = operator.pick
        object.__setattr__(operator, "pick", lambda indices: picked.append(len(indices)) or pick(indices))
        found = solve(operator, rhs, LiSSA())
        expected = torch.linalg.solve(operator(identity(task)), rhs.T).T
    assert picked[0] == 128
    assert relative_error(found.value, expected) < 0.05
    assert found.converged.all()


def test_float32_does_too():
    task = mlp(torch.float32, n_train=60)
    rhs = gradient_rows(task, range(3), data="test")
    with operator_of(task, damping=0.05) as operator:
        found = solve(operator, rhs, LiSSA())
    assert found.value.dtype == torch.float32
    exact = mlp(n_train=60)
    expected = dense_solution(exact, 0.05, gradient_rows(exact, range(3), data="test"))
    assert relative_error(found.value, expected) < 0.05
    assert found.converged.all()


def test_weight_decay_counts_as_damping():
    task = mlp(n_train=40, weight_decay=0.1)
    rhs = gradient_rows(task, range(2), data="test")
    with operator_of(task) as operator:
        found = solve(operator, rhs, LiSSA())
    assert relative_error(found.value, dense_solution(task, 0.0, rhs)) < 0.05
    assert found.converged.all()


def test_without_damping_it_still_solves_a_system_that_is_definite():
    # A linear model and the squared error: with more samples than features no direction is flat.
    task = logistic(n_train=40, loss=lambda outputs, targets: squared_error(outputs, F.one_hot(targets, 3)))
    rhs = gradient_rows(task, range(2), data="test")
    with operator_of(task) as operator:
        found = solve(operator, rhs, LiSSA(tolerance=1e-4))
    assert relative_error(found.value, dense_solution(task, 0.0, rhs)) < 0.01
    assert found.converged.all()


@pytest.mark.parametrize("depth", [1, 7, 20, 37])
def test_the_recursion_is_that_of_the_paper(depth):
    task, damping, scale = mlp(n_train=30, weight_decay=0.01), 0.1, 3.0
    rhs = gradient_rows(task, range(2), data="test")
    matrix = dense_ggn(task) + 0.11 * identity(task)
    expected = []
    for v in rhs:
        h = v
        for _ in range(depth):
            h = v + h - matrix @ h / scale  # h <- v + (I - H) h, with H and v over the scale
        expected.append(h / scale)
    with operator_of(task, damping=damping) as operator:
        found = solve(operator, rhs, LiSSA(tolerance=1e-12, scale=scale, depth=depth))
    assert relative_error(found.value, torch.stack(expected)) < 1e-12
    assert found.iterations.tolist() == [depth, depth]
    assert not found.converged.any()


def sampled_run(seed=42, repeats=1, depth=5):
    """A run on sampled batches of 40: the indices of each, the solution, and the dense matrix of each sample."""
    task = logistic(n_train=150)
    rhs = gradient_rows(task, range(2), data="test")
    picked = []
    with operator_of(task, damping=0.1) as operator:
        pick = operator.pick
        object.__setattr__(operator, "pick", lambda indices: picked.append(list(indices)) or pick(indices))
        options = LiSSA(1e-12, scale=2.0, depth=depth, sample_batch=40, seed=seed, repeats=repeats)
        found = solve(operator, rhs, options)
    return task, rhs, picked, found


def test_sampled_batches_are_distinct_samples_and_enter_the_recursion_as_their_mean():
    task, rhs, picked, found = sampled_run()
    assert len(picked) == 5
    assert all(len(set(indices)) == len(indices) == 40 and set(indices) <= set(range(150)) for indices in picked)
    assert len({tuple(sorted(indices)) for indices in picked}) == 5
    h = rhs
    for indices in picked:
        batch = logistic(train=[task.train[i] for i in indices])
        matrix = dense_ggn(batch) + 0.1 * identity(task)
        h = rhs + h - h @ matrix / 2.0
    assert relative_error(found.value, h / 2.0) < 1e-12


def test_a_seed_gives_the_same_numbers_and_another_seed_others():
    state = torch.get_rng_state()
    one, again, other = sampled_run()[3], sampled_run()[3], sampled_run(seed=43)[3]
    assert torch.equal(one.value, again.value)
    assert relative_error(other.value, one.value) > 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_repeats_are_averaged():
    runs = [sampled_run(seed=seed)[3] for seed in (42, 43, 44)]
    together = sampled_run(repeats=3)[3]
    assert relative_error(together.value, sum(run.value for run in runs) / 3) < 1e-13
    assert together.iterations.tolist() == [15, 15]


def test_what_one_recursion_has_solved_is_not_solved_again():
    task = mlp(n_train=40)
    rhs = gradient_rows(task, range(2), data="test")
    with operator_of(task, damping=0.1) as operator:
        once, often = (solve(operator, rhs, LiSSA(repeats=repeats)) for repeats in (1, 5))
    assert once.converged.all()
    assert torch.equal(often.iterations, once.iterations)
    assert torch.equal(often.value, once.value)


def test_the_residual_is_the_true_one():
    task = mlp(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    with operator_of(task, damping=0.1) as operator:
        found = solve(operator, rhs, LiSSA())
    matrix = dense_ggn(task) + 0.1 * identity(task)
    true = (found.value @ matrix - rhs).norm(dim=1) / rhs.norm(dim=1)
    torch.testing.assert_close(found.residual, true, rtol=1e-9, atol=1e-15)


def test_the_stopping_bound_is_above_the_true_error():
    task = mlp(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    for tolerance in (0.3, 0.05, 0.001):
        with operator_of(task, damping=0.1) as operator:
            found = solve(operator, rhs, LiSSA(tolerance=tolerance))
        assert found.converged.all()
        assert relative_error(found.value, dense_solution(task, 0.1, rhs)) < tolerance


def largest_of(operator, task):
    return float(torch.linalg.eigvalsh(operator(identity(task)))[-1])


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.45])
@pytest.mark.parametrize("sample_batch", [None, 16])
def test_too_small_a_scale_is_reported_and_never_taken_for_converged(fraction, sample_batch):
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    with operator_of(task, damping=0.1) as operator:
        largest = largest_of(operator, task)
        found = solve(operator, rhs, LiSSA(scale=fraction * largest, depth=3000, sample_batch=sample_batch))
        true = (operator(found.value) - rhs).norm(dim=1) / rhs.norm(dim=1)
    assert not found.converged.any()
    assert all(found.reasons)
    torch.testing.assert_close(found.residual, true)


def test_a_scale_above_half_the_largest_eigenvalue_converges_too():
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    with operator_of(task, damping=0.1) as operator:
        largest = largest_of(operator, task)
        found = solve(operator, rhs, LiSSA(scale=0.6 * largest))
    assert relative_error(found.value, dense_solution(task, 0.1, rhs)) < 0.05
    assert found.converged.all()


def test_an_estimate_of_the_scale_that_is_too_small_is_doubled():
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    with operator_of(task, damping=0.1) as operator:
        assert largest_of(operator, task) > 2 * 1.33 * 0.1
        found = solve(operator, rhs, LiSSA(spectrum=Spectrum(largest=0.0, smallest=0.0, mean=0.0, steps=1)))
    assert relative_error(found.value, dense_solution(task, 0.1, rhs)) < 0.05
    assert found.converged.all()


def test_too_few_steps_are_reported():
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(2), data="test")
    with operator_of(task, damping=0.01) as operator:
        found = solve(operator, rhs, LiSSA(scale=50.0, depth=10))
    assert not found.converged.any()
    assert set(found.reasons) == {"stopped before its error bound met the tolerance"}
    assert found.iterations.tolist() == [10, 10]


def test_an_indefinite_operator_is_reported():
    task = mlp(n_train=10)
    rhs = gradient_rows(task, range(4), data="test")
    with operator_of(task, "hessian", damping=0.05) as operator:
        assert torch.linalg.eigvalsh(operator(identity(task)))[0] < -0.1
        found = solve(operator, rhs, LiSSA())
    assert not found.converged.any()
    assert all(found.reasons)


def test_a_zero_right_hand_side_has_the_solution_zero():
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    rhs[1] = 0
    with operator_of(task, damping=0.1) as operator:
        found = solve(operator, rhs, LiSSA())
    assert not found.value[1].any()
    assert found.residual[1] == 0
    assert found.converged.all()
    assert relative_error(found.value[[0, 2]], dense_solution(task, 0.1, rhs[[0, 2]])) < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 1])
def test_a_right_hand_side_that_is_not_finite_leaves_the_others_right(bad, row):
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(3), data="test")
    rhs[row, 2] = bad
    others = [k for k in range(3) if k != row]
    with operator_of(task, damping=0.1) as operator:
        found = solve(operator, rhs, LiSSA())
        alone = solve(operator, rhs[row : row + 1], LiSSA())
    assert relative_error(found.value[others], dense_solution(task, 0.1, rhs[others])) < 0.05
    assert found.converged.tolist() == [k != row for k in range(3)]
    assert found.reasons[row] == "not finite"
    assert alone.converged.tolist() == [False]


def test_sides_at_once_equal_one_by_one_for_fixed_options():
    task = mlp(n_train=30)
    rhs = gradient_rows(task, range(4), data="test") * torch.tensor([[1.0], [1e4], [1e-4], [2.0]])
    options = LiSSA(tolerance=1e-12, scale=2.0, depth=30)
    with operator_of(task, damping=0.1) as operator:
        together = solve(operator, rhs, options)
        alone = [solve(operator, rhs[k : k + 1], options).value for k in range(4)]
    assert relative_error(together.value, torch.cat(alone)) < 1e-12


def test_each_row_goes_the_way_it_goes_alone():
    # More samples than a batch, and rows of different difficulty: they end, and are repeated, at different steps.
    task = logistic(n_train=200)
    rhs = gradient_rows(task, range(4), data="test")
    with operator_of(task, damping=0.1, size=256) as operator:
        rhs[2] = operator(rhs[2:3])[0]
        options = LiSSA(tolerance=0.01, depth=40, repeats=2, scale=1.5)
        together = solve(operator, rhs, options)
        alone = [solve(operator, rhs[k : k + 1], options) for k in range(4)]
    assert len(set(together.iterations.tolist())) > 1
    assert together.iterations.tolist() == [int(each.iterations) for each in alone]
    assert relative_error(together.value, torch.cat([each.value for each in alone])) < 1e-10


class Drawn(Curvature):
    """A matrix of samples, `x^T x / n + 0.05 I`, that counts the batches drawn of each size."""

    kind, shift, n_train = "ggn", 0.05, 600

    def __init__(self):
        self.x, self.counts = normal(600, 12) * torch.linspace(0.05, 1.5, 12, dtype=torch.float64), Counter()

    def __call__(self, v):
        return v @ self.x.T @ self.x / 600 + 0.05 * v

    def sampled(self, chosen, v):
        self.counts[len(chosen)] += 1
        return v @ self.x[chosen].T @ self.x[chosen] / len(chosen) + 0.05 * v


def test_rows_that_take_larger_batches_at_different_times_draw_them_together():
    # Of no size more batches than the row that alone draws most of that size.
    rhs = torch.eye(12, dtype=torch.float64) + 0.1 * normal(12, 12)

    def counted(rows):
        operator = Drawn()
        return solve(operator, rows, LiSSA(tolerance=1e-3, scale=5.0)), operator.counts

    found, together = counted(rhs)
    alone = [counted(rhs[k : k + 1]) for k in range(12)]
    assert len({tuple(sorted(counts.items())) for _, counts in alone}) > 3, "rows of different ways"
    for size, count in together.items():
        assert count <= max(counts[size] for _, counts in alone)
    assert found.iterations.tolist() == [int(each.iterations) for each, _ in alone]


def test_the_scale_is_estimated_once_for_all_blocks(monkeypatch):
    calls = []

    def estimate(*arguments):
        calls.append(1)
        return spectrum_of(*arguments)

    monkeypatch.setattr("infl_cache.maths.solvers.lissa.spectrum_of", estimate)
    task = logistic(n_train=40)
    rhs = gradient_rows(task, range(4), data="test")
    with operator_of(task, damping=0.1) as operator:
        solver = LiSSA().prepare(operator)
        for k in range(4):
            assert solver(rhs[k : k + 1]).converged.all()
    assert len(calls) == 1


def test_an_operator_whose_batches_cannot_be_sampled_is_refused():
    with pytest.raises(TypeError, match="LiSSA samples the curvature: expected a Curvature, found function"):
        solve(lambda v: v, normal(1, 3), LiSSA())


class Keeps:
    """Keeps the state of one offer, and stops there."""

    def __init__(self, at):
        self.at, self.offers, self.kept = at, 0, None

    def found(self):
        return self.kept

    def offer(self, state):
        self.offers += 1
        if self.offers == self.at:
            self.kept = {name: tensor.clone() for name, tensor in state().items()}
            raise KeyboardInterrupt


def test_gone_on_with_from_a_state_it_has_the_bits_of_a_calm_recursion():
    # More samples than the first batch: what is drawn next belongs to the state.
    with operator_of(mlp(n_train=140), damping=0.1) as operator:
        rhs = normal(2, operator.parameters.size, seed=5)
        solver = LiSSA(repeats=2, tolerance=1e-9, depth=120)
        whole = Keeps(None)
        calm = solver.prepare(operator)(rhs, whole)
        assert whole.offers >= 4
        for stop in (1, 2, whole.offers):
            keeper = Keeps(stop)
            with pytest.raises(KeyboardInterrupt):
                solver.prepare(operator)(rhs, keeper)
            resumed = solver.prepare(operator)(rhs, keeper)
            assert torch.equal(resumed.value, calm.value)
            assert torch.equal(resumed.iterations, calm.iterations)
