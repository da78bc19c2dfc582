"""The rule for linear layers: factors whose product is the gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infl_cache.maths.capture.linear import Call, factors, follows_rule, multiplied_out, recording
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.driving import CPU
from tests.tasks import Twice, built, normal

sizes = st.integers(1, 5)


def layer_gradients(layer, x, weighting):
    """Per-sample gradients of `(layer(x) * weighting).sum()` with respect to weight and bias, one by one."""
    found = [
        torch.autograd.grad((layer(x[i : i + 1]) * weighting[i : i + 1]).sum(), [layer.weight, layer.bias])
        for i in range(len(x))
    ]
    return [torch.stack(each) for each in zip(*found, strict=True)]


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.lists(st.integers(1, 4), max_size=2), st.integers(0, 2))
def test_the_product_of_the_factors_is_the_gradient_for_any_shape(size, n_in, n_out, between, room):
    layer = built(lambda: nn.Linear(n_in, n_out), torch.float64)
    x, weighting = normal(size, *between, n_in), normal(size, *between, n_out, seed=3)
    with recording(layer, [""], CPU) as tape:
        torch.autograd.grad((layer(x) * weighting).sum(), tape.anchor)
    positions = torch.Size(between).numel() + room
    inputs, output_grad = factors(tape.calls[""], size, positions)
    assert inputs.shape == (size, positions, n_in)
    assert output_grad.shape == (size, positions, n_out)
    for found, expected in zip(multiplied_out(inputs, output_grad), layer_gradients(layer, x, weighting), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def record(model, names, x):
    """The calls of one forward and backward of the sum of the outputs."""
    with recording(model, names, CPU) as tape:
        out = model(x)
        torch.autograd.grad(out.sum(), tape.anchor)
    return out, tape.calls


def test_recording_leaves_the_outputs_as_they_are():
    model = built(Twice, torch.float64)
    x = normal(4, 5)
    assert torch.equal(record(model, ["inner", "head"], x)[0], model(x))


def test_no_gradient_of_a_parameter_is_computed_or_kept():
    model = built(Twice, torch.float64).requires_grad_(False)
    record(model, ["inner", "head"], normal(4, 5))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_a_layer_called_twice_has_the_positions_of_both_calls():
    model = built(Twice, torch.float64)
    x = normal(4, 5)
    _, calls = record(model, ["inner"], x)
    assert len(calls["inner"]) == 2
    inputs, _ = factors(calls["inner"], 4, 2)
    assert torch.equal(inputs[:, 0], x)
    assert torch.equal(inputs[:, 1], torch.tanh(model.inner(x)))


def test_the_gradient_is_that_before_the_next_layer_writes_in_place():
    layer = built(lambda: nn.Linear(3, 4), torch.float64)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    x = normal(6, 3)
    out, calls = record(model, ["0"], x)
    assert torch.equal(factors(calls["0"], 6, 1)[1][:, 0], (out > 0).double())
    assert bool((out == 0).any())
    assert torch.equal(factors(calls["0"], 6, 1)[0][:, 0], x)


def test_an_output_that_the_loss_does_not_use_has_a_zero_gradient():
    layer = built(lambda: nn.Linear(3, 4), torch.float64)
    with recording(layer, [""], CPU) as tape:
        used, _ = layer(normal(2, 3)), layer(normal(2, 3, seed=5))
        torch.autograd.grad(used.sum(), tape.anchor)
    _, output_grad = factors(tape.calls[""], 2, 2)
    assert torch.equal(output_grad[:, 0], torch.ones(2, 4, dtype=torch.float64))
    assert torch.equal(output_grad[:, 1], torch.zeros(2, 4, dtype=torch.float64))


def test_an_input_given_by_name_is_recorded():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(input=x)

    x = normal(4, 3, dtype=torch.float32)
    _, calls = record(ByName(), ["head"], x)
    assert torch.equal(factors(calls["head"], 4, 1)[0][:, 0], x)


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()], ids=["error", "signal"])
def test_hooks_are_removed_after_an_exception(error):
    model = built(Twice, torch.float64)
    own = model.inner.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(type(error)), recording(model, ["inner", "head"], CPU):
        raise error
    assert list(model.inner._forward_hooks) == [own.id]
    assert not model.head._forward_hooks
    with pytest.raises(AttributeError), recording(model, ["inner", "no_such_layer"], CPU):
        pass
    assert list(model.inner._forward_hooks) == [own.id]


def call(*shape, grad=True):
    made = Call(torch.ones(*shape, 3), torch.Size([*shape, 2]))
    made.output_grad = torch.ones(*shape, 2) if grad else None
    return made


def test_shapes_without_the_batch_first_or_with_too_many_positions_give_no_factors():
    assert factors([call(4)], 4, 1) is not None
    assert factors([call(5)], 4, 9) is None
    assert factors([call(2, 4)], 4, 9) is None
    assert factors([Call(torch.ones(3), torch.Size([2]))], 3, 9) is None
    assert factors([call(4, 3)], 4, 3) is not None
    assert factors([call(4, 3)], 4, 2) is None
    assert factors([call(4, 3), call(4, 2)], 4, 4) is None
    assert factors([call(4), call(5)], 4, 9) is None


def test_missing_positions_are_zeros():
    inputs, output_grad = factors([call(4, 2)], 4, 5)
    assert inputs.shape == (4, 5, 3)
    assert output_grad.shape == (4, 5, 2)
    assert torch.equal(inputs[:, 2:], torch.zeros(4, 3, 3))
    assert torch.equal(output_grad[:, 2:], torch.zeros(4, 3, 2))


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
        (nn.Conv1d(2, 2, 1), False),
        (nn.Bilinear(2, 2, 2), False),
        (nn.Embedding(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2)), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_rule_holds_for_what_computes_as_nn_linear_does(module, expected):
    assert follows_rule(module) is expected
