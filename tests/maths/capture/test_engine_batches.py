"""Capture of batches that differ: lengths, layers that are not called, checkpoints, shared inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from infl_cache import BadInput
from infl_cache.maths.capture.engine import by_position
from tests.driving import captured_rows, decided
from tests.tasks import Samples, Tokens, built, classified, labels, logistic, normal
from tests.twins import gradient_rows, relative_error

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
