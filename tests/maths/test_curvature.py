"""Curvature: products equal the dense matrix, written out by plain autograd."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infl_cache import BadInput
from infl_cache.maths.curvature import products as curvature
from infl_cache.maths.curvature import remembered
from infl_cache.maths.params import select
from infl_cache.maths.probe import probe_batch
from tests.driving import CPU, operator_of
from tests.tasks import TASKS, built, cross_entropy, dicts, inplace, logistic, mlp, normal, squared_error
from tests.twins import dense_ggn, dense_hessian, relative_error

DENSE = {"hessian": dense_hessian, "ggn": dense_ggn}
KINDS = sorted(DENSE)


@functools.cache
def dense_of(name, kind):
    """The dense float64 matrix of a task as it comes."""
    return DENSE[kind](TASKS[name]())


def asymmetry(matrix):
    return float((matrix - matrix.T).norm() / matrix.norm())


def vectors(operator, count=3):
    return normal(count, operator.parameters.size, dtype=operator.dtype, seed=9)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_the_dense_matrix(name, kind):
    dense = dense_of(name, kind)
    assert asymmetry(dense) < 1e-12
    with operator_of(TASKS[name](), kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ dense) < 1e-11


@pytest.mark.parametrize("name", TASKS)
def test_products_in_float32_agree_within_rounding(name):
    expected = dense_of(name, "ggn")
    with operator_of(TASKS[name](torch.float32)) as operator:
        v = vectors(operator)
        found = operator(v)
        assert found.dtype == torch.float32
        assert relative_error(found, v.double() @ expected) < 1e-4


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_at_once_equal_one_by_one(name, kind):
    with operator_of(TASKS[name](), kind) as operator:
        v = vectors(operator, 4)
        one_by_one = torch.cat([operator(v[k : k + 1]) for k in range(4)])
        assert relative_error(operator(v), one_by_one) < 1e-12


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_do_not_depend_on_the_micro_batch(name, kind):
    found = []
    for size in (1, 3, 10):
        with operator_of(TASKS[name](), kind, size=size) as operator:
            found.append(operator(vectors(operator)))
    assert relative_error(found[1], found[0]) < 1e-12
    assert relative_error(found[2], found[0]) < 1e-12


@pytest.mark.parametrize("name", TASKS)
def test_ggn_is_never_indefinite(name):
    with operator_of(TASKS[name]()) as operator:
        matrix = operator(torch.eye(operator.parameters.size, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert asymmetry(matrix) < 1e-12
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]


def test_the_hessian_of_these_networks_is_indefinite():
    for name in ("mlp", "tokens", "attention"):
        with operator_of(TASKS[name](), "hessian") as operator:
            matrix = operator(torch.eye(operator.parameters.size, dtype=torch.float64))
        assert torch.linalg.eigvalsh(matrix)[0] < -0.01


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": lambda outputs, targets: squared_error(outputs, F.one_hot(targets, 3))}],
    ids=["cross-entropy", "squared error"],
)
def test_ggn_equals_the_hessian_for_a_linear_model(changes):
    found = []
    for kind in KINDS:
        with operator_of(logistic(**changes), kind) as operator:
            found.append(operator(vectors(operator)))
    assert relative_error(*found) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_and_damping_are_added_to_the_diagonal(kind):
    with operator_of(mlp(), kind) as operator:
        v = vectors(operator)
        plain = operator(v)
    with operator_of(mlp(weight_decay=0.03), kind, damping=0.2) as operator:
        assert operator.shift == pytest.approx(0.23)
        assert relative_error(operator(v), plain + 0.23 * v) < 1e-13
        some = operator.mean_over(operator.pick([2, 5, 7]), 3, v)
    with operator_of(mlp(train=[mlp().train[i] for i in (2, 5, 7)]), kind, damping=0.23) as operator:
        assert relative_error(some, operator(v)) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "inplace", "tokens", "tied", "convnet", "dicts"])
def test_chosen_parameters_give_a_block_of_the_matrix(name, kind):
    task = TASKS[name]()
    names = [each for each, _ in task.model.named_parameters()][::2]
    chosen = TASKS[name](parameters=names)
    with operator_of(chosen, kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ DENSE[kind](task, names)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_left_out(kind):
    task = mlp()
    task.model[0].requires_grad_(False)
    names = ["3.weight", "5.weight", "5.bias"]
    with operator_of(task, kind) as operator:
        assert list(operator.parameters.names) == names
        v = vectors(operator)
        assert relative_error(operator(v), v @ DENSE[kind](mlp(), names)) < 1e-11
    assert [p.requires_grad for p in task.model.parameters()] == [False, False, True, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind):
    task = inplace()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    with operator_of(task, kind) as operator:
        x = operator.batches()[0].data[0].clone()
        operator(vectors(operator))
        assert torch.equal(operator.batches()[0].data[0], x)
    assert task.model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in task.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


# --- arithmetic in another type than the model's ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_a_float32_model_can_be_computed_in_float64(name, kind):
    task = TASKS[name](torch.float32)
    with operator_of(task, kind, dtype=torch.float64) as operator:
        v = vectors(operator)
        found = operator(v)
    assert found.dtype == torch.float64
    assert next(task.model.parameters()).dtype == torch.float32
    # Data and weights were rounded to float32 before they were cast, which those of the dense twin were not.
    assert relative_error(found, v @ dense_of(name, kind)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_float64_arithmetic_is_float64_to_the_last_digits(kind):
    task = inplace(torch.float32)
    x, y = (column.clone() for column in task.train.tensors)
    with operator_of(task, kind, dtype=torch.float64) as operator:
        v = vectors(operator)
        found = operator(v)
    model = built(lambda: task.model, torch.float64)
    twin = inplace(model=model, train=list(zip(x.double(), y, strict=True)))
    assert relative_error(found, v @ DENSE[kind](twin)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_with_class_weights_can_be_computed_in_float64(kind):
    weights = torch.tensor([1.0, 2.0, 0.5])
    loss = nn.CrossEntropyLoss(weight=weights, reduction="none")
    task = logistic(torch.float32, loss=loss)
    with operator_of(task, kind, dtype=torch.float64) as operator:
        v = vectors(operator)
        found = operator(v)
    twin = logistic(loss=nn.CrossEntropyLoss(weight=weights.double(), reduction="none"))
    assert relative_error(found, v @ DENSE[kind](twin)) < 1e-5
    assert loss.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_cannot_be_computed_in_float64_is_refused_with_a_remedy(kind):
    weights = torch.tensor([1.0, 2.0, 0.5])
    task = logistic(torch.float32, loss=lambda x, y: F.cross_entropy(x, y, weight=weights, reduction="none"))
    with (
        operator_of(task, kind, dtype=torch.float64) as operator,
        pytest.raises(BadInput, match=r"cannot be computed in torch\.float64; use --solve-dtype float32"),
    ):
        operator(vectors(operator))


def test_a_model_that_fails_is_blamed():
    def failing(outputs, targets):
        raise KeyError("no such label")

    with operator_of(mlp(loss=failing)) as operator, pytest.raises(BadInput, match="raised KeyError: 'no such label'"):
        operator(vectors(operator))


# --- outputs of any structure ---


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_tuples_with_leaves_that_are_no_floats(kind):
    def forward(model, batch):
        logits = model(batch[0])
        return logits.argmax(1), [logits, None], "text", (logits.square(), 3)

    def loss(outputs, targets):
        return cross_entropy(outputs[1][0], targets) + 0.1 * outputs[3][0].sum(1)

    task = mlp(forward=forward, loss=loss)
    with operator_of(task, kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ DENSE[kind](task)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_float_outputs_that_do_not_depend_on_the_parameters_are_allowed(kind):
    def forward(model, batch):
        return {"logits": model(batch[0]), "mask": torch.ones(len(batch[0]), dtype=torch.float64), "x": batch[0]}

    task = mlp(
        forward=forward, loss=lambda outputs, targets: outputs["mask"] * cross_entropy(outputs["logits"], targets)
    )
    with operator_of(task, kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ dense_of("mlp", kind)) < 1e-11


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


def test_outputs_that_cannot_be_taken_apart_do_for_the_hessian_and_are_refused_for_ggn():
    task = mlp(
        forward=lambda model, batch: Output(model(batch[0])),
        loss=lambda outputs, targets: cross_entropy(outputs.logits, targets),
    )
    with operator_of(task, "hessian") as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ dense_of("mlp", "hessian")) < 1e-11
    with operator_of(task, "ggn") as operator, pytest.raises(BadInput, match=r"outputs.*Output"):
        operator(v)


# --- where vmap or torch.func cannot go ---


class NoVmap(torch.autograd.Function):
    """A square root of 1 + x^2 that torch.func can differentiate, but that vmap cannot follow."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return (1 + x * x).sqrt()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return SlowGradient.apply(grad, x / y)


