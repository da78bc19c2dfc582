"""Deciding: the smaller form where the rule holds, a fallback with a note where it does not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from infl_cache import BadInput
from infl_cache.maths.capture import Forms, Layer
from infl_cache.maths.capture.decide import check_forms
from infl_cache.maths.params import select
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.task import evaluating
from tests.driving import CPU, captured_rows, decided
from tests.tasks import (
    TASKS,
    batch_second,
    branching,
    built,
    logistic,
    mlp,
    normal,
    reused,
    tied,
    tokens,
    twice,
)
from tests.twins import gradient_rows, relative_error


def agrees(task, forms, size=3):
    return relative_error(captured_rows(task, forms, size), gradient_rows(task, range(len(task.train)))) < 1e-12


# --- which form ---


def test_a_layer_is_factored_where_that_is_smaller():
    forms, notes = decided(tokens())
    # T = 3: 5 -> 8 keeps 39 numbers for 48, 8 -> 5 39 for 45; the head is called once: 8 for 18.
    assert [(layer.module, layer.positions, layer.n_in, layer.n_out) for layer in forms.factored] == [
        ("up", 3, 5, 8),
        ("down", 3, 8, 5),
        ("head", 1, 5, 3),
    ]
    assert forms.mapped == ("embed.weight",)
    assert forms.engine == "vmap"
    assert notes == []


def test_a_layer_is_multiplied_out_where_the_factors_are_larger():
    forms, notes = decided(TASKS["attention"]())
    assert [layer.module for layer in forms.expanded] == ["embed", "query", "key", "value", "head"]
    assert (forms.factored, forms.mapped, notes) == ((), (), [])


def test_dense_form_keeps_no_factors():
    forms, _ = decided(mlp(), "dense")
    assert forms.factored == ()
    assert [layer.module for layer in forms.expanded] == ["0", "3", "5"]
    assert forms.dense == forms.parameters.names


@pytest.mark.parametrize(
    ("patterns", "factored", "expanded"),
    [
        (["0.weight"], [("0.weight", None)], []),
        (["0.bias"], [], [(None, "0.bias")]),
        (["5.bias", "3.weight"], [("3.weight", None)], [(None, "5.bias")]),
    ],
    ids=str,
)
def test_only_the_chosen_parameters_of_a_layer_are_in_the_plan(patterns, factored, expanded):
    forms, _ = decided(mlp(parameters=patterns))
    assert [(layer.weight, layer.bias) for layer in forms.factored] == factored
    assert [(layer.weight, layer.bias) for layer in forms.expanded] == expanded
    assert forms.mapped == ()


def test_a_layer_called_twice_has_positions_for_both():
    forms, notes = decided(twice())
    assert {layer.module: layer.positions for layer in forms.layers} == {"inner": 2, "head": 1}
    assert notes == []


def test_shared_parameters_are_left_to_vmap():
    forms, notes = decided(tied())
    assert forms.layers == ()
    assert forms.mapped == ("embed.weight", "first.weight", "first.bias", "second.bias")
    assert notes == []


def test_modules_without_a_rule_are_left_to_vmap():
    forms, notes = decided(TASKS["convnet"]())
    assert forms.mapped == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert [layer.module for layer in forms.factored] == ["5"]
    assert notes == []


def test_a_reparametrised_layer_is_left_to_vmap():
    model = built(lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)), torch.float64)
    task = logistic(model=model)
    forms, _ = decided(task)
    assert [layer.module for layer in forms.layers] == ["2"]
    assert agrees(task, forms)


# --- names in the store ---


def test_keys_are_safe_as_folders_and_never_those_of_other_arrays():
    long = "long_" * 60

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("dense", "loss", "target", "digest", "plain_1", "größe", "a b", "..", long):
                self.register_module(name, nn.Linear(5, 5)) if "." not in name else None
            self.inner = nn.ModuleDict({"0": nn.Linear(5, 5), "dense": nn.Linear(5, 5)})
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear) and name != "head":
                    x = torch.tanh(module(x))
            return self.head(x)

    task = logistic(model=built(Model, torch.float64))
    forms, _ = decided(task)
    keys = {layer.module: layer.key for layer in forms.factored}
    assert len(keys) == 11
    assert len({key.lower() for key in keys.values()}) == 11
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,199}", key) and not key.startswith(".") for key in keys.values())
    assert {"dense", "loss", "target", "digest"}.isdisjoint(keys.values())
    assert (keys["plain_1"], keys["inner.0"], keys["inner.dense"]) == ("plain_1", "inner.0", "inner.dense")
    assert agrees(task, forms)


def test_a_model_that_is_itself_a_layer_has_a_key():
    forms, _ = decided(logistic())
    assert [(layer.module, layer.weight, layer.bias) for layer in forms.factored] == [("", "weight", "bias")]
    assert forms.factored[0].key


# --- where the rule is wrong ---


def test_a_weight_used_by_hand_elsewhere_is_noticed():
    for form in ("auto", "dense"):
        task = reused()
        forms, notes = decided(task, form)
        assert notes == ["layer 'inner' disagrees with plain autograd by its rule; vmap takes it"]
        assert forms.mapped == ("inner.weight", "inner.bias")
        assert [layer.module for layer in forms.layers] == ["head"]
        assert agrees(task, forms)


def test_a_batch_that_is_not_the_first_axis_is_noticed_though_the_shapes_fit():
    task = batch_second(n_train=4, positions=4)
    forms, notes = decided(task)
    assert {"inner.weight", "inner.bias"} <= set(forms.mapped)
    assert "layer 'inner' disagrees with plain autograd by its rule; vmap takes it" in notes
    assert agrees(task, forms, 4)
    assert agrees(task, forms, 3)


def test_a_batch_that_is_not_the_first_axis_and_does_not_fit_is_left_to_vmap():
    task = batch_second(positions=4)
    forms, notes = decided(task)
    assert (forms.layers, notes) == ((), [])
    for size in (1, 3, 4, 10):
        assert agrees(task, forms, size)


class Hooked(nn.Module):
    """A hook of the user's changes what the first layer gives."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.inner.register_forward_hook(lambda module, inputs, output: 2 * output)
        self.head.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)))


