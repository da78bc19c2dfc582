"""Gauss-Newton products from captured Jacobian rows: the dense matrix, whatever the batches, vectors and types."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from infl_cache import BadInput
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.curvature import captured, output_rows, remembered
from infl_cache.maths.curvature.jacobian import Cut, Jacobian, capture_jacobian, forms_for_products
from infl_cache.maths.curvature.products import loss_hessian
from infl_cache.maths.curvature.rows import Rows
from infl_cache.maths.probe import probe_batch
from tests.driving import CPU, decided, operator_of
from tests.tasks import TASKS, built, logistic, mlp, normal, regression
from tests.twins import dense_ggn, relative_error

# Used by hand behind the layer's back, outputs in a dict, a branch on a sample's numbers: differentiated twice.
OTHER_WAY = {"reused", "dicts", "branching"}
TAKEN = sorted(set(TASKS) - OTHER_WAY)


@functools.cache
def dense_of(name):
    return dense_ggn(TASKS[name]())


def whole(task, forms, size):
    """A function that captures the rows of the training set in micro-batches of `size`."""
    starts = range(0, len(task.train), size)
    return captured(
        task, forms, lambda: [probe_batch(task, range(s, min(s + size, len(task.train))), CPU) for s in starts]
    )


def found_for(task, dtype=torch.float64, notes=None):
    """What `output_rows` says, asked as a stage asks it."""
    forms, _ = decided(task, "dense")
    with operator_of(task):
        return output_rows(
            task, forms, probe_batch(task, range(4), CPU), dtype, [].append if notes is None else notes.append
        )


def by_rows(task, vectors, size=64, dtype=torch.float64):
    found = found_for(task, dtype)
    assert found is not None
    cast, forms, row_bytes, _ = found
    with operator_of(task, dtype=dtype, rows=Rows(forms, whole(cast, forms, size), row_bytes)) as operator:
        return operator(vectors)


def plain_size(task):
    return sum(parameter.numel() for parameter in task.model.parameters())


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("name", TAKEN)
def test_products_equal_the_dense_matrix(name, size, count):
    vectors = normal(count, plain_size(TASKS[name]()), seed=9)
    assert relative_error(by_rows(TASKS[name](), vectors, size), vectors @ dense_of(name)) < 1e-11


def test_the_tasks_it_does_not_take_are_known():
    assert {name for name in TASKS if found_for(TASKS[name]()) is None} == OTHER_WAY


@pytest.mark.parametrize("name", TAKEN)
def test_a_float32_model_has_rows_in_float64(name):
    # The twin's weights and data are those of the float32 task, in float64.
    task, twin = TASKS[name](torch.float32), TASKS[name]()
    twin.model.load_state_dict(task.model.state_dict())
    twin.train.tensors = tuple(
        tensor.to(torch.float64) if tensor.is_floating_point() else tensor for tensor in task.train.tensors
    )
    vectors = normal(3, plain_size(task), seed=9)
    assert relative_error(by_rows(task, vectors), vectors @ dense_ggn(twin)) < 1e-11
    assert {parameter.dtype for parameter in task.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", TAKEN)
def test_float32_rows_agree_within_rounding(name):
    vectors = normal(3, plain_size(TASKS[name]()), seed=9)
    found = by_rows(TASKS[name](torch.float32), vectors.float(), dtype=torch.float32)
    assert relative_error(found, vectors @ dense_of(name)) < 1e-4


def test_rows_that_are_wrong_are_noticed_and_go_the_other_way(monkeypatch):
    rule, notes = type(RULES["linear"]), []
    original = rule.seen
    monkeypatch.setattr(rule, "seen", lambda *given: 1.001 * original(*given))
    # Wide enough for its rows to be kept as factors.
    task = mlp(model=built(lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), torch.float64))
    assert found_for(task, notes=notes) is None
    assert notes == ["products from captured rows differ from differentiating twice, which takes their place"]
    monkeypatch.undo()
    assert found_for(task) is not None


def test_what_the_comparison_meets_on_its_way_is_not_said_of_the_run():
    class Activation(nn.Module):
        def forward(self, x):
            return Softplus.apply(x)

    notes = []
    task = mlp(model=built(lambda: nn.Sequential(nn.Linear(6, 4), Activation(), nn.Linear(4, 3)), torch.float64))
    assert found_for(task, notes=notes) is not None
    assert notes == []


def forward_calls(task):
    calls = []
    task.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("share", "passes"), [(1.0, 1), (0.99, 3), (0.0, 3)])
def test_rows_that_fit_are_captured_once_and_others_for_every_product(share, passes):
    task = mlp()
    cast, forms, row_bytes, _ = found_for(task)
    assert cast is task
    with operator_of(task) as operator:
        every = sum(rows.n_bytes for rows in whole(task, forms, 5)())
        assert every <= 10 * row_bytes * 1.5
        calls = forward_calls(task)
        kept = remembered(whole(task, forms, 5), int(share * every), Jacobian.n_bytes.__get__)
        vectors = normal(2, operator.parameters.size)
        object.__setattr__(operator, "rows", Rows(forms, kept, row_bytes))
        found = [operator(vectors) for _ in range(3)]
    assert len(calls) == 2 * passes
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("rows", [1, 1000])
def test_vectors_are_cut_up_and_joined_again(name, rows):
    forms = forms_for_products(decided(TASKS[name](), "dense")[0], rows)
    vectors = normal(3, forms.parameters.size)
    assert torch.equal(Cut.of(forms, vectors).joined(forms), vectors)


# --- the Hessian of the loss in the outputs ---


class Softplus(torch.autograd.Function):
    """Written in the old way, which torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.nn.functional.softplus(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class Doubled(torch.autograd.Function):
    """Linear, so its first derivative depends on nothing."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


LOSSES = {
    "its own": None,
    "old style": lambda outputs, targets: Softplus.apply(outputs.square().sum(1) + outputs[:, 0]),
    "old style, linear": lambda outputs, targets: Doubled.apply(outputs).sum(1),
    "in one output": lambda outputs, targets: outputs[:, 1].exp(),
    "of no output": lambda outputs, targets: 0 * targets.double(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", [logistic, TASKS["attention"]], ids=["logistic", "attention"])
def test_the_loss_s_hessian_is_that_of_autograd(make, loss):
    changes = {} if LOSSES[loss] is None else {"loss": lambda o, t: LOSSES[loss](o.flatten(1), t.flatten(1)[:, 0])}
    if loss == "its own" or make is logistic:
        changes = {"loss": LOSSES[loss]} if LOSSES[loss] else {}
    task = make(**changes)
    with operator_of(task):
        batch = probe_batch(task, range(5), CPU)
        outputs = task.forward(task.model, batch.data).detach()
        found = loss_hessian(task, outputs, batch.data, 5)
        for index in range(5):
            one = probe_batch(task, [index], CPU)

            def value(flat, one=one, index=index):
                return task.loss(flat.view(outputs[index : index + 1].shape), task.targets(one.data)).sum()

            expected = torch.autograd.functional.hessian(value, outputs[index].flatten())
            torch.testing.assert_close(found[index], expected, rtol=1e-12, atol=1e-13)


def test_a_loss_without_a_second_derivative_is_blamed():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("not twice")

    task = regression(loss=lambda outputs, targets: Once.apply(outputs).sum(1))
    batch = probe_batch(task, range(3), CPU)
    with operator_of(task), pytest.raises(BadInput, match="not twice"):
        loss_hessian(task, batch.data[2], batch.data, 3)


def test_the_rows_of_a_batch_are_the_gradients_of_its_outputs():
    task = mlp()
    forms = forms_for_products(decided(task, "dense")[0], 3, ())
    with operator_of(task):
        batch = probe_batch(task, range(3), CPU)
        rows = capture_jacobian(task, forms, batch)
        assert not rows.factors
        with torch.enable_grad():
            parameters = list(task.model.parameters())
            for index in range(3):
                outputs = task.model.requires_grad_(True)(batch.data[0])[index]
                for c, each in enumerate(outputs):
                    expected = torch.cat(
                        [g.flatten() for g in torch.autograd.grad(each, parameters, retain_graph=True)]
                    )
                    torch.testing.assert_close(rows.dense[index, c], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("before", [True, False])
def test_a_product_over_some_samples_is_their_mean_whether_rows_are_kept_or_not(share, before):
    task = mlp()
    cast, forms, row_bytes, _ = found_for(task)
    chosen = [8, 2, 3, 5]
    with operator_of(task) as operator:
        vectors = normal(3, operator.parameters.size)
        expected = operator.mean_over(operator.pick(chosen), len(chosen), vectors)
        every = sum(rows.n_bytes for rows in whole(cast, forms, 3)())
        kept = remembered(whole(cast, forms, 3), int(share * every), Jacobian.n_bytes.__get__)
        rows = Rows(forms, kept, row_bytes, functools.partial(capture_jacobian, cast, forms))
        object.__setattr__(operator, "rows", rows)
        if before:
            operator(vectors)
        calls = forward_calls(task)
        found = [operator.sampled(chosen, vectors) for _ in range(2)]
    # A pass to see whether they fit, and where they do not, the samples themselves each time.
    assert len(calls) == (0 if before else 4) + (0 if share == 1 else 2)
    assert torch.equal(found[0], found[1])
    assert relative_error(found[0], expected) <= 1e-10


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "convnet", "tied", "regression", "attention"])
def test_steps_are_those_of_single_products_and_leave_what_they_are_given(name, count, share):
    task = TASKS[name]()
    cast, forms, row_bytes, _ = found_for(task)
    batches = [[1, 2], [0, 3, 2], [2]]
    with operator_of(task, damping=0.3) as operator:
        start, rhs = (normal(count, operator.parameters.size, seed=seed) for seed in (1, 2))
        given = start.clone(), rhs.clone()
        kept = remembered(whole(cast, forms, 3), int(share * 1e9), Jacobian.n_bytes.__get__)
        object.__setattr__(
            operator, "rows", Rows(forms, kept, row_bytes, functools.partial(capture_jacobian, cast, forms))
        )
        found = operator.steps(batches, start, rhs, 7.0)
        expected = start
        for batch in batches:
            product = operator.mean_over(operator.pick(batch), len(batch), expected)
            expected = rhs + expected - product / 7.0
    assert relative_error(found, expected) <= 1e-12
    assert torch.equal(start, given[0])
    assert torch.equal(rhs, given[1])
