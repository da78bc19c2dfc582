"""Parameters as one flat vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infl_cache import BadInput
from infl_cache.maths.params import Parameters, flatten, select, unflatten
from tests.tasks import Tied, mlp

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shapes, st.lists(st.integers(1, 3), max_size=2))
def test_unflatten_is_the_inverse_of_flatten(found, lead):
    parameters = Parameters(tuple(f"p{i}" for i in range(len(found))), tuple(found))
    vectors = torch.arange(parameters.size * torch.Size(lead).numel(), dtype=torch.float64)
    vectors = vectors.reshape(*lead, parameters.size)
    pieces = unflatten(parameters, vectors)
    assert [tuple(pieces[name].shape) for name in parameters.names] == [(*lead, *shape) for shape in found]
    assert torch.equal(flatten(parameters, pieces, leading=len(lead)), vectors)
    for name in parameters.names:
        assert torch.equal(vectors[..., parameters.slice_of(name)], pieces[name].reshape(*lead, -1))


def test_the_order_is_that_of_the_model_whatever_the_patterns():
    model = mlp().model
    names = [name for name, _ in model.named_parameters()]
    assert list(select(model, None).names) == names
    assert select(model, ["5.*", "0.weight"]).names == ("0.weight", "5.weight", "5.bias")
    assert select(model, ["*"]) == select(model, None)


def test_sizes_and_places():
    parameters = select(nn.Linear(3, 2), None)
    assert (parameters.sizes, parameters.size) == ((6, 2), 8)
    assert (parameters.slice_of("weight"), parameters.slice_of("bias")) == (slice(0, 6), slice(6, 8))
    assert parameters.shape_of("weight") == (2, 3)


def test_frozen_parameters_are_left_out_unless_they_are_named():
    model = mlp().model
    model[0].requires_grad_(False)
    assert select(model, None).names == ("3.weight", "5.weight", "5.bias")
    assert select(model, ["0.bias", "5.bias"]).names == ("0.bias", "5.bias")
    assert not model[0].bias.requires_grad


def test_one_pattern_may_be_given_as_text():
    assert select(mlp().model, "5.*").names == ("5.weight", "5.bias")


def test_a_shared_parameter_is_one_parameter_under_any_of_its_names():
    model = Tied()
    assert select(model, None).names == ("embed.weight", "first.weight", "first.bias", "second.bias")
    assert select(model, ["decoder.weight"]).names == ("embed.weight",)
    assert select(model, ["second.*"]).names == ("first.weight", "second.bias")


def test_a_pattern_that_matches_nothing_is_refused_and_names_what_there_is():
    with pytest.raises(BadInput, match=r"parameters: 'head\.\*' matches none of 0\.weight, 0\.bias"):
        select(mlp().model, ["0.*", "head.*"])


@pytest.mark.parametrize("patterns", [None, []])
def test_no_parameter_selected_is_refused(patterns):
    with pytest.raises(BadInput, match="expected at least one selected, found none that requires a gradient"):
        select(mlp().model.requires_grad_(False), patterns)


def test_parameters_of_two_types_are_refused_until_one_is_selected():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(BadInput, match=r"expected one floating type, found \['torch.float32', 'torch.float64'\]"):
        select(model, None)
    assert select(model, ["1.*"]).names == ("1.weight", "1.bias")


def test_parameters_that_are_not_real_numbers_are_refused():
    model = nn.Module()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(BadInput, match=r"expected one floating type, found \['torch.complex64'\]"):
        select(model, None)
