"""The model itself: out of its wrappings, by its own code, and at other values."""

import pytest
import torch
from torch import nn

from infl_cache.errors import BadInput
from infl_cache.maths.model import by_its_own_code, called_at, unwrapped
from tests.tasks import Tied, built, labels, normal


def test_wrappings_are_taken_off_however_many():
    inner = nn.Linear(3, 2)
    assert unwrapped(inner) is inner
    assert unwrapped(nn.DataParallel(inner)) is inner
    assert unwrapped(torch.compile(nn.DataParallel(inner), backend="eager")) is inner


def test_sharded_models_are_refused_in_one_line():
    class FullyShardedDataParallel(nn.Module):
        pass

    model = nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel())
    with pytest.raises(BadInput, match="'1' sharded over several; load the full state") as refused:
        unwrapped(model)
    assert "\n" not in str(refused.value)


def test_compiled_parts_run_their_own_code_inside():
    calls = []

    def counting(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.ReLU(), backend=counting))
    x = torch.randn(2, 3)
    with by_its_own_code(model):
        inside = model(x)
    assert calls == []
    with torch.no_grad():
        assert torch.equal(inside, model(x))
    assert calls


def test_the_attention_shortcut_is_off_inside_and_put_back():
    before = torch.backends.mha.get_fastpath_enabled()
    seen = []

    def failing():
        with by_its_own_code(nn.Linear(1, 1)):
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled() == before


class TwoNames(nn.Module):
    """One layer with parameters and buffers, under two names."""

    def __init__(self):
        super().__init__()
        self.one = self.same = nn.BatchNorm1d(3).eval()

    def forward(self, x):
        return self.same(torch.tanh(self.one(x)))


def expected_at(make, values, *inputs):
    """The outputs of a second model that really has these values."""
    other = built(make, torch.float64)
    with torch.no_grad():
        for name, value in values.items():
            dict([*other.named_parameters(), *other.named_buffers()])[name].copy_(value)
    return other(*inputs)


NAMES = [["one.weight"], ["one.weight", "one.bias"], ["one.running_mean"], ["one.bias", "one.running_var"]]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_a_layer_under_two_names_has_the_values_in_both_and_its_own_afterwards(names):
    model, x = built(TwoNames, torch.float64), normal(4, 3)
    before = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    values = {name: normal(*before[name].shape, seed=3).abs() for name in names}
    found = called_at(model, values, (x,))
    assert torch.equal(found, expected_at(TwoNames, values, x))
    assert not torch.equal(found, model(x))
    with pytest.raises(RuntimeError):
        called_at(model, values, (normal(4, 5),))
    after = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    assert all(after[name] is each for name, each in before.items())


def test_tied_parameters_follow_whichever_of_their_names_is_given():
    ids = labels(12, 5).reshape(4, 3)
    value = normal(5, 4, seed=3)
    for name in ("embed.weight", "decoder.weight"):
        model = built(Tied, torch.float64)
        found = called_at(model, {name: value}, (ids,))
        assert torch.equal(found, expected_at(Tied, {"embed.weight": value}, ids))
        assert model.embed.weight is model.decoder.weight


def test_gradients_and_vmap_go_through_and_leave_nothing_behind():
    model, x = built(TwoNames, torch.float64), normal(4, 3)
    weight = model.one.weight

    def total(value, row):
        return called_at(model, {"one.weight": value}, (), {"x": row.unsqueeze(0)}).square().sum()

    found = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(weight.detach(), x)
    for row, gradient in zip(x, found, strict=True):
        (expected,) = torch.autograd.grad(model(row.unsqueeze(0)).square().sum(), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert model.one.weight is model.same.weight is weight
