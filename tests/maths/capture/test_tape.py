"""The tape: what went into each watched module, what its outputs' gradients were, and nothing left behind."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infl_cache.maths.capture.forms import Spread
from infl_cache.maths.capture.tape import copies_of, once_a_sample, recording
from tests.driving import CPU, close, recorded
from tests.tasks import Twice, built, normal


def watched(model, names, *inputs):
    return recorded(built(model, torch.float64), names, *inputs)


def test_recording_leaves_the_outputs_as_they_are():
    model = built(Twice, torch.float64)
    x = normal(4, 5)
    assert torch.equal(recorded(model, ["inner", "head"], x)[0], model(x))


def test_no_gradient_of_a_parameter_is_computed_or_kept():
    model = built(Twice, torch.float64).requires_grad_(False)
    recorded(model, ["inner", "head"], normal(4, 5))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_inputs_and_output_gradients_are_those_of_plain_autograd():
    model, x = built(Twice, torch.float64), normal(4, 5)
    first = model.inner(x)
    second = model.inner(torch.tanh(first))
    expected = torch.autograd.grad(model.head(second).sum(), [first, second])
    _, calls = recorded(model, ["inner", "head"], x)
    assert {name: len(each) for name, each in calls.items()} == {"inner": 2, "head": 1}
    assert torch.equal(calls["inner"][0].input, x)
    assert torch.equal(calls["inner"][1].input, torch.tanh(first))
    for call, gradient in zip(calls["inner"], expected, strict=True):
        assert call.shapes == [gradient.shape]
        close(call.grad(x), gradient)


def test_nothing_recorded_carries_a_graph():
    _, calls = watched(Twice, ["inner", "head"], normal(4, 5).requires_grad_())
    tensors = [each for found in calls.values() for call in found for each in (call.input, call.grads[0])]
    assert len(tensors) == 6
    assert not any(each.requires_grad for each in tensors)


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)], ids=["relu", "hardtanh"])
def test_the_gradient_is_that_before_the_next_layer_writes_in_place(after):
    layer = built(lambda: nn.Linear(3, 4), torch.float64)
    x = normal(6, 3)
    _, calls = recorded(nn.Sequential(layer, after), ["0"], x)
    out = layer(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(after(out * 1).sum(), out)
    assert bool((expected == 0).any())
    assert torch.equal(calls["0"][0].grad(x), expected)
    assert torch.equal(calls["0"][0].input, x)


def test_an_output_that_the_loss_does_not_use_has_a_zero_gradient():
    layer = built(lambda: nn.Linear(3, 4), torch.float64)
    with recording(layer, [""], CPU) as tape:
        used, _ = layer(normal(2, 3)), layer(normal(2, 3, seed=5))
        tape.backward(used.sum())
    first, second = tape.calls[""]
    assert torch.equal(first.grad(used), torch.ones(2, 4, dtype=torch.float64))
    assert second.grads == [None]
    assert torch.equal(second.grad(used), torch.zeros(2, 4, dtype=torch.float64))


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(input=x)


def test_an_input_given_by_name_is_recorded():
    x = normal(4, 3)
    _, calls = watched(ByName, ["head"], x)
    assert calls["head"][0].args == ()
    assert torch.equal(calls["head"][0].input, x)


class Text(nn.Module):
    def forward(self, x, label):
        return x * len(label)


def test_a_first_argument_that_is_no_tensor_is_refused_when_it_is_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Text()

        def forward(self, x):
            return self.inner(label="four", x=x) + self.inner(x, "two")

    _, calls = recorded(Model(), ["inner"], normal(2, 3))
    with pytest.raises(TypeError, match="expected a tensor as first argument, found str"):
        _ = calls["inner"][0].input
    assert calls["inner"][1].args[1] == "two"


Pair = namedtuple("Pair", "left right")


class Many(nn.Module):
    """Gives its outputs in the structure asked for."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = nn.Linear(3, 4), kind

    def forward(self, x):
        y = self.inner(x)
        left, right = y.chunk(2, 1)
        return {
            "tuple": (y, torch.tanh(y)), "named": Pair(y, torch.tanh(y)), "dict": {"a": y, "b": (torch.tanh(y), None)},
            "same": [y, y], "chunks": y.chunk(2, 1), "view": left, "integers": (y.argmax(1), y), "nothing": None,
        }[self.kind] if self.kind != "right" else right  # fmt: skip


