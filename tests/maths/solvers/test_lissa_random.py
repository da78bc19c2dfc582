"""LiSSA with everything estimated, on many small tasks: near the dense solution, or said not to be."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import Task
from infl_cache.maths.curvature import spectrum_of
from infl_cache.maths.solvers import LiSSA, solve
from tests.driving import operator_of
from tests.tasks import built, cross_entropy, labels, normal, squared_error
from tests.twins import gradient_rows

ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.GELU, nn.Softplus, nn.Sigmoid]
GROUPS, EACH = 10, 20


def random_task(seed):
    """A small network on random data, trained a few steps or not at all."""
    draw = random.Random(seed)
    n, width = draw.randint(16, 32), draw.randint(1, 16)
    classify, scale = draw.random() < 0.5, 10 ** draw.uniform(-3, 3)
    outputs, activation = draw.randint(2, 4) if classify else draw.randint(1, 3), draw.choice(ACTIVATIONS)
    sizes = [width, *(draw.randint(1, 16) for _ in range(draw.randint(0, 3)))]

    def make():
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))

    model, inputs = built(make, torch.float64, seed), scale * normal(n + 2, width, seed=seed)
    targets = labels(n + 2, outputs, seed) if classify else normal(n + 2, outputs, seed=seed + 1)
    loss = cross_entropy if classify else squared_error
    if draw.random() < 0.5:
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model(inputs[:n]), targets[:n]).mean().backward()
            optimizer.step()
    train, test = (TensorDataset(inputs[at], targets[at]) for at in (slice(n), slice(n, None)))
    task = Task(model=model, train=train, test=test, loss=loss)
    return task, draw.choice(["ggn", "hessian"]), 10 ** draw.uniform(-4, 0)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_row_is_near_the_dense_solution_or_not_called_converged(group):
    for seed in range(EACH * group, EACH * (group + 1)):
        task, kind, damping = random_task(seed)
        rhs = gradient_rows(task, range(2), data="test")
        with operator_of(task, kind, damping=damping) as operator:
            size = operator.parameters.size
            matrix = operator(torch.eye(size, dtype=torch.float64))
            matrix = (matrix + matrix.T) / 2
            object.__setattr__(operator, "mean_over", lambda batches, n, v, matrix=matrix: v @ matrix)
            spectrum = spectrum_of(lambda v, by=matrix, d=damping: v @ by - d * v, size, matrix)
            found = solve(operator, rhs, LiSSA(depth=1500, spectrum=spectrum))
        assert found.value.isfinite().all(), seed
        assert found.residual.isfinite().all(), seed
        true = (found.value @ matrix - rhs).norm(dim=1) / rhs.norm(dim=1).clamp_min(1e-300)
        torch.testing.assert_close(found.residual, true, rtol=1e-5, atol=1e-9)
        # Never further than the damping lets any solution of a definite system be.
        assert (found.value.norm(dim=1) <= 1.05 * rhs.norm(dim=1) / damping).all(), seed
        expected = torch.linalg.solve(matrix, rhs.T).T
        error = (found.value - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)
        assert (error[found.converged] <= 0.05).all(), (seed, kind, damping, error)
        assert all(found.reasons[row] for row in range(2) if not found.converged[row])
        lowest = float(torch.linalg.eigvalsh(matrix)[0])
        assert lowest > 0 or not found.converged.any(), seed
        assert math.isfinite(spectrum.largest)


@pytest.mark.parametrize("damping", [0.01, 0.5, 1.0, 2.0])
def test_an_operator_without_one_positive_eigenvalue_is_given_no_large_solution(damping):
    task = random_task(1)[0]
    rhs = gradient_rows(task, range(2), data="test")
    with operator_of(task, "hessian", damping=damping) as operator:
        matrix = (damping - 1.0) * torch.eye(rhs.shape[1], dtype=torch.float64)
        object.__setattr__(operator, "mean_over", lambda batches, n, v: v @ matrix)
        spectrum = spectrum_of(lambda v: -v, rhs.shape[1], rhs)
        found = solve(operator, rhs, LiSSA(spectrum=spectrum))
    assert found.value.isfinite().all()
    assert (found.value.norm(dim=1) <= 20 * rhs.norm(dim=1) / min(damping, 1.0)).all()
    assert found.converged.tolist() == [damping > 1] * 2
    assert damping >= 1 or set(found.reasons) == {
        "the Hessian is indefinite at this damping; use --curvature ggn or more damping"
    }
