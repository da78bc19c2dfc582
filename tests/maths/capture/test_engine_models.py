"""Capture of models that take several ways at once, and of odd modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from infl_cache.maths.capture import capture, rows_of
from infl_cache.maths.capture.mapped import mapped_gradients
from infl_cache.maths.params import flatten
from infl_cache.maths.scores import queries, scores
from infl_cache.maths.task import evaluating
from tests.driving import CPU, captured_rows, decided, one_batch
from tests.tasks import built, classified, labels, logistic, normal
from tests.twins import gradient_rows, relative_error

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
