"""Capture: whatever the form and the micro-batch, the rows are those of a loop of plain autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from infl_cache import BadInput
from infl_cache.maths.capture import capture, rows_of
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.task import evaluating
from tests.driving import CPU, captured_rows, decided, one_batch
from tests.tasks import (
    TASKS,
    Samples,
    attention,
    built,
    classified,
    convnet,
    cross_entropy,
    dicts,
    inplace,
    mlp,
    normal,
    regression,
    tied,
    tokens,
)
from tests.twins import gradient_rows, relative_error


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_rows_equal_plain_autograd_in_any_form_and_micro_batch(name, form):
    task = TASKS[name]()
    forms, _ = decided(task, form)
    expected = gradient_rows(task, range(10))
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), expected) < 1e-12, f"micro-batch of {size}"


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_float32_agree_within_rounding(name):
    task = TASKS[name](torch.float32)
    forms, _ = decided(task)
    found = captured_rows(task, forms, 3)
    assert found.dtype == torch.float32
    assert relative_error(found, gradient_rows(TASKS[name](torch.float64), range(10))) < 1e-4


def squared_first(outputs, targets):
    """A measure of the first float output of any of the tasks."""
    first = outputs["logits"] if isinstance(outputs, dict) else outputs
    return first.flatten(1).square().sum(1) * (1 + first.flatten(1)[:, 0].sigmoid())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_rows_of_a_measure_equal_plain_autograd(name, form):
    task = TASKS[name](measure=squared_first)
    forms, _ = decided(task, form)
    expected = gradient_rows(task, range(4), data="test", measure=True)
    assert relative_error(captured_rows(task, forms, 3, measure=True, data="test"), expected) < 1e-12
    assert relative_error(captured_rows(task, forms, 3), gradient_rows(task, range(10))) < 1e-12


def test_forms_decided_on_a_few_samples_hold_for_the_others():
    for name in ("mlp", "inplace", "tokens", "tied", "reused"):
        task = TASKS[name](n_train=23)
        forms, _ = decided(task, count=4)
        assert relative_error(captured_rows(task, forms, 8), gradient_rows(task, range(23))) < 1e-12, name


width = st.integers(1, 5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(width, width, width, st.integers(1, 4), st.integers(1, 5), st.booleans(), st.sampled_from(["auto", "dense"]))
def test_any_two_layers_on_any_positions_equal_plain_autograd(n_in, hidden, n_out, positions, count, bias, form):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(n_in, hidden, bias=bias), nn.Linear(hidden, n_out)

        def forward(self, x):
            return self.second(torch.sigmoid(self.first(x))).mean(1)

    data = [(x, 0) for x in normal(count, positions, n_in)]
    task = classified(
        built(Model, torch.float64), normal(2, positions, n_in), 1, 1, train=Samples(data),
        loss=lambda outputs, targets: outputs.square().sum(1),
    )  # fmt: skip
    forms, notes = decided(task, form)
    assert not forms.mapped
    assert not notes
    for size in (1, 2, count):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(count))) < 1e-12


CHOICES = [
    ("mlp", ["0.weight", "5.*"]),
    ("mlp", ["*.bias"]),
    ("mlp", ["3.weight"]),
    ("inplace", ["2.*", "3.bias"]),
    ("convnet", ["0.*"]),
    ("tokens", ["embed.weight", "head.bias"]),
    ("tied", ["decoder.weight"]),
    ("tied", ["second.*"]),
    ("twice", ["inner.weight"]),
    ("reused", ["head.*"]),
    ("branching", ["inner.bias"]),
    ("logistic", ["bias"]),
]


@pytest.mark.parametrize(("name", "patterns"), CHOICES, ids=lambda value: str(value))
def test_chosen_parameters_have_the_same_gradients_as_among_all(name, patterns):
    task = TASKS[name](parameters=patterns)
    for form in ("auto", "dense"):
        forms, _ = decided(task, form)
        assert 0 < forms.parameters.size < sum(p.numel() for p in task.model.parameters())
        expected = gradient_rows(task, range(10), forms.parameters.names)
        assert relative_error(captured_rows(task, forms, 3), expected) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "convnet", "branching"])
def test_frozen_parameters_are_left_out(name):
    task = TASKS[name]()
    first = next(iter(task.model.parameters())).requires_grad_(False)
    forms, _ = decided(task)
    every = [each for each, _ in task.model.named_parameters()]
    assert list(forms.parameters.names) == every[1:]
    found = captured_rows(task, forms, 3)
    assert relative_error(found, gradient_rows(task, range(10), every[1:])) < 1e-12
    assert first.grad is None


def test_a_frozen_parameter_that_is_named_has_its_gradient():
    task = mlp(parameters=["0.*"])
    task.model.requires_grad_(False)
    forms, _ = decided(task)
    expected = gradient_rows(task, range(10), ["0.weight", "0.bias"])
    assert relative_error(captured_rows(task, forms), expected) < 1e-12
    assert not any(parameter.requires_grad for parameter in task.model.parameters())


# --- what a batch's capture holds ---


def captured_of(task, forms, measure=False):
    with evaluating(task.model, CPU):
        return capture(task, forms, one_batch(task), measure)


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_shapes_are_those_of_the_plan(form):
    task = tokens()
    forms, _ = decided(task, form)
    found = captured_of(task, forms)
    assert list(found.factors) == [layer.key for layer in forms.factored]
    for layer in forms.factored:
        inputs, output_grad = found.factors[layer.key]
        assert inputs.shape == (10, *layer.input_shape)
        assert output_grad.shape == (10, *layer.grad_shape)
        assert inputs.is_floating_point() != layer.indices
    assert found.dense.shape == (10, forms.n_dense)
    assert bool(forms.factored) == (form == "auto")


def test_loss_target_and_prediction_are_those_of_the_samples():
    for measure in (False, True):
        task = mlp(measure=lambda outputs, targets: outputs[:, 0])
        forms, _ = decided(task)
        found = captured_of(task, forms, measure)
        task.model.eval()
        x, y = one_batch(task).data
        outputs = task.model(x).detach()
        torch.testing.assert_close(found.loss, outputs[:, 0] if measure else cross_entropy(outputs, y))
        assert found.target.tolist() == y.tolist()
        assert found.prediction.tolist() == outputs.argmax(1).tolist()


def test_targets_that_are_no_numbers_are_nan():
    found = captured_of(regression(), decided(regression())[0])
    assert found.target.isnan().all()
    assert found.prediction.shape == (10,)


def test_nothing_captured_carries_a_graph():
    for make in (mlp, inplace, tied):
        found = captured_of(make(), decided(make())[0])
        tensors = [found.dense, found.loss, found.target, found.prediction, *itertools.chain(*found.factors.values())]
        assert not any(tensor.requires_grad for tensor in tensors)


def test_a_sample_with_a_gradient_that_is_not_finite_leaves_the_others_right():
    task = mlp()
    samples = [task.train[i] for i in range(10)]
    broken = [(x * float("nan"), y) if i == 6 else (x, y) for i, (x, y) in enumerate(samples)]
    for make_form in ("auto", "dense"):
        forms, _ = decided(task, make_form)
        found = captured_rows(mlp(train=Samples(broken)), forms)
        others = [i for i in range(10) if i != 6]
        assert found[6].isnan().any()
        assert relative_error(found[others], gradient_rows(task, others)) < 1e-12


# --- nothing is left behind ---


def everything(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [list(module._forward_hooks) for module in model.modules()],
    )


@pytest.mark.parametrize("name", TASKS)
def test_model_and_random_state_are_as_before(name):
    task = TASKS[name]()
    task.model.train()
    next(iter(task.model.parameters())).requires_grad_(False)
    weights = {key: value.clone() for key, value in task.model.state_dict().items()}
    before, state = everything(task.model), torch.get_rng_state()
    forms, _ = decided(task)
    captured_rows(task, forms, 3)
    assert everything(task.model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in task.model.state_dict().items())


@pytest.mark.parametrize("make", [mlp, convnet, attention, dicts], ids=lambda make: make.__name__)
def test_model_is_as_before_after_an_exception_in_the_middle(make):
    calls = itertools.count()
    whole = make()

    def failing(outputs, targets):
        if next(calls) >= 2:
            raise RuntimeError("the third call fails")
        return whole.loss(outputs, targets)

    task = make(loss=failing)
    task.model.train()
    before = everything(task.model)
    with pytest.raises(BadInput, match="the third call fails"):
        decided(task)
    forms, _ = decided(whole)
    with pytest.raises(BadInput, match="the third call fails"):
        captured_rows(task, forms, 3)
    assert everything(task.model) == before


def test_a_backward_that_raises_is_blamed_and_leaves_no_hooks():
    class Wall(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    task = mlp()
    forms, _ = decided(task)
    walled = mlp(loss=lambda outputs, targets: cross_entropy(Wall.apply(outputs), targets))
    before = everything(walled.model)
    with pytest.raises(BadInput, match="backward of the loss raised RuntimeError: no way back"):
        captured_rows(walled, forms)
    assert everything(walled.model) == before


def test_rows_of_puts_factors_and_columns_in_the_order_of_the_parameters():
    task = inplace()
    forms, _ = decided(task)
    assert forms.factored
    assert forms.dense == ("2.weight", "2.bias")
    with evaluating(task.model, CPU):
        found = capture(task, forms, probe_batch(task, [4], CPU))
    row = rows_of(forms, found.factors, found.dense)
    assert torch.equal(row[:, forms.parameters.slice_of("2.weight")], found.dense[:, :5])
    inputs, output_grad = found.factors["3"]
    outer = (output_grad.transpose(1, 2) @ inputs).flatten(1)
    assert torch.equal(row[:, forms.parameters.slice_of("3.weight")], outer)


def test_embeddings_shared_with_a_functional_decoder_are_right():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return F.linear(torch.tanh(self.inner(self.embed(ids))).mean(1), self.embed.weight)

    task = tied(model=built(Decoder, torch.float64))
    forms, notes = decided(task)
    assert notes == ["layer 'embed' disagrees with plain autograd by its rule; vmap takes it"]
    assert relative_error(captured_rows(task, forms, 3), gradient_rows(task, range(10))) < 1e-12