class SlowGradient(torch.autograd.Function):
    """A product whose backward pass has no rule for vmap either."""

    generate_vmap_rule = False

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad * b, grad * a


class OldStyle(torch.autograd.Function):
    """The same in the way most custom functions are written: forward and context in one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (1 + x * x).sqrt()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x / (1 + x * x).sqrt()


def with_operation(operation):
    """An MLP whose activation is the given operation."""

    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(operation(self.inner(x)))

    return mlp(model=built(Activated, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [NoVmap, OldStyle], ids=lambda function: function.__name__)
def test_operations_that_vmap_cannot_follow_give_the_same_products(function, kind):
    expected = DENSE[kind](with_operation(lambda x: (1 + x * x).sqrt()))
    with operator_of(with_operation(function.apply), kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ expected) < 1e-11


@pytest.fixture
def without_torch_func(monkeypatch):
    """Every product goes the slow way, by plain double backward."""

    def refuse(function):
        raise RuntimeError("no rule for this operation")

    monkeypatch.setattr(curvature, "vmap", refuse)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_double_backward_gives_the_same_products(name, kind, without_torch_func):
    with operator_of(TASKS[name](), kind, size=4) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ dense_of(name, kind)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_plain_double_backward_allows_outputs_that_do_not_depend_on_the_parameters(kind, without_torch_func):
    def forward(model, batch):
        return {"logits": model(batch[0]), "mask": torch.ones(len(batch[0]), dtype=torch.float64), "x": batch[0]}

    def loss(outputs, targets):
        return outputs["mask"] * cross_entropy(outputs["logits"], targets)

    with operator_of(mlp(forward=forward, loss=loss), kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ dense_of("mlp", kind)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_plain_double_backward_allows_parameters_and_outputs_without_a_gradient(kind, without_torch_func):
    def forward(model, batch):
        hidden = model[:3](batch[0])
        return hidden, model[3:](hidden.detach())

    def loss(outputs, targets):
        return cross_entropy(outputs[1], targets)

    task = mlp(forward=forward, loss=loss)
    expected = DENSE[kind](task)
    assert not expected[:35].any()
    with operator_of(task, kind) as operator:
        v = vectors(operator)
        assert relative_error(operator(v), v @ expected) < 1e-11


def test_plain_double_backward_leaves_the_model_as_it_was(without_torch_func):
    task = mlp()
    with operator_of(task) as operator:
        operator(vectors(operator))
        assert not any(parameter.requires_grad for parameter in task.model.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in task.model.parameters())


def test_memory_running_out_is_no_reason_to_go_on_one_by_one(monkeypatch):
    calls = []

    def hungry(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(curvature, "_ggn", hungry)
    monkeypatch.setattr(curvature, "by_plain_autograd", lambda *_: calls.append(2))
    with operator_of(mlp()) as operator, pytest.raises(torch.OutOfMemoryError):
        operator(vectors(operator))
    assert calls == [1]


# --- stopping, remembering, spectrum ---


def test_tick_is_called_before_each_batch_and_may_stop_the_product():
    class Stop(Exception):
        pass

    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 6:
            raise Stop

    with operator_of(mlp(), size=2, tick=tick) as operator:
        operator(vectors(operator))
        assert len(ticks) == 5
        with pytest.raises(Stop):
            operator(vectors(operator))


def counted_batches(task, size=4):
    passes = []

    def load():
        passes.append(1)
        for start in range(0, 10, size):
            yield probe_batch(task, range(start, min(start + size, 10)), CPU)

    return load, passes


def indices_of(found):
    return [index for batch in found for index in batch.indices]


def test_batches_that_fit_are_loaded_once():
    load, passes = counted_batches(mlp())
    again = remembered(load, 10**6)
    assert [indices_of(again()) for _ in range(3)] == [list(range(10))] * 3
    assert len(passes) == 1


@pytest.mark.parametrize("budget", [0, 4 * 6 * 8 + 4 * 8, 10 * (6 + 1) * 8 - 1])
def test_batches_that_do_not_fit_are_loaded_each_time_and_none_is_missing(budget):
    load, passes = counted_batches(mlp())
    again = remembered(load, budget)
    assert [indices_of(again()) for _ in range(3)] == [list(range(10))] * 3
    assert len(passes) == 3


def test_a_pass_that_was_broken_off_is_not_taken_for_a_whole_one():
    load, passes = counted_batches(mlp())
    again = remembered(load, 10 * (6 + 1) * 8)
    assert next(iter(again())).indices == range(4)
    assert indices_of(again()) == list(range(10))
    assert indices_of(again()) == list(range(10))
    assert len(passes) == 2


def test_dict_batches_may_hold_what_is_no_tensor():
    with operator_of(dicts(), "ggn", dtype=torch.float64) as operator:
        assert operator.batches()[0].data["id"][0] == "sample 0"
        assert operator(vectors(operator)).isfinite().all()
        assert operator.parameters == select(dicts().model, None)
