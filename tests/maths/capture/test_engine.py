"""Capture: whatever the form and the micro-batch, the rows are those of a loop of plain autograd."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from infl_cache import BadInput
from infl_cache.maths.capture import capture, rows_of
from infl_cache.maths.capture.engine import by_position
from infl_cache.maths.capture.mapped import mapped_gradients
from infl_cache.maths.params import flatten
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.scores import queries, scores
from infl_cache.maths.task import evaluating
from tests.driving import CPU, captured_rows, decided, one_batch
from tests.tasks import (
    TASKS,
    Samples,
    Tokens,
    attention,
    built,
    classified,
    convnet,
    cross_entropy,
    dicts,
    inplace,
    labels,
    logistic,
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


# --- sequences, layers and checkpoints that vary from batch to batch ---


def ragged(lengths, form="auto", **changes):
    """Token sequences of the given lengths, padded to the longest of each batch."""
    sequences = [(1 + labels(length, 5, seed=20 + i), i % 3) for i, length in enumerate(lengths)]

    def collate(samples):
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
        return ids, torch.tensor([label for _, label in samples])

    model = built(Tokens, torch.float64)
    return classified(model, normal(2, 1), 1, 3, train=Samples(sequences), collate=collate, **changes)


def test_lengths_that_vary_are_kept_as_rows_with_a_note_and_give_the_same_gradients():
    task = ragged([3, 2, 3, 1, 5, 1, 3])
    forms, notes = decided(task, count=3)
    assert [layer.module for layer in forms.factored] == ["head"]
    assert [layer.module for layer in forms.expanded] == ["embed", "up", "down"]
    assert [note.split(";")[0] for note in notes] == [
        f"layer {module!r} sees samples of different lengths and is stored as plain rows"
        for module in ("down", "embed", "up")
    ]
    for size in (1, 2, 7):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(7))) < 1e-12


# Forty samples are more than are looked at for their lengths; number 21 is none of those that are.
FORTY = 40


def test_a_shorter_sequence_than_those_that_were_looked_at_is_padded():
    task = ragged([2 if i == 21 else 3 for i in range(FORTY)])
    forms, notes = decided(task, count=4)
    assert [layer.module for layer in forms.factored] == ["embed", "up", "down", "head"]
    assert notes == []
    for size in (1, 3, 40):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(FORTY))) < 1e-12


def test_a_longer_sequence_than_the_store_has_room_for_is_refused_with_shapes_and_remedy():
    task = ragged([5 if i == 21 else 3 for i in range(FORTY)])
    for first, shape, found in (("embed", r"2, at most 3", r"2, 5"), ("up", r"2, at most 3, 5", r"2, 5, 5")):
        forms, _ = decided(task, count=4, layer_forms=None if first == "embed" else "embed=dense")
        message = (
            rf"layer '{first}': expected inputs or outputs of shape \({shape}\), found \({found}\) at samples 20 to 21;"
            r" pad to one length in collate=, or use --form dense"
        )
        with pytest.raises(BadInput, match=message):
            captured_rows(task, forms, 2)


def test_dense_form_takes_longer_sequences_than_the_first():
    task = ragged([3, 2, 5, 4])
    forms, _ = decided(task, "dense", count=2)
    for size in (1, 2, 4):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(4))) < 1e-12


class Rarely(nn.Module):
    """One layer is called only if a sample of the batch needs it, and then works on those samples only."""

    def __init__(self):
        super().__init__()
        self.always, self.rarely = nn.Linear(5, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.always(x))
        needs = x[:, :1] > 0
        if bool(needs.any()):
            hidden = torch.where(needs, self.rarely(hidden), hidden)
        return self.head(hidden)


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_a_layer_that_a_batch_does_not_call_has_zero_gradients(form):
    task = logistic(model=built(Rarely, torch.float64))
    needs = [float(task.train[i][0][0]) > 0 for i in range(10)]
    assert 0 < sum(needs) < 10
    forms, _ = decided(task, form)
    for size in (10, 1):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


class Block(nn.Module):
    """Layers with a rule, one without, a parameter, and a write in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.scale = (
            nn.Conv1d(4, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Parameter(torch.rand(4, 1)),
        )
        self.mix = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        y = torch.relu_(self.norm(self.conv(x))) * self.scale
        return torch.tanh(self.mix(y.mT.contiguous(), x.mT.contiguous())).mT


class Checkpointed(nn.Module):
    """Computes its blocks again in the backward pass, to save memory: one twice, one within another."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.inner, self.one, self.two, self.head = nn.Conv1d(3, 4, 1), Block(), Block(), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        y = checkpoint(self.one, self.inner(x), use_reentrant=self.reentrant)
        y = checkpoint(
            lambda z: checkpoint(self.one, self.two(z), use_reentrant=False), y, use_reentrant=self.reentrant
        )
        return self.head(y.mean(2))


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_activation_checkpoints_give_the_same_gradients(form):
    task = classified(built(Checkpointed, torch.float64), normal(12, 3, 4), 10)
    forms, notes = decided(task, form)
    assert {layer.module for layer in forms.layers} == {
        "inner", "head", "one.conv", "one.norm", "two.conv", "two.norm",
    }  # fmt: skip
    assert [unit.module for unit in forms.alone] == ["one.mix", "two.mix"]
    assert (forms.mapped, notes) == ((), [])
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpoints_are_refused_with_the_remedy():
    task = classified(built(lambda: Checkpointed(True), torch.float64), normal(12, 3, 4), 10)
    with pytest.raises(BadInput, match=r"^backward of the loss: expected .*reentrant=False, found .*=True") as refused:
        decided(task)
    assert len(str(refused.value).splitlines()) == 2


class Frozen(nn.Module):
    """Remembers where a gradient could have gone."""

    def __init__(self):
        super().__init__()
        self.body, self.neck, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.seen = []

    def forward(self, x):
        hidden = self.neck(torch.tanh(self.body(x)))
        out = self.head(torch.tanh(hidden))
        self.seen = [each.requires_grad for each in (hidden, out)]
        return out


def test_no_gradient_is_sent_through_layers_whose_parameters_nobody_asks_for():
    for patterns, expected in ((["head.*"], [False, True]), (["neck.bias"], [True, True]), (None, [True, True])):
        task = logistic(model=built(Frozen, torch.float64), parameters=patterns)
        forms, _ = decided(task)
        captured_rows(task, forms)
        assert task.model.seen == expected


class ByName(nn.Module):
    """Hands its inputs on by name."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(input=torch.tanh(self.inner(input=x)))


def test_layers_called_by_keyword_give_the_same_gradients():
    task = logistic(model=built(ByName, torch.float64))
    forms, _ = decided(task)
    assert relative_error(captured_rows(task, forms, 3), gradient_rows(task, range(10))) < 1e-12


class UnderNoGrad(nn.Module):
    """A first half through which no gradient goes."""

    def __init__(self):
        super().__init__()
        self.fixed, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            hidden = torch.tanh(self.fixed(x))
        return self.head(hidden)


def test_a_layer_under_no_grad_has_zero_gradients():
    task = logistic(model=built(UnderNoGrad, torch.float64))
    forms, _ = decided(task)
    found = captured_rows(task, forms, 3)
    assert relative_error(found, gradient_rows(task, range(10))) < 1e-12
    assert not found[:, forms.parameters.slice_of("fixed.weight")].any()


def test_an_input_that_is_written_over_after_the_layer_is_no_matter_to_a_bias():
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            given = x * 1
            hidden = self.inner(given)
            given.zero_()
            return self.head(torch.tanh(hidden))

    task = logistic(model=built(Reusing, torch.float64), parameters=["inner.bias", "head.*"])
    forms, notes = decided(task)
    assert (forms.mapped, notes) == ((), [])
    expected = gradient_rows(task, range(10), forms.parameters.names)
    assert relative_error(captured_rows(task, forms, 3), expected) < 1e-12


# --- layers that share an input, and layers whose shapes change ---


class Heads(nn.Module):
    """Query, key and value of one input, twice; for some samples the key looks at another one."""

    def __init__(self, other_above=float("inf"), second=False):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.other_above, self.second = nn.Linear(6, 3), other_above, second

    def forward(self, x):
        y = x.transpose(0, 1) if self.second else x
        for _ in range(2):
            other = y if float(x[..., 0].max()) <= self.other_above else 2 * y
            y = torch.tanh(self.query(y) * self.key(other) + self.value(y))
        return self.head(y.mean(0 if self.second else 1))


@pytest.mark.parametrize("second", [False, True])
def test_layers_with_one_input_share_it_even_in_a_sample_that_is_not_finite(second):
    inputs = normal(12, 1, 6)
    inputs[4, 0, 2] = float("nan")
    task = classified(built(lambda: Heads(second=second), torch.float64), inputs, 10)
    forms, notes = decided(task)
    assert {layer.module: layer.input_key for layer in forms.factored} == {
        "query": "", "key": "query", "value": "query", "head": "",
    }  # fmt: skip
    assert notes == []
    found, others = captured_rows(task, forms), [i for i in range(10) if i != 4]
    assert found[4].isnan().any()
    assert relative_error(found[others], gradient_rows(task, others)) < 1e-12


def test_layers_that_no_longer_share_their_input_are_refused():
    inputs = normal(22, 1, 6)
    order = inputs[:, 0, 0].argsort()
    task = classified(built(lambda: Heads(float(inputs[order[15], 0, 0])), torch.float64), inputs[order], 20)
    forms, _ = decided(task, count=8)
    assert [layer.input_key for layer in forms.factored] == ["", "query", "query", ""]
    with pytest.raises(BadInput, match=r"layer 'key': expected the input of layer 'query' as in the first samples, f"):
        captured_rows(task, forms, 4)
    plain, _ = decided(task, "dense", count=8)
    assert relative_error(captured_rows(task, plain, 1), gradient_rows(task, range(20))) < 1e-12


class Unpadded(nn.Module):
    """Takes the padding (0) out before its inner layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        hidden, real = self.embed(ids), ids > 0
        out = torch.zeros_like(hidden)
        out[real] = torch.tanh(self.inner(hidden[real]))
        return self.head(out.sum(1))


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_positions_that_cannot_be_told_apart_into_samples_are_refused(form):
    ids = 1 + labels(42 * 4, 8).reshape(42, 4)
    ids[21, 2:] = 0  # none of those that are looked at for their lengths
    task = classified(built(Unpadded, torch.float64), ids, FORTY)
    forms, _ = decided(task, form, count=8)
    message = r"layer 'inner': expected 4 entries for each of 2 samples along axis 0 as in the first samples, found inp"
    with pytest.raises(BadInput, match=message):
        captured_rows(task, forms, 2)


def test_positions_are_gathered_behind_the_batch():
    assert torch.equal(by_position(normal(4, 3, 5), 4, 0, 1), normal(4, 3, 5))
    assert torch.equal(by_position(normal(3, 4, 5), 4, 1, 1), normal(3, 4, 5).transpose(0, 1))
    assert torch.equal(by_position(normal(12, 5), 4, 0, 1), normal(4, 3, 5))
    assert by_position(normal(4, 5), 4, 0, 1).shape == (4, 1, 5)
    assert by_position(normal(4, 2, 3, 5, 6), 4, 0, 2).shape == (4, 6, 5, 6)
    assert by_position(labels(12).reshape(4, 3), 4, 0, 0).shape == (4, 3)
    with pytest.raises(ValueError, match="expected some entries for each of 5 samples along axis 0"):
        by_position(normal(12, 5), 5, 0, 1)
    with pytest.raises(ValueError, match="expected 4 entries for each of 2 samples along axis 0"):
        by_position(normal(6, 5), 2, 0, 1, length=4)


# --- all ways at once ---


class Own(nn.Module):
    """A layer nobody has a rule for."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(0.5 * torch.randn(6, 6))

    def forward(self, x):
        return torch.sin(F.linear(x, self.mix)) + x


class Mixed(nn.Module):
    """Convolution, norms, own layer, attention, tied weights and own parameters; a recurrent layer or a matrix."""

    def __init__(self, recurrent):
        super().__init__()
        self.embed, self.place = nn.Embedding(7, 6), nn.Parameter(0.5 * torch.randn(4, 6))
        self.conv, self.norm = nn.Conv1d(6, 6, 3, padding="same", groups=2), nn.GroupNorm(2, 6)
        self.prelu, self.own = nn.PReLU(), Own()
        self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)
        self.steps = nn.GRU(6, 6, batch_first=True) if recurrent else None
        self.by_hand = None if recurrent else nn.Parameter(0.5 * torch.randn(6, 6))
        self.decoder = nn.Linear(6, 7)
        self.decoder.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.place
        x = self.own(x + self.prelu(self.norm(self.conv(x.mT))).mT)
        x = x if self.steps is None else x + self.steps(x)[0]
        x = self.last(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)
        return self.decoder(x if self.by_hand is None else x @ self.by_hand)