KINDS = {"tuple": 2, "named": 2, "dict": 2, "same": 2, "chunks": 2, "view": 1, "right": 1, "integers": 1, "nothing": 0}


@pytest.mark.parametrize(("kind", "count"), KINDS.items())
def test_outputs_of_any_structure_keep_it_and_have_their_gradients(kind, count):
    inner = built(lambda: Many(kind), torch.float64)
    x = normal(5, 3).requires_grad_()
    expected = inner(x)
    with recording(inner, [""], CPU) as tape:
        found = inner(x)
        assert type(found) is type(expected)
        flat, same = (torch.utils._pytree.tree_leaves(each) for each in (found, expected))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(flat, same, strict=True))
        floats = [each for each in flat if each is not None and each.is_floating_point()]
        if floats:
            tape.backward(sum((1 + place) * each.square().sum() for place, each in enumerate(floats)))
    (call,) = tape.calls[""]
    assert len(call.grads) == len(call.shapes) == count
    for place, (grad, out) in enumerate(zip(call.grads, floats, strict=True)):
        close(grad, 2 * (1 + place) * out.detach())


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()], ids=["error", "signal"])
def test_hooks_and_copies_are_removed_after_an_exception(error):
    model = built(Twice, torch.float64)
    own = model.inner.register_forward_hook(lambda module, inputs, output: None)
    weights = dict(model.named_parameters())
    spread = [Spread("head.bias", "head", "bias", 0)]
    with recording(model, ["inner", "head"], CPU, spread, 3) as tape:
        assert model.head.bias is tape.copies["head.bias"]
    with pytest.raises(type(error)), recording(model, ["inner", "head"], CPU, spread, 3):
        raise error
    assert list(model.inner._forward_hooks) == [own.id]
    assert not model.head._forward_hooks
    assert all(each is weights[name] for name, each in model.named_parameters())
    with pytest.raises(AttributeError), recording(model, ["inner", "no_such_layer"], CPU):
        pass
    assert list(model.inner._forward_hooks) == [own.id]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3), max_size=3), st.integers(1, 4), st.integers(-1, 3))
def test_copies_stand_once_for_each_sample(shape, size, ones):
    parameter = nn.Parameter(normal(*shape))
    if ones < 0 and shape[:1] != [1]:
        shape = [1, *shape]
        parameter = nn.Parameter(normal(*shape))
    found = copies_of(parameter, ones, size)
    assert found.shape == (size, *([1] * ones), *(shape if ones >= 0 else shape[1:]))
    assert found.requires_grad
    assert found.is_leaf
    assert all(torch.equal(each.reshape(shape), parameter.detach()) for each in found)
    found.data[0] += 1
    assert torch.equal(parameter.detach(), normal(*shape))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.scale


def test_each_sample_has_the_gradient_of_its_own_copy():
    model, x = built(Scaled, torch.float64), normal(4, 3)
    spread = [Spread(name, "", name, 0) for name in ("scale", "unused")]
    with recording(model, [], CPU, spread, 4) as tape:
        found = tape.backward(model(x).square().sum())
    close(found["scale"], 2 * x.square())
    assert torch.equal(found["unused"], torch.zeros(4, 2, dtype=torch.float64))


def test_what_belongs_to_all_samples_is_handed_on_once_for_each():
    assert once_a_sample(normal(3, 5), 4, 1).shape == (4, 3, 5)
    assert once_a_sample(normal(1, 3, 5), 4, 1).shape == (4, 3, 5)
    assert once_a_sample(normal(5), 4, 1).shape == (4, 5)
    layer, places = built(lambda: nn.Embedding(3, 2), torch.float64), torch.arange(3)
    weights = normal(4, 3, 2, seed=4)
    with recording(layer, [""], CPU, (), 4, {"": 1}) as tape:
        out = layer(places)
        assert torch.equal(out, layer.weight.detach().expand(4, 3, 2))
        tape.backward((out * weights).sum())
    close(tape.calls[""][0].grad(out), weights)
