"""Deciding: the cheaper form where a rule holds, a fallback with a note where it does not."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

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
    classified,
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
    # T = 3: 3 indices and 3 x 5 for 30; 5 -> 8 keeps 39 numbers for 48, 8 -> 5 39 for 45; the head is called once.
    assert [(layer.module, layer.input_shape, layer.grad_shape) for layer in forms.factored] == [
        ("embed", (3,), (3, 5)),
        ("up", (3, 5), (3, 8)),
        ("down", (3, 8), (3, 5)),
        ("head", (1, 5), (1, 3)),
    ]
    assert (forms.dense, forms.mapped, notes) == ((), (), [])


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
        (["0.weight"], [{"weight": "0.weight"}], []),
        (["0.bias"], [], [{"bias": "0.bias"}]),
        (["5.bias", "3.weight"], [{"weight": "3.weight"}], [{"bias": "5.bias"}]),
    ],
    ids=str,
)
def test_only_the_chosen_parameters_of_a_layer_are_in_the_plan(patterns, factored, expanded):
    forms, _ = decided(mlp(parameters=patterns))
    assert [layer.parameters for layer in forms.factored] == factored
    assert [layer.parameters for layer in forms.expanded] == expanded
    assert forms.mapped == ()


def test_a_layer_called_twice_has_positions_for_both():
    forms, notes = decided(twice())
    assert {layer.module: layer.input_shape for layer in forms.layers} == {"inner": (2, 5), "head": (1, 5)}
    assert notes == []


def test_shared_parameters_are_the_sum_over_their_layers():
    for layer_forms in (None, "*=factored", "*=dense"):
        task = tied()
        forms, notes = decided(task, layer_forms=layer_forms)
        assert {layer.module for layer in forms.layers} == {"embed", "decoder", "first", "second"}
        assert (forms.spread, forms.alone, forms.mapped, notes) == ((), (), (), [])
        assert agrees(task, forms)


def test_common_layers_have_rules():
    forms, notes = decided(TASKS["convnet"]())
    assert [(layer.module, layer.rule) for layer in forms.expanded] == [("0", "convolution"), ("1", "channel_norm")]
    assert [layer.module for layer in forms.factored] == ["5"]
    assert (forms.mapped, notes) == ((), [])


def made_by(forms):
    """The parameters that each part of a plan makes."""
    return {
        "factored": {name for layer in forms.factored for name in layer.names},
        "expanded": {name for layer in forms.expanded for name in layer.names},
        "spread": {each.name for each in forms.spread},
        "alone": {name for each in forms.alone for name in each.parameters.values()},
        "mapped": set(forms.mapped),
    }


def test_no_part_adds_to_a_parameter_that_is_stored_as_factors():
    for name, layer_forms in itertools.product(TASKS, (None, "*=factored", "*=dense")):
        parts = made_by(decided(TASKS[name](), layer_forms=layer_forms)[0])
        factored, others = parts.pop("factored"), set().union(*parts.values())
        assert factored.isdisjoint(others), name
        assert parts["mapped"].isdisjoint(parts["expanded"] | parts["spread"] | parts["alone"]), name


class Decoder(nn.Module):
    """A layer of the user's whose weight is the embedding's."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.bias, self.inner = weight, nn.Parameter(torch.zeros(5)), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.inner(x)), self.weight, self.bias)


class TiedToOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.decoder = Decoder(self.embed.weight)

    def forward(self, ids):
        return self.decoder(self.embed(ids).mean(1))


@pytest.mark.parametrize("layer_forms", [None, "*=factored"])
def test_a_rule_and_a_module_alone_add_up_in_plain_columns(layer_forms):
    task = tied(model=built(TiedToOwn, torch.float64))
    forms, notes = decided(task, layer_forms=layer_forms)
    assert [(unit.module, unit.parameters) for unit in forms.alone] == [("decoder", {"weight": "embed.weight"})]
    assert [layer.module for layer in forms.expanded] == ["embed"]
    assert [each.name for each in forms.spread] == ["decoder.bias"]
    assert notes == []
    assert agrees(task, forms)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm], ids=lambda each: each.__name__)
def test_a_reparametrised_layer_is_taken_alone(wrap):
    model = built(lambda: nn.Sequential(wrap(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)), torch.float64)
    task = logistic(model=model)
    forms, notes = decided(task)
    assert [layer.module for layer in forms.layers] == ["2"]
    assert [unit.module for unit in forms.alone] == ["0"]
    assert (forms.mapped, notes) == ((), [])
    assert agrees(task, forms)


# --- names in the store ---


def test_keys_are_safe_as_folders_and_never_those_of_other_arrays():
    long = "long_" * 60

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("dense", "dense_exponent", "loss", "target", "digest", "plain_1", "größe", "a b", "..", long):
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
    assert len(keys) == 12
    assert len({key.lower() for key in keys.values()}) == 12
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,199}", key) and not key.startswith(".") for key in keys.values())
    assert {"dense", "dense_exponent", "loss", "target", "digest"}.isdisjoint(keys.values())
    assert (keys["plain_1"], keys["inner.0"], keys["inner.dense"]) == ("plain_1", "inner.0", "inner.dense")
    assert agrees(task, forms)