RULES_OF_MIXED = {"embedding", "linear", "convolution", "channel_norm", "element_norm", "prelu"}


def mixed(recurrent):
    return classified(built(lambda: Mixed(recurrent), torch.float64), labels(48, 7).reshape(12, 4), 10, 7)


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_a_model_that_mixes_all_ways_gives_the_products_of_whole_model_vmap(form):
    task = mixed(recurrent=False)
    forms, notes = decided(task, form)
    assert {layer.rule for layer in forms.layers} == RULES_OF_MIXED
    assert {unit.module: unit.engine for unit in forms.alone} == {"own": "vmap"}
    assert "place" in {each.name for each in forms.spread}
    assert (forms.mapped, forms.engine, notes) == (("by_hand",), "vmap", [])
    with evaluating(task.model, CPU):
        batch = one_batch(task)
        whole = flatten(forms.parameters, mapped_gradients(task, forms.parameters, batch, False), leading=1)
        captured = capture(task, forms, batch)
    s_test = normal(3, forms.parameters.size, seed=5)
    rows = rows_of(forms, captured.factors, captured.dense)
    torch.testing.assert_close(s_test @ rows.T, s_test @ whole.T, rtol=1e-6, atol=1e-9)
    found = scores(forms, queries(forms, s_test), captured.factors, captured.dense, 10**6)
    torch.testing.assert_close(found, s_test @ whole.T, rtol=1e-6, atol=1e-9)
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_a_recurrent_layer_among_others_is_the_only_one_that_is_looped_over(form):
    task = mixed(recurrent=True)
    forms, notes = decided(task, form)
    assert {layer.rule for layer in forms.layers} == RULES_OF_MIXED
    assert {unit.module: unit.engine for unit in forms.alone} == {"own": "vmap", "steps": "loop"}
    assert (forms.mapped, forms.engine) == ((), "vmap")
    assert [note.split(":")[0] for note in notes] == ["module 'steps'"]
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


