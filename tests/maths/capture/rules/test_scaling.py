"""The rules for norms and PReLU: what multiplies the weight, times what comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infl_cache.maths.capture.rules import RULES, rule_for
from tests.driving import check_rule, close, gradients_by_rule
from tests.tasks import around, built, normal
from tests.twins import layer_gradients

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
small = st.integers(1, 3)
PATTERNS = st.sampled_from([None, ["layer.weight"], ["layer.bias"]])


def shaken(make):
    """A layer in eval mode whose parameters and statistics are not those that all layers begin with."""
    layer = built(make, torch.float64).eval()
    state = layer.state_dict()
    for place, (name, each) in enumerate(state.items()):
        if each.is_floating_point():
            noise = normal(*each.shape, seed=30 + place)
            each.copy_(noise.square() + 0.5 if name == "running_var" else noise)
    return layer


@st.composite
def element_norms(draw):
    # One element alone is normalised to zero but for rounding: there is nothing to compare.
    shape, bias = [draw(st.integers(2, 3)), *draw(st.lists(small, max_size=1))], draw(st.booleans())
    if draw(st.booleans()):
        return shaken(lambda: nn.RMSNorm(shape, eps=draw(st.sampled_from([None, 1e-3])))), tuple(shape)
    return shaken(lambda: nn.LayerNorm(shape, bias=bias)), tuple(shape)


@st.composite
def channel_norms(draw):
    """A norm over groups, instances or a batch's running statistics, with the shape of what it takes."""
    kind, axes, channels = (
        draw(st.sampled_from(["group", "instance", "batch"])),
        draw(small),
        2 * draw(st.integers(1, 2)),
    )
    places = [draw(st.integers(2, 3)) for _ in range(axes)]
    if kind == "group":
        shape = places if channels == 2 or draw(st.booleans()) else []
        groups = draw(st.sampled_from([1, 2, *([channels] if shape else [])]))
        return shaken(lambda: nn.GroupNorm(groups, channels)), (channels, *shape)
    if kind == "instance":
        kept = draw(st.booleans())
        return shaken(lambda: INSTANCE[axes - 1](channels, affine=True, track_running_stats=kept)), (channels, *places)
    shape = [] if axes == 1 and draw(st.booleans()) else places
    return shaken(lambda: BATCH[axes - 1](channels)), (channels, *shape)


@st.composite
def slopes(draw):
    channels, places = draw(small), draw(st.lists(small, max_size=2))
    return shaken(lambda: nn.PReLU(draw(st.sampled_from([1, channels])))), (channels, *places)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(element_norms() | channel_norms() | slopes(), st.integers(1, 4))
def test_the_rules_give_the_gradient_of_any_layer(made, size):
    layer, shape = made
    x = normal(size, *shape)
    weighting = normal(*layer(x).shape, seed=3)
    found, expected = gradients_by_rule(layer, x, weighting), layer_gradients(layer, x, weighting)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        close(found[name], gradient)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    element_norms() | channel_norms() | slopes(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2),
    st.sampled_from(["first", "second", "folded"]), PATTERNS,
)  # fmt: skip
def test_whatever_the_calls_and_the_chosen_parameters(made, count, calls, positions, way, chosen):
    layer, shape = made
    rule = rule_for(layer)
    if chosen == ["layer.bias"] and getattr(layer, "bias", None) is None:
        chosen = None
    if way == "second" and rule.name != "element_norm":  # the second axis is that of the channels
        way = "first"
    between = () if way == "first" else (positions,)
    check_rule(around(layer, normal(count, calls, *between, *shape), way, parameters=chosen), rule.name)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_is_left_out(frozen):
    layer = shaken(lambda: nn.GroupNorm(2, 4))
    getattr(layer, frozen).requires_grad_(False)
    check_rule(around(layer, normal(4, 1, 4, 3)), "channel_norm")


def test_their_gradients_are_small_and_kept_as_plain_rows():
    assert not any(RULES[name].stored for name in ("element_norm", "channel_norm", "prelu"))
    with pytest.raises(NotImplementedError, match="prelu has no direct contraction"):
        RULES["prelu"].products({"one": True}, normal(2, 1), normal(3, 1, 2), normal(3, 1, 2))
    assert RULES["prelu"].operations((1, 6), (1, 6), 3) == (3, None)


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(3), "element_norm"),
        (nn.LayerNorm(3, bias=False), "element_norm"),
        (nn.LayerNorm(3, elementwise_affine=False), None),
        (nn.RMSNorm(3), "element_norm"),
        (OwnForward(3), None),
        (nn.GroupNorm(1, 2), "channel_norm"),
        (nn.GroupNorm(1, 2, affine=False), None),
        (nn.InstanceNorm2d(2, affine=True), "channel_norm"),
        (nn.InstanceNorm2d(2), None),
        (nn.BatchNorm2d(2), "channel_norm"),
        (nn.BatchNorm2d(2, affine=False), None),
        (nn.BatchNorm2d(2, track_running_stats=False), None),
        (nn.SyncBatchNorm(2), None),
        (nn.PReLU(2), "prelu"),
        (nn.LeakyReLU(), None),
    ],
    ids=str,
)
def test_the_rules_hold_for_layers_with_weights_and_statistics_of_their_own(module, expected):
    rule = rule_for(module)
    assert (rule and rule.name) == expected
