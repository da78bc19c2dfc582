"""A module alone: from what goes in and the gradient of what comes out, vmap and loop give plain autograd's rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._pytree import tree_leaves

from infl_cache.maths.capture.alone import alone_gradients
from infl_cache.maths.capture.forms import Alone
from infl_cache.maths.capture.tape import recording
from tests.driving import CPU, captured_rows, close, decided
from tests.tasks import built, classified, normal
from tests.twins import gradient_rows, relative_error


class Holder(nn.Module):
    """Calls its inner module in the way that a function says."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs):
        return self.call(self.inner, *inputs)


def weighted(outputs):
    """A number in which every float output counts differently."""
    floats = [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor) and each.is_floating_point()]
    return sum(((2 + place) * torch.tanh(each) * normal(*each.shape[1:], seed=place)).sum()
               for place, each in enumerate(floats))  # fmt: skip


def loop(model, inputs, axes, names):
    """Plain autograd, sample by sample, of the parameters of the inner module."""
    named = dict(model.inner.named_parameters())
    rows = []
    for i in range(inputs[0].shape[axes[0]]):
        one = [each if axis is None else each.narrow(axis, i, 1) for each, axis in zip(inputs, axes, strict=True)]
        rows.append(torch.autograd.grad(weighted(model(*one)), [named[name] for name in names]))
    return {f"inner.{name}": torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


def compare(inner, call, inputs, batch_in, batch_out, engines=("vmap", "loop"), axes=None):
    """Both engines against the loop; `axes` are the batch axes of the model's inputs if not all are the first."""
    model = built(lambda: Holder(inner(), call), torch.float64).eval()
    names = [name for name, _ in model.inner.named_parameters()]
    expected = loop(model, inputs, axes or [0] * len(inputs), names)
    model.requires_grad_(False)
    with recording(model, ["inner"], CPU) as tape:
        tape.backward(weighted(model(*inputs)))
    unit = Alone("inner", {name: f"inner.{name}" for name in names}, batch_in, batch_out)
    for engine in engines:
        found = alone_gradients(model, replace(unit, engine=engine), tape.calls["inner"])
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            close(found[name], gradient)
            assert not found[name].requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_two_inputs_and_any_sizes(count, left, right, out, bias):
    compare(
        lambda: nn.Bilinear(left, right, out, bias=bias), lambda inner, x, y: inner(x, y),
        [normal(count, left), normal(count, right, seed=2)], (0, 0), (0,),
    )  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from([nn.GRU, nn.LSTM, nn.RNN]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.booleans()
)
def test_recurrent_layers_of_any_size(kind, count, length, layers, first):
    out = (0 if first else 1, *[1] * (2 if kind is nn.LSTM else 1))
    compare(
        lambda: kind(3, 2, num_layers=layers, batch_first=first),
        lambda inner, x: (lambda found: (found[0].transpose(0, 1) if not first else found[0],
                                         *(each.transpose(0, 1) for each in tree_leaves(found[1]))))(
            inner(x if first else x.transpose(0, 1))),
        [normal(count, length, 3)], (0 if first else 1,), out, engines=("loop",),
    )  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_attention_with_a_mask_that_all_samples_share(first):
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def call(inner, x, padding):
        given = x if first else x.transpose(0, 1)
        found, weights = inner(given, given, given, key_padding_mask=padding, attn_mask=mask)
        return found if first else found.transpose(0, 1), weights

    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[1, 3] = True
    axis = 0 if first else 1
    compare(
        lambda: nn.MultiheadAttention(4, 2, batch_first=first), call, [normal(3, 4, 4), padding],
        (axis, axis, axis, 0, None), (axis, 0),
    )  # fmt: skip


class Own(nn.Module):
    """A user's layer: a float and an integer go in, a dict of floats, integers, None comes out."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.deep = (
            nn.Parameter(torch.rand(5, 3)),
            nn.Parameter(torch.rand(3, 3)),
            nn.Linear(3, 3),
        )

    def forward(self, x, ids, scale=1.0, *, twist=None):
        hidden = torch.sin(self.deep(x * self.table[ids]) @ self.mix) * scale
        hidden = hidden if twist is None else hidden * twist
        return {"out": hidden, "best": hidden.argmax(1), "more": (None, hidden.square().sum(1))}


OWN = [normal(4, 3), torch.tensor([0, 4, 1, 1])]


def test_a_users_own_layer_with_everything_that_can_go_in_and_out():
    compare(Own, lambda inner, x, ids: inner(x, ids, 2.0), OWN, (0, 0), (0, 0))


def test_inputs_by_name_and_one_that_all_samples_share():
    twist = normal(1, 3, seed=8)
    compare(Own, lambda inner, x, ids: inner(ids=ids, x=x, twist=twist), OWN, (0, 0, None), (0, 0))


def test_two_calls_are_added_up():
    def call(inner, x, ids):
        first = inner(x, ids)["out"]
        return inner(torch.tanh(first), ids)

    compare(Own, call, OWN, (0, 0), (0, 0))


def test_an_output_that_nobody_uses_counts_as_zero():
    compare(Own, lambda inner, x, ids: inner(x, ids)["more"][1], OWN, (0, 0), (0, 0))


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm], ids=lambda each: each.__name__)
def test_a_reparametrised_layer_has_the_gradients_of_what_it_is_made_of(wrap):
    torch.manual_seed(0)
    compare(lambda: wrap(nn.Linear(3, 4)), lambda inner, x: inner(x), [normal(5, 3)], (0,), (0,))


class Sequences(nn.Module):
    """A recurrent layer of the user's making, over (T, B, d)."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_a_cell_called_for_each_step_is_taken_alone_by_vmap(form):
    task = classified(built(Sequences, torch.float64), normal(12, 4, 3), 10)
    forms, notes = decided(task, form)
    (unit,) = forms.alone
    assert (unit.module, unit.inputs, unit.outputs, unit.engine) == ("cell", (0, 0), (0,), "vmap")
    assert (forms.mapped, notes) == ((), [])
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12
