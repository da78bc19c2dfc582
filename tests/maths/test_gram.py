"""Gram matrices from factors equal products of plain rows, for every form that rows may have."""

from __future__ import annotations

import pytest
import torch

from infl_cache.maths.capture import Forms, rows_of
from infl_cache.maths.capture.forms import Layer
from infl_cache.maths.curvature.jacobian import Jacobian
from infl_cache.maths.gram import _pairs_are_cheaper, gram, sharing, squared_norms
from infl_cache.maths.params import Parameters
from tests.tasks import normal


def linear(key="lin", positions=1, n_in=6, n_out=5, bias=True, weight="w"):
    names = {"weight": weight, **({"bias": f"{key}.b"} if bias else {})}
    size = n_out * n_in + (n_out if bias else 0)
    return Layer(key, key, "linear", names, (positions, n_in), (positions, n_out), size)


def embedding(positions=3, rows=40, width=4, padding=None, weight="w"):
    settings = {"rows": rows, "padding_idx": padding}
    shape = (positions,)
    return Layer("emb", "emb", "embedding", {"weight": weight}, shape, (positions, width), rows * width, settings,
                 indices=True)  # fmt: skip


def bag(positions=2, length=3, rows=60, width=4, padding=None, mean=False):
    settings = {"rows": rows, "padding_idx": padding, "mean": mean}
    return Layer("bag", "bag", "embedding_bag", {"weight": "w"}, (positions, length), (positions, width), rows * width,
                 settings, indices=True)  # fmt: skip


def shape_of(layer, name):
    if name == "bias":
        return layer.grad_shape[-1:]
    if layer.rule == "linear":
        return (layer.grad_shape[-1], layer.input_shape[-1])
    return (layer.settings["rows"], layer.grad_shape[-1])


def forms_of(*layers, dense=0):
    shapes = {name: shape_of(layer, kind) for layer in layers for kind, name in layer.parameters.items()}
    if dense:
        shapes["plain"] = (dense,)
    return Forms(Parameters(tuple(shapes), tuple(shapes.values())), factored=layers)


def some_rows(forms, size, seed, rows=1, dtype=torch.float64):
    factors = {}
    for place, layer in enumerate(forms.factored):
        if layer.indices:
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.randint(0, 5, (size, *layer.input_shape), generator=generator, dtype=torch.int32)
        else:
            inputs = normal(size, *layer.input_shape, seed=seed + 10 * place, dtype=dtype)
        factors[layer.key] = (inputs, normal(size, rows, *layer.grad_shape, seed=seed + 10 * place + 1, dtype=dtype))
    return Jacobian(factors, normal(size, rows, forms.n_dense, seed=seed + 99, dtype=dtype))


def plain(forms, jacobian):
    """All rows, built one output after the other."""
    count = jacobian.dense.shape[1]
    each = [
        rows_of(forms, {key: (a, g[:, c]) for key, (a, g) in jacobian.factors.items()}, jacobian.dense[:, c])
        for c in range(count)
    ]
    return torch.stack(each, 1).flatten(0, 1)


CASES = {
    "linear": (linear(), True),
    "linear without bias": (linear(bias=False), True),
    "linear at two positions": (linear(positions=2, n_in=20, n_out=30), True),
    "linear at many positions": (linear(positions=7), False),
    "embedding": (embedding(), True),
    "embedding with padding": (embedding(padding=2), True),
    "embedding of a small table": (embedding(positions=9, rows=5, padding=0), False),
    "bag": (bag(), True),
    "bag, mean, padding": (bag(mean=True, padding=1), True),
    "bag of a small table": (bag(rows=5, padding=1), False),
}


@pytest.mark.parametrize("room", [1, 5000, 2**26])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_factors_give_what_plain_rows_give(name, rows, room):
    layer, by_pairs = CASES[name]
    assert _pairs_are_cheaper(layer) == by_pairs
    forms = forms_of(layer, dense=7)
    a, b = some_rows(forms, 4, 1, rows), some_rows(forms, 6, 2, rows)
    torch.testing.assert_close(gram(forms, a, b, room), plain(forms, a) @ plain(forms, b).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squared_norms(forms, a, room), plain(forms, a).square().sum(1), rtol=1e-12, atol=1e-12)


TIED = {
    "two linears": [linear("one", n_in=6), linear("two", n_in=6)],
    "embedding and decoder": [embedding(rows=40), linear("out", n_in=4, n_out=40, bias=False)],
    "three in a chain": [
        Layer("a", "a", "linear", {"weight": "w1", "bias": "b"}, (1, 6), (1, 5), 35),
        Layer("b", "b", "linear", {"weight": "w1"}, (1, 6), (1, 5), 30),
        Layer("c", "c", "linear", {"weight": "w2", "bias": "b"}, (1, 3), (1, 5), 20),
    ],
}


@pytest.mark.parametrize("room", [1, 2**26])
@pytest.mark.parametrize("name", TIED)
def test_layers_that_share_a_parameter_have_cross_terms(name, room):
    forms = forms_of(*TIED[name], linear("other", n_in=3, weight="v"))
    assert [len(group) for group in sharing(forms.factored)] == [len(TIED[name]), 1]
    a, b = some_rows(forms, 4, 1), some_rows(forms, 6, 2)
    found, expected = gram(forms, a, b, room), plain(forms, a) @ plain(forms, b).T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squared_norms(forms, a, room), plain(forms, a).square().sum(1), rtol=1e-12, atol=1e-12)


def test_groups_that_a_later_layer_joins_become_one():
    a, b = linear("a", weight="w1"), linear("b", weight="w2")
    c = Layer("c", "c", "linear", {"weight": "w1", "bias": "b.b"}, (1, 6), (1, 5), 35)
    assert [sorted(layer.key for layer in group) for group in sharing([a, b, c])] == [["a", "b", "c"]]


def test_float32_rows_are_multiplied_in_float64():
    forms = forms_of(linear(n_in=300), linear("other", positions=7, weight="v"), dense=500)
    a, b = some_rows(forms, 4, 1, dtype=torch.float32), some_rows(forms, 6, 2, dtype=torch.float32)
    wide = [Jacobian({k: (i.double(), g.double()) for k, (i, g) in each.factors.items()}, each.dense.double())
            for each in (a, b)]  # fmt: skip
    found = gram(forms, a, b, room=2000)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain(forms, wide[0]) @ plain(forms, wide[1]).T, rtol=1e-12, atol=1e-12)
