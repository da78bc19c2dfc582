"""Models in wrappings: compiled, parallel, sharded."""

import pytest
import torch
from torch import nn

from infl_cache.errors import BadInput
from infl_cache.maths.model import by_its_own_code, unwrapped


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
