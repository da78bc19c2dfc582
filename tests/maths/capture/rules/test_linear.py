"""The rule for linear layers: the product of the factors is the gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from infl_cache.maths.capture.rules import RULES, rule_for
from tests.driving import check_rule, close, gradients_by_rule
from tests.tasks import around, built, normal
from tests.twins import layer_gradients

sizes = st.integers(1, 5)
patterns = st.sampled_from([None, ["layer.weight"], ["layer.bias"]])


def linear(n_in, n_out, bias=True):
    return built(lambda: nn.Linear(n_in, n_out, bias=bias), torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_the_rule_gives_the_gradient_for_any_shape(size, n_in, n_out, between, bias):
    layer = linear(n_in, n_out, bias)
    x, weighting = normal(size, *between, n_in), normal(size, *between, n_out, seed=3)
    found, expected = gradients_by_rule(layer, x, weighting), layer_gradients(layer, x, weighting)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        close(found[name], gradient)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), sizes, sizes, st.booleans(),
    st.sampled_from(["first", "second", "folded"]), st.booleans(), patterns,
)  # fmt: skip
def test_whatever_the_batch_axis_the_calls_and_the_chosen_parameters(
    count, calls, positions, n_in, n_out, bias, way, inplace, chosen
):
    layer = linear(n_in, n_out, bias or chosen == ["layer.bias"])
    task = around(layer, normal(count, calls, positions, n_in), way, inplace, parameters=chosen)
    check_rule(task, "linear")


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("way", ["first", "second", "folded"])
def test_as_many_positions_as_samples_are_not_mistaken_for_them(count, way):
    check_rule(around(linear(3, 4), normal(count, 1, count, 3), way), "linear")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_is_left_out(frozen):
    layer = linear(3, 4)
    getattr(layer, frozen).requires_grad_(False)
    check_rule(around(layer, normal(4, 1, 2, 3)), "linear")


def test_one_product_of_queries_is_contracted_as_it_is_built():
    weights, x, grad = normal(4, 3, 5), normal(6, 2, 5, seed=2), normal(6, 2, 3, seed=3)
    rule = RULES["linear"]
    built_first = weights.flatten(1) @ rule.weight_gradient({}, x, grad).flatten(1).T
    close(rule.products({}, weights, x, grad), built_first)
    assert rule.operations((2, 5), (2, 3), 15) == (30, 30)


class OwnForward(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class OnlyAnotherName(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Linear(2, 2, bias=False), True),
        (OnlyAnotherName(2, 2), True),
        (OwnForward(2, 2), False),
        (weight_norm(nn.Linear(2, 2)), False),
        (nn.Bilinear(2, 2, 2), False),
        (nn.Sequential(nn.Linear(2, 2)), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_rule_holds_for_what_computes_as_nn_linear_does(module, expected):
    rule = rule_for(module)
    assert (rule is RULES["linear"]) is expected
    assert rule is None or expected


def test_a_lazy_layer_follows_the_rule_once_it_has_its_weights():
    layer = nn.LazyLinear(3)
    layer(torch.ones(1, 4))
    assert rule_for(layer) is RULES["linear"]
    check_rule(around(layer.double(), normal(3, 1, 4)), "linear")
