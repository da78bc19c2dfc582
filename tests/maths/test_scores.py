"""Scores from stored forms equal the matrix product of plain rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.maths.capture import Forms, Layer, capture, rows_of
from infl_cache.maths.capture.rules import RULES, linear
from infl_cache.maths.params import Parameters
from infl_cache.maths.scores import influence, queries, scores
from infl_cache.maths.task import evaluating
from tests.driving import CPU, decided, one_batch
from tests.tasks import TASKS, attention, labels, mlp, normal, tied, tokens
from tests.twins import gradient_rows, relative_error


def scored(forms, s_test, factors, dense, budget):
    return scores(forms, queries(forms, s_test), factors, dense, budget)


def one_layer(positions, n_in, n_out, bias=True, beside=0):
    """Forms of a factored layer, and of a plain parameter before it if `beside` is not zero."""
    names = (["plain"] if beside else []) + ["w"] + (["b"] if bias else [])
    shapes = ([(beside,)] if beside else []) + [(n_out, n_in)] + ([(n_out,)] if bias else [])
    own = {"weight": "w", "bias": "b"} if bias else {"weight": "w"}
    layer = Layer("layer", "layer", "linear", own, (positions, n_in), (positions, n_out), n_out * (n_in + bias))
    return Forms(Parameters(tuple(names), tuple(shapes)), (layer,), mapped=("plain",) if beside else ())


def watched(monkeypatch, rule):
    """The ways of a rule that are taken from now on, each with its number of samples."""
    taken = []
    for name in ("products", "weight_gradient"):
        real = getattr(RULES[rule], name)
        monkeypatch.setattr(
            RULES[rule], name, lambda *a, name=name, real=real: taken.append((name, len(a[-1]))) or real(*a)
        )
    return taken


small = st.integers(1, 5)


@settings(max_examples=120, deadline=None, derandomize=True)
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


def scores_are_those_of_plain_autograd(task, forms):
    with evaluating(task.model, CPU):
        found = capture(task, forms, one_batch(task))
    s_test = normal(3, forms.parameters.size, seed=5)
    expected = s_test @ gradient_rows(task, range(10)).T
    for budget in (1, 2000, 10**9):
        assert relative_error(scored(forms, s_test, found.factors, found.dense, budget), expected) < 1e-12


@pytest.mark.parametrize("name", [name for name in TASKS if name != "branching"])
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_scores_of_captured_gradients_equal_those_of_plain_autograd(name, form):
    task = TASKS[name]()
    forms, _ = decided(task, form)
    scores_are_those_of_plain_autograd(task, forms)


@pytest.mark.parametrize(
    ("count", "positions", "direct"),
    [(1, 1, True), (50, 1, True), (1, 4, True), (2, 2, True), (3, 2, False), (2, 3, False), (50, 4, False)],
)
def test_the_cheaper_way_is_taken_and_both_are_right(count, positions, direct, monkeypatch):
    forms = one_layer(positions, 6, 5)
    factors = {"layer": (normal(7, positions, 6, seed=1), normal(7, positions, 5, seed=2))}
    s_test = normal(count, 35, seed=4)
    expected = s_test @ rows_of(forms, factors, normal(7, 0)).T
    taken = watched(monkeypatch, "linear")
    assert relative_error(scored(forms, s_test, factors, normal(7, 0), 10**9), expected) < 1e-12
    assert taken == [("products" if direct else "weight_gradient", 7)]


def test_the_budget_sets_how_many_samples_are_taken_at_once(monkeypatch):
    forms = one_layer(3, 6, 5)
    factors = {"layer": (normal(10, 3, 6, seed=1), normal(10, 3, 5, seed=2))}
    s_test, dense = normal(4, 35, seed=4), normal(10, 0)
    temporary = 8 * 2 * 6 * 5  # the gradient and what it is made of
    taken = watched(monkeypatch, "linear")
    found = [scored(forms, s_test, factors, dense, budget) for budget in (temporary * 4, 0, temporary * 10)]
    assert [size for _, size in taken] == [4, 4, 2] + [1] * 10 + [10]
    assert {way for way, _ in taken} == {"weight_gradient"}
    assert relative_error(found[1], found[0]) < 1e-13
    assert relative_error(found[2], found[0]) < 1e-13


@pytest.mark.parametrize("positions", [1, 2])
def test_a_contraction_goes_in_tiles_that_the_cache_holds(positions, monkeypatch):
    monkeypatch.setattr(linear, "SAMPLES", 4)
    monkeypatch.setattr(linear, "TILE", 4 * 5 * 3)
    sizes, plain = [], linear.product

    def counted(rows, columns):
        found = plain(rows, columns)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(linear, "product", counted)
    inputs, back, weights = normal(10, positions, 6, seed=1), normal(10, positions, 5, seed=2), normal(7, 5, 6, seed=3)
    found = linear.Linear().products({}, weights, inputs, back)
    expected = torch.einsum("moi,bti,bto->mb", weights, inputs, back)
    assert relative_error(found, expected) < 1e-13
    assert max(sizes) <= linear.TILE
    assert len(sizes) > 5


def test_queries_are_cut_as_the_gradients_are_stored():
    forms, _ = decided(tokens(), layer_forms="embed=dense")
    s_test = normal(2, forms.parameters.size, seed=5)
    asked = queries(forms, s_test)
    assert forms.dense == ("embed.weight",)
    assert torch.equal(asked.dense, s_test[:, forms.parameters.slice_of("embed.weight")])
    assert set(asked.values) == {name for layer in forms.factored for name in layer.names}
    up = asked.values["up.weight"]
    assert up.shape == (2, 8, 5)
    assert torch.equal(up.flatten(1), s_test[:, forms.parameters.slice_of("up.weight")])
    assert torch.equal(asked.values["up.bias"], s_test[:, forms.parameters.slice_of("up.bias")])


@st.composite
def factored_layers(draw):
    """Forms of one factored layer of any rule, with inputs and output gradients that fit it."""
    rule, size, n = (
        draw(st.sampled_from([name for name, rule in RULES.items() if rule.stored])),
        *draw(st.tuples(small, small)),
    )
    n_in, n_out, rows = draw(small), draw(small), draw(small)
    padding, kernel, said = draw(st.none() | st.integers(0, rows - 1)), draw(st.integers(1, 2)), {}
    ids = labels(size * n * n_in, rows, seed=3)
    if rule == "linear":
        shape, inputs, grad = (n_out, n_in), normal(size, n, n_in), normal(size, n, n_out, seed=2)
    elif rule == "convolution":
        said = {"kernel_size": [kernel], "stride": [1], "dilation": [1], "pads": [0, 0], "mode": "constant",
                "groups": 1, "transposed": draw(st.booleans())}  # fmt: skip
        ends = [normal(size, n, n_in, n_out + kernel - 1), normal(size, n, rows, n_out, seed=2)]
        shape = (rows, n_in, kernel)
        inputs, grad = ends[::-1] if said["transposed"] else ends
    else:
        said, shape = {"rows": rows, "padding_idx": padding, "mean": draw(st.booleans())}, (rows, n_out)
        inputs = ids.reshape(size, n, n_in) if rule == "embedding_bag" else ids.reshape(size, -1)
        grad = normal(*inputs.shape[:2], n_out, seed=2)
    bias = rule in ("linear", "convolution") and draw(st.booleans())
    own, shapes = {"weight": "w"}, [shape]
    if bias:
        own["bias"], shapes = "b", [shape, (grad.shape[2],)]
    layer = Layer("layer", "layer", rule, own, tuple(inputs.shape[1:]), tuple(grad.shape[1:]), 1, settings=said)
    return Forms(Parameters(tuple(own.values()), tuple(shapes)), (layer,)), {"layer": (inputs, grad)}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(factored_layers(), st.sampled_from([1, 2, 7]), st.sampled_from([0, 1, 300, 10**9]))
def test_scores_of_every_rule_equal_the_product_of_rows(made, count, budget):
    forms, factors = made
    dense = normal(len(factors["layer"][0]), 0)
    s_test = normal(count, forms.parameters.size, seed=4)
    found = scored(forms, s_test, factors, dense, budget)
    torch.testing.assert_close(found, s_test @ rows_of(forms, factors, dense).T, rtol=1e-11, atol=1e-11)


def test_tied_layers_have_the_sum_of_their_scores():
    task = tied()
    forms, _ = decided(task, layer_forms="*=factored")
    assert [layer.module for layer in forms.factored] == ["embed", "decoder", "first", "second"]
    assert forms.n_dense == 0
    scores_are_those_of_plain_autograd(task, forms)


def test_a_bag_is_taken_in_steps_that_hold_its_looked_up_rows(monkeypatch):
    size, length, width = 6, 50, 4
    said = {"rows": 9, "padding_idx": None, "mean": False}
    layer = Layer("layer", "layer", "embedding_bag", {"weight": "w"}, (1, length), (1, width), 36, settings=said)
    forms = Forms(Parameters(("w",), ((9, width),)), (layer,))
    factors = {"layer": (labels(size * length, 9).reshape(size, 1, length), normal(size, 1, width))}
    taken = watched(monkeypatch, "embedding_bag")
    for count, way, held in ((1, "products", length * width), (2, "weight_gradient", length * width + 2 * 36)):
        s_test = normal(count, 36, seed=4)
        expected = s_test @ rows_of(forms, factors, normal(size, 0)).T
        taken.clear()
        found = scored(forms, s_test, factors, normal(size, 0), 8 * 2 * held)
        assert taken == [(way, 2)] * 3
        assert relative_error(found, expected) < 1e-12


def test_everything_dense_is_one_product():
    forms, _ = decided(attention(), "dense")
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