class Encoder(nn.Module):
    """torch's own transformer layers, which have a shortcut for padding at inference."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.embed, self.blocks, self.head = (
            nn.Embedding(6, 4, padding_idx=0),
            nn.TransformerEncoder(layer, 2),
            nn.Linear(4, 3),
        )

    def forward(self, ids):
        out = self.blocks(self.embed(ids), src_key_padding_mask=ids == 0)
        return self.head((out * (ids > 0).unsqueeze(-1)).sum(1))


def test_torchs_transformer_layers_with_padding_have_their_rules():
    ids = 1 + labels(48, 5).reshape(12, 4)
    ids[::3, 3] = 0
    task = classified(built(Encoder, torch.float64), ids, 10)
    forms, notes = decided(task)
    assert {"blocks.layers.1.linear1", "blocks.layers.0.norm2"} <= {layer.module for layer in forms.layers}
    assert {"blocks.layers.0.self_attn.in_proj", "blocks.layers.1.self_attn.out_proj"} <= {
        layer.module for layer in forms.layers
    }
    assert (forms.spread, forms.alone, forms.mapped, notes) == ((), (), (), [])
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


# --- odd modules ---


class Adapted(nn.Linear):
    """A linear layer with an own forward and more parameters."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.rand(2, 5)), nn.Parameter(torch.rand(4, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Gives(nn.Module):
    """Gives its outputs in different structures."""

    def __init__(self, kind):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.rand(5, 4)), kind

    def forward(self, x):
        y = x @ self.weight
        return {
            "tuple": (y, torch.tanh(y)), "same": [y, y], "dict": {"a": y, "b": {"c": torch.tanh(y), "d": None}},
            "class": SimpleNamespace(a=y, b=torch.tanh(y)), "chunk": torch.cat([y, torch.tanh(y)], 1).chunk(2, 1)[1],
        }[self.kind]  # fmt: skip


