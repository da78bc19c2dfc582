"""Scores from stored forms equal the matrix product of plain rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.maths import scores as scores_module
from infl_cache.maths.capture import Forms, Layer, capture, rows_of
from infl_cache.maths.params import Parameters
from infl_cache.maths.scores import influence, queries, scores
from infl_cache.maths.task import evaluating
from tests.driving import CPU, decided, one_batch
from tests.tasks import TASKS, attention, mlp, normal, tokens
from tests.twins import gradient_rows, relative_error


def scored(forms, s_test, factors, dense, budget):
    return scores(forms, queries(forms, s_test), factors, dense, budget)


def one_layer(positions, n_in, n_out, bias=True, beside=0):
    """Forms of a factored layer, and of a plain parameter before it if `beside` is not zero."""
    names = (["plain"] if beside else []) + ["w"] + (["b"] if bias else [])
    shapes = ([(beside,)] if beside else []) + [(n_out, n_in)] + ([(n_out,)] if bias else [])
    layer = Layer("layer", "layer", "w", "b" if bias else None, positions, n_in, n_out)
    return Forms(Parameters(tuple(names), tuple(shapes)), (layer,), (), ("plain",) if beside else ())


small = st.integers(1, 5)


@settings(max_examples=120, deadline=None)
@given(small, small, small, small, small, st.booleans(), st.integers(0, 3), st.sampled_from([0, 1, 64, 500, 10**6]))
def test_scores_equal_the_product_of_rows_for_any_shape_and_budget(
    count, size, positions, n_in, n_out, bias, beside, budget
):
    forms = one_layer(positions, n_in, n_out, bias, beside)
    factors = {"layer": (normal(size, positions, n_in, seed=1), normal(size, positions, n_out, seed=2))}
    dense = normal(size, beside, seed=3)
    s_test = normal(count, forms.parameters.size, seed=4)
    expected = s_test @ rows_of(forms, factors, dense).T
    found = scored(forms, s_test, factors, dense, budget)
    assert found.shape == (count, size)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "branching"])
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_scores_of_captured_gradients_equal_those_of_plain_autograd(name, form):
    task = TASKS[name]()
    forms, _ = decided(task, form)
    with evaluating(task.model, CPU):
        found = capture(task, forms, one_batch(task))
    s_test = normal(3, forms.parameters.size, seed=5)
    expected = s_test @ gradient_rows(task, range(10)).T
    for budget in (1, 2000, 10**9):
        assert relative_error(scored(forms, s_test, found.factors, found.dense, budget), expected) < 1e-12


@pytest.mark.parametrize(
    ("count", "positions", "direct"),
    [(1, 1, True), (50, 1, True), (1, 4, True), (2, 2, True), (3, 2, False), (2, 3, False), (50, 4, False)],
)
def test_the_cheaper_way_is_taken_and_both_are_right(count, positions, direct, monkeypatch):
    forms = one_layer(positions, 6, 5)
    factors = {"layer": (normal(7, positions, 6, seed=1), normal(7, positions, 5, seed=2))}
    s_test = normal(count, 35, seed=4)
    expected = s_test @ rows_of(forms, factors, normal(7, 0)).T
    taken = []
    for name in ("_direct", "multiplied_out"):
        real = getattr(scores_module, name)
        monkeypatch.setattr(
            scores_module, name, lambda *a, name=name, real=real: taken.append((name, len(a[-1]))) or real(*a)
        )
    assert relative_error(scored(forms, s_test, factors, normal(7, 0), 10**9), expected) < 1e-12
    assert taken == [("_direct" if direct else "multiplied_out", 7)]


@pytest.mark.parametrize("positions", [1, 3])
def test_the_budget_sets_how_many_samples_are_taken_at_once(positions, monkeypatch):
    forms = one_layer(positions, 6, 5)
    factors = {"layer": (normal(10, positions, 6, seed=1), normal(10, positions, 5, seed=2))}
    s_test, dense = normal(4, 35, seed=4), normal(10, 0)
    way = "_direct" if positions == 1 else "multiplied_out"
    temporary = 8 * (4 * 5 if positions == 1 else 6 * 5)
    real, seen = getattr(scores_module, way), []
    monkeypatch.setattr(scores_module, way, lambda *a: seen.append(len(a[-1])) or real(*a))
    found = [scored(forms, s_test, factors, dense, budget) for budget in (temporary * 4, 0, temporary * 10)]
    assert seen == [4, 4, 2] + [1] * 10 + [10]
    assert relative_error(found[1], found[0]) < 1e-13
    assert relative_error(found[2], found[0]) < 1e-13


def test_queries_are_cut_as_the_gradients_are_stored():
    forms, _ = decided(tokens())
    s_test = normal(2, forms.parameters.size, seed=5)
    asked = queries(forms, s_test)
    assert asked.count == 2
    assert torch.equal(asked.dense, s_test[:, forms.parameters.slice_of("embed.weight")])
    assert set(asked.weights) == set(asked.biases) == {layer.key for layer in forms.factored}
    up = asked.weights["up"]
    assert up.shape == (2, 8, 5)
    assert torch.equal(up.flatten(1), s_test[:, forms.parameters.slice_of("up.weight")])
    assert torch.equal(asked.biases["up"], s_test[:, forms.parameters.slice_of("up.bias")])


def test_everything_dense_is_one_product():
    forms, _ = decided(attention())
    assert not forms.factored
    s_test, dense = normal(2, 91, seed=5), normal(6, 91, seed=6)
    assert torch.equal(scored(forms, s_test, {}, dense, 1), s_test @ dense.T)


def test_chosen_parameters_alone_are_scored():
    task = mlp(parameters=["0.weight", "5.*"])
    forms, _ = decided(task)
    with evaluating(task.model, CPU):
        found = capture(task, forms, one_batch(task))
    s_test = normal(3, forms.parameters.size, seed=5)
    expected = s_test @ gradient_rows(task, range(10), ["0.weight", "5.weight", "5.bias"]).T
    assert relative_error(scored(forms, s_test, found.factors, found.dense, 1000), expected) < 1e-12


def test_a_row_that_is_not_finite_leaves_the_other_scores_right():
    forms = one_layer(2, 3, 4)
    inputs, output_grad = normal(5, 2, 3, seed=1), normal(5, 2, 4, seed=2)
    s_test = normal(6, 16, seed=4)
    expected = s_test @ rows_of(forms, {"layer": (inputs, output_grad)}, normal(5, 0)).T
    inputs[2, 0, 0], s_test[3, 1] = float("nan"), float("inf")
    found = scored(forms, s_test, {"layer": (inputs, output_grad)}, normal(5, 0), 10**6)
    assert not found[:, 2].isfinite().any()
    assert not found[3].isfinite().any()
    rows, columns = [0, 1, 2, 4, 5], [0, 1, 3, 4]
    torch.testing.assert_close(found[rows][:, columns], expected[rows][:, columns], rtol=1e-12, atol=1e-12)


def test_influence_has_its_sign_and_is_over_n():
    dots = normal(3, 5)
    found = influence(dots.clone(), 50)
    torch.testing.assert_close(found, -dots / 50, rtol=1e-15, atol=0)


def test_more_weight_on_a_helpful_sample_lowers_the_loss():
    """The definition itself: with weight 1/n more on sample i, theta moves by -(1/n) (H + damping I)^-1 grad_z[i]."""
    task = mlp()
    train, test = gradient_rows(task, range(10)), gradient_rows(task, range(4), data="test")
    forms, _ = decided(task, "dense")
    found = influence(scored(forms, test, {}, train, 10**6), 10)  # the identity in place of the curvature
    step = 1e-4
    for i in range(10):
        moved = mlp()
        with torch.no_grad():
            move = -step / 10 * train[i]
            for parameter, piece in zip(
                moved.model.parameters(), torch.split(move, [p.numel() for p in moved.model.parameters()]), strict=True
            ):
                parameter.add_(piece.view_as(parameter))
        task.model.eval()
        moved.model.eval()
        x, y = one_batch(task, "test").data
        change = (task.loss(moved.model(x), y) - task.loss(task.model(x), y)).detach() / step
        torch.testing.assert_close(change, found[:, i], rtol=1e-3, atol=1e-5)
