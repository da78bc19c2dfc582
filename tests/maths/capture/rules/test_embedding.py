"""The rules for embeddings: output gradients added up in the rows that were looked up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infl_cache.maths.capture.rules import RULES, rule_for
from tests.driving import check_rule, close, gradients_by_rule
from tests.tasks import around, built, labels, normal
from tests.twins import layer_gradients

tables = st.tuples(st.integers(1, 6), st.integers(1, 4))


def ids(rows, *shape):
    return labels(torch.Size(shape).numel(), rows, seed=7).reshape(shape)


def agrees_with_the_loop(layer, x):
    weighting = normal(*layer(x).shape, seed=3)
    found, expected = gradients_by_rule(layer, x, weighting), layer_gradients(layer, x, weighting)
    assert list(found) == ["weight"]
    close(found["weight"], expected["weight"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tables, st.integers(1, 4), st.lists(st.integers(1, 4), max_size=2), st.data())
def test_the_rule_gives_the_gradient_for_any_indices(table, size, between, data):
    padding = data.draw(st.none() | st.integers(-table[0], table[0] - 1))
    layer = built(lambda: nn.Embedding(*table, padding_idx=padding), torch.float64)
    agrees_with_the_loop(layer, ids(table[0], size, *between))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tables, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["sum", "mean"]), st.data())
def test_the_rule_gives_the_gradient_for_any_bags(table, size, length, mode, data):
    padding = data.draw(st.none() | st.integers(-table[0], table[0] - 1))
    layer = built(lambda: nn.EmbeddingBag(*table, mode=mode, padding_idx=padding), torch.float64)
    agrees_with_the_loop(layer, ids(table[0], size, length))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tables, st.none() | st.just(0), st.integers(1, 4), st.integers(1, 2), st.integers(1, 4),
    st.sampled_from(["first", "second", "folded"]), st.booleans(),
)  # fmt: skip
def test_whatever_the_batch_axis_and_the_calls_of_an_embedding(table, padding, count, calls, length, way, inplace):
    layer = built(lambda: nn.Embedding(*table, padding_idx=padding), torch.float64)
    check_rule(around(layer, ids(table[0], count, calls, length), way, inplace), "embedding")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tables, st.none() | st.just(0), st.sampled_from(["sum", "mean"]), st.integers(1, 4), st.integers(1, 2),
    st.integers(1, 4), st.sampled_from(["first", "folded"]),
)  # fmt: skip
def test_whatever_the_calls_of_a_bag(table, padding, mode, count, calls, length, way):
    layer = built(lambda: nn.EmbeddingBag(*table, mode=mode, padding_idx=padding), torch.float64)
    between = (2,) if way == "folded" else ()
    check_rule(around(layer, ids(table[0], count, calls, *between, length), way), "embedding_bag")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag], ids=lambda kind: kind.__name__)
def test_sparse_gradients_are_the_same_numbers(kind):
    layer = built(lambda: kind(6, 3, sparse=True), torch.float64)
    x = ids(6, 4, 1, 3)
    dense = built(lambda: kind(6, 3), torch.float64)
    weighting = normal(*layer(x[:, 0]).shape, seed=3)
    close(gradients_by_rule(layer, x[:, 0], weighting)["weight"], layer_gradients(dense, x[:, 0], weighting)["weight"])


def test_indices_keep_their_meaning_as_the_store_gives_them_back():
    rule, x, grad = RULES["embedding"], ids(9, 4, 3), normal(4, 3, 2)
    weights, said = normal(5, 9, 2, seed=2), {"rows": 9, "padding_idx": 3}
    for kept in (x.int(), x.float()):
        close(rule.weight_gradient(said, kept, grad), rule.weight_gradient(said, x, grad))
        close(rule.products(said, weights, kept, grad), rule.products(said, weights, x, grad))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Embedding(3, 2), "embedding"),
        (nn.Embedding(3, 2, padding_idx=1, sparse=True), "embedding"),
        (nn.Embedding(3, 2, max_norm=1.0), None),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), None),
        (nn.EmbeddingBag(3, 2, mode="sum"), "embedding_bag"),
        (nn.EmbeddingBag(3, 2, mode="mean", padding_idx=1), "embedding_bag"),
        (nn.EmbeddingBag(3, 2, mode="max"), None),
        (nn.EmbeddingBag(3, 2, max_norm=1.0), None),
        (nn.EmbeddingBag(3, 2, scale_grad_by_freq=True, mode="sum"), None),
    ],
    ids=str,
)
def test_the_rules_hold_where_a_gradient_is_a_sum_of_rows(module, expected):
    rule = rule_for(module)
    assert (rule and rule.name) == expected