def test_a_model_that_is_itself_a_layer_has_a_key():
    forms, _ = decided(logistic())
    assert [(layer.module, layer.names) for layer in forms.factored] == [("", ("weight", "bias"))]
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


@pytest.mark.parametrize(("count", "positions"), [(4, 4), (10, 4), (1, 1), (2, 2)])
def test_a_batch_that_is_not_the_first_axis_is_understood_whether_or_not_the_shapes_fit(count, positions):
    task = batch_second(n_train=count, positions=positions)
    forms, notes = decided(task)
    assert {layer.module: layer.axes for layer in forms.layers} == {"inner": (1, 1), "head": (1, 1)}
    assert (forms.mapped, notes) == ((), [])
    for size in (1, 3, 4, 10):
        assert agrees(task, forms, size)


class Sorted(nn.Module):
    """Puts the samples of a batch in another order inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.inner(x[order]))[order.argsort()])


@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_samples_in_another_order_are_noticed_however_few_are_held_at_once(at_once):
    task = logistic(model=built(Sorted, torch.float64))
    forms, notes = decided(task, at_once=at_once)
    assert notes == ["layer 'inner' disagrees with plain autograd by its rule; vmap takes it"]
    for size in (1, 2, 10):
        assert agrees(task, forms, size)


class Experts(nn.Module):
    """Each sample goes through one of two layers."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        chosen, hidden = x[:, 0] > 0, x.new_zeros(len(x), 6)
        for which, layer in ((chosen, self.left), (~chosen, self.right)):
            if bool(which.any()):
                hidden[which] = layer(x[which])
        return self.head(torch.tanh(hidden))


def test_a_layer_that_sees_some_samples_only_takes_no_other_layer_with_it():
    task = logistic(model=built(Experts, torch.float64))
    forms, notes = decided(task)
    assert [layer.module for layer in forms.factored] == ["head"]
    assert set(forms.mapped) == {"left.weight", "left.bias", "right.weight", "right.bias"}
    assert forms.engine == "loop"
    assert notes
    for size in (1, 2, 10):
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


def test_a_sample_with_some_gradients_that_are_not_finite_says_nothing_against_the_others():
    inputs = normal(12, 2, 4, 4)
    inputs[3, 0, 0, 1] = float("inf")  # a saturated tanh: finite outputs, an undefined gradient of the first weights
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    task = classified(built(lambda: model, torch.float64), inputs, 10)
    expected = gradient_rows(task, range(10))
    finite = expected[3].isfinite()
    assert 0 < int((~finite).sum()) < 54
    forms, notes = decided(task)
    assert ({layer.module for layer in forms.layers}, notes) == ({"0", "3"}, [])
    found, others = captured_rows(task, forms, 3), [i for i in range(10) if i != 3]
    assert torch.equal(found[3].isfinite(), finite)
    torch.testing.assert_close(found[3][finite], expected[3][finite], rtol=1e-10, atol=1e-10)
    assert relative_error(found[others], expected[others]) < 1e-12


# --- where vmap cannot go ---


def test_a_branch_on_the_data_falls_back_to_a_loop_with_a_note():
    for form in ("auto", "dense"):
        task = branching()
        forms, notes = decided(task, form)
        assert forms.engine == "loop"
        assert forms.mapped == ("inner.weight", "inner.bias")
        assert re.match(r"vmap cannot follow this model, a slower loop takes its place \(.*\.item\(\)", notes[-1])
        assert agrees(task, forms)


class Recurrent(nn.Module):
    """A recurrent layer, whose kernels have no rule for vmap."""

    def __init__(self):
        super().__init__()
        self.steps, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.steps(x)[0][:, -1])


def test_a_recurrent_layer_is_looped_over_alone():
    task = batch_second(model=built(Recurrent, torch.float64))
    forms, notes = decided(task)
    assert [(unit.module, unit.engine) for unit in forms.alone] == [("steps", "loop")]
    assert [layer.module for layer in forms.layers] == ["head"]
    assert (forms.mapped, forms.engine) == ((), "vmap")
    assert len(notes) == 1
    assert notes[0].startswith("module 'steps': vmap cannot follow it, a slower loop over it takes its place (")
    for size in (1, 3, 10):
        assert agrees(task, forms, size)


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
        self.mix, self.head = nn.Parameter(torch.rand(5, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(WrongUnderVmap.apply(x @ self.mix))


def test_a_wrong_result_of_vmap_is_noticed_and_a_loop_takes_its_place():
    task = logistic(model=built(Misled, torch.float64))
    forms, notes = decided(task)
    assert (forms.engine, forms.mapped) == ("loop", ("mix",))
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
    own = {"weight": "inner.weight", "bias": "inner.bias"}
    rule = Layer("inner", "inner", "linear", own, (1, 5), (1, 5), 30)
    forms = Forms(parameters, (rule,), mapped=("head.weight", "head.bias"))
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