def test_hooks_of_the_user_are_respected():
    task = logistic(model=built(Hooked, torch.float64))
    forms, _ = decided(task)
    assert agrees(task, forms)
    assert len(task.model.inner._forward_hooks) == 1


def test_float32_noise_is_no_disagreement():
    for name in TASKS:
        _, notes = decided(TASKS[name](torch.float32, n_train=30))
        assert not any("disagrees" in note for note in notes) or name == "reused"


def test_a_sample_without_a_finite_gradient_is_no_disagreement():
    task = mlp()
    samples = [(x * float("nan") if i == 2 else x, y) for i, (x, y) in enumerate(task.train)]
    forms, notes = decided(mlp(train=samples))
    assert [layer.module for layer in forms.factored] == ["0", "3", "5"]
    assert notes == []


# --- where vmap cannot go ---


def test_a_branch_on_the_data_falls_back_to_a_loop_with_a_note():
    for form in ("auto", "dense"):
        task = branching()
        forms, notes = decided(task, form)
        assert forms.engine == "loop"
        assert forms.mapped == ("inner.weight", "inner.bias")
        assert len(notes) == 1
        assert re.match(r"vmap cannot follow this model, a slower loop takes its place \(.*\.item\(\)", notes[0])
        assert agrees(task, forms)


class Recurrent(nn.Module):
    """A recurrent layer, whose kernels have no rule for vmap."""

    def __init__(self):
        super().__init__()
        self.steps, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.steps(x)[0][:, -1])


def test_a_recurrent_layer_falls_back_to_a_loop():
    task = batch_second(model=built(Recurrent, torch.float64))
    forms, notes = decided(task)
    assert agrees(task, forms)
    assert forms.engine == "loop"
    assert len(notes) == 1


class WrongUnderVmap(torch.autograd.Function):
    """An operation whose own rule for vmap is wrong."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info, in_dims, x):
        return WrongUnderVmap.apply(3 * x), in_dims[0]


class Misled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(WrongUnderVmap.apply(self.norm(x)))


def test_a_wrong_result_of_vmap_is_noticed_and_a_loop_takes_its_place():
    task = logistic(model=built(Misled, torch.float64))
    forms, notes = decided(task)
    assert forms.engine == "loop"
    assert notes == ["vmap of the whole model disagrees with plain autograd; a loop over samples takes its place"]
    assert [layer.module for layer in forms.factored] == ["head"]
    assert agrees(task, forms)


# --- refusals ---


class Counting(nn.Module):
    """Gives another output at each call."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.Linear(5, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


def test_a_model_with_a_state_between_calls_is_refused():
    with pytest.raises(BadInput, match=r"gradients of inner.bias, inner.weight: expected two computations to agree, f"):
        decided(logistic(model=built(Counting, torch.float64)))


def test_random_numbers_in_the_model_are_refused():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x):
            return F.dropout(self.inner(x), 0.5)

    torch.manual_seed(0)
    with pytest.raises(BadInput, match="does the model keep state between calls, or draw random numbers"):
        decided(logistic(model=built(Careless, torch.float64)))


def check(task, forms):
    with evaluating(task.model, CPU):
        check_forms(task, forms, probe_batch(task, range(6), CPU))


@pytest.mark.parametrize("name", TASKS)
def test_decided_forms_pass_the_check(name):
    task = TASKS[name]()
    check(task, decided(task)[0])


def test_forms_that_no_longer_agree_are_refused():
    task = reused()
    parameters = select(task.model, None)
    rule = Layer("inner", "inner", "inner.weight", "inner.bias", 1, 5, 5)
    forms = Forms(parameters, (rule,), (), ("head.weight", "head.bias"))
    with pytest.raises(BadInput, match=r"gradients of inner.weight: expected agreement with plain autograd as when"):
        check(task, forms)
    check(task, replace(forms, factored=(), mapped=parameters.names))


def test_one_sample_is_enough_to_decide():
    for name in TASKS:
        task = TASKS[name](n_train=1)
        forms, _ = decided(task)
        assert agrees(task, forms), name


def test_the_device_and_data_of_the_task_are_not_changed():
    task = mlp()
    before = normal(14, 6)
    decided(task)
    assert torch.equal(task.train.tensors[0], before[:10])
