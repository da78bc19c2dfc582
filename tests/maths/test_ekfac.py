"""EK-FAC: the diagonal of the Gauss-Newton matrix in its basis, its inverse, its state."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache.maths.curvature import captured, output_rows
from infl_cache.maths.curvature.rows import Rows
from infl_cache.maths.ekfac import EKFAC, fit
from infl_cache.maths.params import unflatten
from infl_cache.maths.probe import probe_batch
from tests.driving import CPU, decided, operator_of
from tests.tasks import TASKS, built, logistic, normal, squared_error
from tests.twins import dense_ggn, relative_error

TAKEN = sorted(set(TASKS) - {"reused", "dicts", "branching"})


def fitted(task, size=64):
    forms, _ = decided(task, "dense")
    dtype = next(task.model.parameters()).dtype
    with operator_of(task):
        found = output_rows(task, forms, probe_batch(task, range(min(4, len(task.train))), CPU), dtype, lambda _: None)
        assert found is not None
        cast, forms, row_bytes, _ = found
        n = len(task.train)
        groups = [range(start, min(start + size, n)) for start in range(0, n, size)]
        passes = captured(cast, forms, lambda: [probe_batch(cast, group, CPU) for group in groups])
        return fit(Rows(forms, passes, row_bytes), n)


@functools.cache
def of_task(name):
    return fitted(TASKS[name]())


@functools.cache
def dense_of(name):
    return dense_ggn(TASKS[name]())


def rotation(found):
    """The rows are the approximation's eigenvectors, and the values of each."""
    size, parts, values = found.parameters.size, [], []
    for name, start in zip(found.parameters.names, starts(found.parameters), strict=True):
        if name in found.blocks:
            block = found.blocks[name]
            inner, own = torch.kron(block.left, block.right).T, block.values.flatten()
        else:
            own = found.diagonals[name].flatten()
            inner = torch.eye(len(own), dtype=own.dtype)
        wide = torch.zeros(len(inner), size, dtype=own.dtype)
        wide[:, start : start + inner.shape[1]] = inner
        parts.append(wide), values.append(own)
    return torch.cat(parts), torch.cat(values)


def starts(parameters):
    total = 0
    for each in parameters.sizes:
        yield total
        total += each


@pytest.mark.parametrize("name", TAKEN)
def test_its_values_are_the_diagonal_of_the_matrix_in_an_orthonormal_basis(name):
    basis, values = rotation(of_task(name))
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-11, rtol=0)
    diagonal = (basis @ dense_of(name) @ basis.T).diagonal()
    torch.testing.assert_close(values, diagonal, atol=1e-12 * float(diagonal.max()), rtol=1e-8)
    torch.testing.assert_close(values.sum(), dense_of(name).trace(), rtol=1e-11, atol=0)
    assert (values >= 0).all()


@pytest.mark.parametrize("name", TAKEN)
def test_the_fit_does_not_depend_on_the_micro_batch(name):
    vectors = normal(3, of_task(name).parameters.size)
    assert relative_error(fitted(TASKS[name](), 3).times(vectors), of_task(name).times(vectors)) < 1e-9


@pytest.mark.parametrize("shift", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", TAKEN)
def test_solving_is_the_inverse_of_multiplying(name, shift):
    found, vectors = of_task(name), normal(3, of_task(name).parameters.size)
    solved = found.solve(vectors, shift)
    assert relative_error(found.times(solved) + shift * solved, vectors) < 1e-9


def test_a_singular_approximation_is_inverted_where_it_is_not():
    found = fitted(TASKS["tokens"]())
    padding = found.diagonals["embed.weight"][0]
    assert not padding.any()
    rows = found.times(normal(3, found.parameters.size))
    solved = found.solve(rows, 0.0)
    assert solved.isfinite().all()
    assert relative_error(found.times(solved), rows) < 1e-6


@pytest.mark.parametrize("name", TAKEN)
def test_its_state_goes_round(name):
    found, vectors = of_task(name), normal(2, of_task(name).parameters.size)
    again = EKFAC.of_state(found.parameters, found.state(), torch.zeros(0, dtype=torch.float64))
    assert torch.equal(again.solve(vectors, 0.1), found.solve(vectors, 0.1))
    assert again.state().keys() == found.state().keys()
    narrow = EKFAC.of_state(found.parameters, found.state(), torch.zeros(0, dtype=torch.float32))
    assert {each.dtype for each in narrow.state().values()} == {torch.float32}


@pytest.mark.parametrize("name", TAKEN)
def test_a_float32_fit_is_near(name):
    found = fitted(TASKS[name](torch.float32))
    assert {each.dtype for each in found.state().values()} == {torch.float32}
    near = of_task(name).solve(normal(3, found.parameters.size), 0.1)
    assert relative_error(found.solve(normal(3, found.parameters.size, dtype=torch.float32), 0.1), near) < 1e-2


def half(outputs, targets):
    return squared_error(outputs, nn.functional.one_hot(targets, outputs.shape[1]).to(outputs))


@pytest.mark.parametrize(("wide", "deep"), [(5, 3), (1, 4), (6, 1), (1, 1)])
def test_a_linear_layer_under_the_squared_error_is_a_kronecker_product_and_exact(wide, deep):
    model = built(lambda: nn.Linear(wide, deep, bias=False), torch.float64)
    data = TensorDataset(normal(12, wide), torch.zeros(12, dtype=torch.int64))
    task = logistic(model=model, train=data, test=data, loss=half)
    found, dense = fitted(task), dense_ggn(task)
    vectors = normal(4, len(dense))
    assert relative_error(found.times(vectors), vectors @ dense) < 1e-12
    shifted = dense + 0.3 * torch.eye(len(dense), dtype=torch.float64)
    assert relative_error(found.solve(vectors, 0.3), torch.linalg.solve(shifted, vectors.T).T) < 1e-12


def test_one_sample_s_gradient_of_one_output_is_found_exactly():
    model = built(lambda: nn.Linear(5, 1, bias=False), torch.float64)
    data = TensorDataset(normal(1, 5), torch.zeros(1, dtype=torch.int64))
    task = logistic(model=model, train=data, test=data, loss=half)
    x = data.tensors[0]
    assert relative_error(fitted(task).times(normal(3, 5)), normal(3, 5) @ (x.T @ x)) < 1e-12


def test_shared_and_looked_up_weights_have_their_plain_diagonal():
    found = of_task("tied")
    assert set(found.blocks) == set()
    pieces = unflatten(found.parameters, dense_of("tied").diagonal().unsqueeze(0))
    for name, diagonal in found.diagonals.items():
        torch.testing.assert_close(diagonal, pieces[name][0], rtol=1e-9, atol=1e-14)