def values_in(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [found.a, found.b] if isinstance(found, SimpleNamespace) else [
        each for each in tree_leaves(found) if isinstance(each, torch.Tensor)
    ]  # fmt: skip


class Reads(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(sum((1 + i) * each for i, each in enumerate(values_in(self.inner(x)))))


class Hooked(nn.Module):
    """Hooks of the user before and after a layer without a rule."""

    def __init__(self):
        super().__init__()
        self.inner = Gives("tuple")
        self.inner.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        self.inner.register_forward_hook(lambda module, inputs, outputs: (outputs[0].square(), outputs[1]))

    def forward(self, x):
        return self.inner(x)


class SameTwice(nn.Module):
    """One module under two names, and a parameter of it used by another."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 4)
        self.same = self.one

    def forward(self, x):
        return torch.tanh(self.one(x)) + self.same(x) * self.one.bias


class Reversed(torch.autograd.Function):
    """The identity with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -3 * grad


class Reversing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 4)

    def forward(self, x):
        return Reversed.apply(torch.relu(self.inner(x)))


class Slope(nn.Module):
    """Its output is a gradient itself: weights count in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        with torch.enable_grad():
            at = x[:, :4].detach().requires_grad_()
            return torch.autograd.grad(torch.tanh(self.inner(at)).square().sum(), at, create_graph=True)[0]


ODD = {
    "adapted": lambda: Adapted(5, 4), "hooked": Hooked, "same_twice": SameTwice, "reversing": Reversing, "slope": Slope,
    **{kind: lambda kind=kind: Gives(kind) for kind in ("tuple", "same", "dict", "class", "chunk")},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_modules_have_the_gradients_of_plain_autograd(name):
    task = logistic(model=built(lambda: Reads(ODD[name]), torch.float64))
    for form in ("auto", "dense"):
        forms, _ = decided(task, form)
        assert "head" in {layer.module for layer in forms.layers}
        for size in (1, 3, 10):
            assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


@pytest.mark.parametrize("kind", ["tuple", "same", "dict", "chunk"])
def test_a_module_with_outputs_in_a_structure_is_taken_alone(kind):
    forms, notes = decided(logistic(model=built(lambda: Reads(lambda: Gives(kind)), torch.float64)))
    assert [(unit.module, len(unit.outputs)) for unit in forms.alone] == [("inner", 1 if kind == "chunk" else 2)]
    assert (forms.mapped, notes) == ((), [])


def test_sparse_gradients_of_embeddings_are_the_same_numbers():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.bag = nn.Embedding(6, 5, sparse=True), nn.EmbeddingBag(6, 5, sparse=True)
            self.head = nn.Linear(5, 3)

        def forward(self, ids):
            return self.head(torch.tanh(self.words(ids).mean(1) + self.bag(ids)))

    ids = labels(36, 6).reshape(12, 3)
    task = classified(built(Words, torch.float64), ids, 10)
    forms, notes = decided(task)
    assert ([layer.module for layer in forms.layers], notes) == (["words", "bag", "head"], [])
    dense = built(Words, torch.float64)
    dense.words.sparse = dense.bag.sparse = False
    expected = gradient_rows(classified(dense, ids, 10), range(10))
    assert relative_error(captured_rows(task, forms, 3), expected) < 1e-12


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
