"""Self-attention: its two projections are recorded as linear layers, whatever its options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from infl_cache.maths.capture.attention import has_projections, place_of
from infl_cache.maths.capture.tape import recording
from tests.driving import CPU, captured_rows, close, decided
from tests.tasks import built, classified, normal
from tests.twins import gradient_rows, relative_error

LENGTH, WIDTH = 3, 4
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


class Attends(nn.Module):
    """Attention of torch's own, over (B, T, d) or (T, B, d), with what a function gives it."""

    def __init__(self, call=lambda inner, x: inner(x, x, x), **options):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(WIDTH, 2, **options), nn.Linear(WIDTH, 3)
        self.call, self.first = call, options.get("batch_first", False)

    def forward(self, x):
        found, _ = self.call(self.inner, x if self.first else x.transpose(0, 1))
        return self.head(torch.tanh(found).mean(1 if self.first else 0))


CASES = {
    "plain": {},
    "first": {"batch_first": True},
    "without_bias": {"bias": False},
    "with_bias_kv": {"add_bias_kv": True, "batch_first": True},
    "with_zero": {"add_zero_attn": True},
    "dropout": {"dropout": 0.5},
    "causal": {"call": lambda inner, x: inner(x, x, x, attn_mask=CAUSAL, is_causal=True), "batch_first": True},
    "without_weights": {"call": lambda inner, x: inner(x, x, x, need_weights=False)},
    "by_name": {"call": lambda inner, x: inner(query=x, key=x, value=x), "batch_first": True},
    "twice": {"call": lambda inner, x: inner(*[inner(x, x, x)[0]] * 3)},
}


def attends(batch=12, **options):
    return classified(built(lambda: Attends(**options), torch.float64), normal(batch, LENGTH, WIDTH), batch - 2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_self_attention_is_two_linear_layers_whatever_its_options(name, form):
    task = attends(**CASES[name])
    forms, notes = decided(task, form)
    assert {layer.module: layer.within for layer in forms.layers} == {
        "inner.in_proj": "inner", "inner.out_proj": "inner", "head": "",
    }  # fmt: skip
    assert (forms.mapped, notes) == ((), [])
    assert bool(forms.alone) == (name == "with_bias_kv")
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


def test_padding_that_is_a_samples_own_is_respected():
    class Padded(Attends):
        def forward(self, x):
            padding = x[:, :, 0] > 1
            padding[:, 0] = False
            found, _ = self.inner(x, x, x, key_padding_mask=padding)
            return self.head(torch.tanh(found).mean(1))

    inputs = normal(12, LENGTH, WIDTH)
    assert bool((inputs[:, 1:, 0] > 1).any())
    task = classified(built(lambda: Padded(batch_first=True), torch.float64), inputs, 10)
    forms, notes = decided(task)
    assert (forms.alone, forms.mapped, notes) == ((), (), [])
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


@pytest.mark.parametrize("patterns", [["inner.in_proj_weight"], ["inner.in_proj_bias"], ["inner.out_proj.weight"],
                                      ["inner.out_proj.bias", "head.*"]], ids=str)  # fmt: skip
def test_chosen_parameters_of_attention_alone(patterns):
    task = replace(attends(), parameters=patterns)
    for form in ("auto", "dense"):
        forms, notes = decided(task, form)
        assert (forms.alone, forms.mapped, notes) == ((), (), [])
        expected = gradient_rows(task, range(10), forms.parameters.names)
        assert relative_error(captured_rows(task, forms, 3), expected) < 1e-12


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)

    def forward(self, x):
        x = self.inner(x)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)
        return self.head(x.mean(1))


def test_attention_that_is_computed_again_in_the_backward_pass_is_still_seen_into():
    task = classified(built(Checkpointed, torch.float64), normal(12, LENGTH, WIDTH), 10)
    forms, notes = decided(task)
    assert {"block.self_attn.in_proj", "block.self_attn.out_proj"} <= {layer.module for layer in forms.layers}
    assert (forms.alone, forms.mapped, notes) == ((), (), [])
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


CROSSED = {
    "other_key": lambda inner, x: inner(x, 2 * x, x),
    "other_query": lambda inner, x: inner(x[:1] if not inner.batch_first else x[:, :1], x, x),
    "copies": lambda inner, x: inner(x, x.clone(), x.clone()),
}


@pytest.mark.parametrize("name", CROSSED)
def test_attention_to_something_else_is_taken_alone(name):
    task = attends(call=CROSSED[name], batch_first=True)
    forms, notes = decided(task)
    assert [unit.module for unit in forms.alone] == ["inner"]
    assert (forms.mapped, notes) == ((), [])
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


class Shared(nn.Module):
    """Two attention layers with one projection in common."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
        self.two.in_proj_weight, self.head = self.one.in_proj_weight, nn.Linear(WIDTH, 3)

    def forward(self, x):
        for inner in (self.one, self.two):
            x = x + inner(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def test_two_layers_with_a_common_projection_are_never_mixed_up():
    task = classified(built(Shared, torch.float64), normal(12, LENGTH, WIDTH), 10)
    for form in ("auto", "dense"):
        forms, _ = decided(task, form)
        for size in (1, 3, 10):
            assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


def test_the_outputs_and_weights_of_watched_attention_are_its_own():
    inner, x = built(lambda: nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True), torch.float64), normal(LENGTH, 5, WIDTH)
    inner.requires_grad_(False)
    expected, weights = inner(x, x, x, attn_mask=CAUSAL)
    with recording(inner, [], CPU, attention=[""]) as tape:
        found, same = inner(x, x, x, attn_mask=CAUSAL)
        close(found.detach(), expected)
        close(same.detach(), weights)
        tape.backward(found.square().sum())
    assert {name: [call.shapes for call in calls] for name, calls in tape.calls.items()} == {
        ".in_proj": [[torch.Size([LENGTH, 5, 3 * WIDTH])]], ".out_proj": [[torch.Size([LENGTH, 5, WIDTH])]],
    }  # fmt: skip
    close(tape.calls[".out_proj"][0].grad(x), 2 * expected)
    again, _ = inner(x, x, x, attn_mask=CAUSAL)
    assert torch.equal(again, expected)


class OwnForward(nn.MultiheadAttention):
    def forward(self, query, key, value):
        return F.relu(super().forward(query, key, value)[0])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.MultiheadAttention(4, 2), True),
        (nn.MultiheadAttention(4, 2, bias=False), True),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), False),
        (OwnForward(4, 2), False),
        (nn.TransformerEncoderLayer(4, 2), False),
        (nn.Linear(4, 4), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_projections_are_seen_in_what_computes_as_torchs_own_does(module, expected):
    assert has_projections(module) is expected


def test_parameters_have_their_place_in_a_projection():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(4, 4)})
    assert place_of(model, "a").kinds == {"in_proj_weight": "weight", "in_proj_bias": "bias"}
    assert [(place_of(model, path).calls, place_of(model, path).within) for path in ("a", "a.out_proj", "b")] == [
        ("a.in_proj", "a"), ("a.out_proj", "a"), ("b", ""),
    ]  # fmt: skip
