"""The rule for convolutions: from the image, not its patches, whatever stride, padding, dilation and groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from infl_cache.maths.capture.rules import RULES, convolution, rule_for
from tests.driving import check_rule, close, gradients_by_rule
from tests.tasks import around, built, normal
from tests.twins import layer_gradients

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ["zeros", "reflect", "replicate", "circular"]
PATTERNS = [None, ["layer.weight"], ["layer.bias"]]


@st.composite
def convolutions(draw, most_axes=3, channels=1, dtype=torch.float64):
    """A convolution with the shape (channels, *image) of what it takes; a group has `channels` or twice that."""
    axes, groups = draw(st.integers(1, most_axes)), draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    kernel, dilation, mode = each(1, 3), each(1, 3), draw(st.sampled_from(MODES))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * axes if padding == "same" else each(1, 3)
    if padding == "numbers":
        padding = each(0, 2)
    reach = [(length - 1) * step for length, step in zip(kernel, dilation, strict=True)]
    before = [0] * axes if padding == "valid" else [-(-r // 2) for r in reach] if padding == "same" else padding
    image = tuple(
        max(1, r + 1 - 2 * pad, pad + 1) + more for r, pad, more in zip(reach, before, each(0, 2), strict=True)
    )
    n_in, n_out = (groups * channels * draw(st.integers(1, 2)) for _ in range(2))
    bias = draw(st.booleans())
    layer = built(lambda: KINDS[axes - 1](n_in, n_out, kernel, stride, padding, dilation, groups, bias, mode), dtype)
    return layer, (n_in, *image)


@st.composite
def transposed(draw, most_axes=3, channels=1, dtype=torch.float64):
    """A transposed convolution with the shape of what it takes."""
    axes, groups = draw(st.integers(1, most_axes)), draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 3), each(0, 2)
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    image = each(1, 4)
    assume(all(
        (i - 1) * s - 2 * p + d * (k - 1) + m + 1 > 0
        for i, s, p, d, k, m in zip(image, stride, padding, dilation, kernel, more, strict=True)
    ))  # fmt: skip
    n_in, n_out = (groups * channels * draw(st.integers(1, 2)) for _ in range(2))
    bias = draw(st.booleans())
    kind = TRANSPOSED[axes - 1]
    layer = built(lambda: kind(n_in, n_out, kernel, stride, padding, more, groups, bias, dilation), dtype)
    return layer, (n_in, *image)


def agrees_with_the_loop(layer, x):
    weighting = normal(*layer(x).shape, seed=3)
    found, expected = gradients_by_rule(layer, x, weighting), layer_gradients(layer, x, weighting)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        close(found[name], gradient)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions() | transposed(), st.integers(1, 3), st.sampled_from([0, 10**6]), st.sampled_from([1, 10**6]))
def test_the_rule_gives_the_gradient_of_any_convolution_whichever_way_it_is_made(made, size, many, at_once):
    layer, shape = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "MANY_PATCHES", many)
        patch.setattr(convolution, "PATCHES_AT_ONCE", at_once)
        agrees_with_the_loop(layer, normal(size, *shape))


def refused(*_):
    raise AssertionError("expected one convolution whose groups are the samples")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    convolutions(channels=convolution.BLOCK, dtype=torch.float32)
    | transposed(channels=convolution.BLOCK, dtype=torch.float32),
    st.integers(1, 3),
)
def test_in_float32_channels_in_sixteens_go_by_groups_and_agree_with_the_loop(made, size):
    layer, shape = made
    x = normal(size, *shape, dtype=torch.float32)
    weighting = normal(*layer(x).shape, seed=3, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_by_patches", refused)
        patch.setattr(convolution, "_one_by_one", refused)
        found = gradients_by_rule(layer, x, weighting)
    for name, gradient in layer_gradients(layer, x, weighting).items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == gradient.shape
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm())


@pytest.mark.parametrize("n_in", [16, 24])
def test_only_channels_in_sixteens_go_by_groups(n_in, monkeypatch):
    layer = built(lambda: nn.Conv2d(n_in, 16, 3), torch.float32)
    x, weighting = normal(2, n_in, 5, 5, dtype=torch.float32), normal(2, 16, 3, 3, dtype=torch.float32)
    monkeypatch.setattr(convolution, "_by_patches" if n_in == 16 else "_as_groups", refused)
    assert gradients_by_rule(layer, x, weighting)["weight"].shape == (2, 16, n_in, 3, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    convolutions(2) | transposed(2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2),
    st.sampled_from(["first", "folded"]), st.booleans(), st.sampled_from(PATTERNS),
)  # fmt: skip
def test_whatever_the_calls_and_the_chosen_parameters(made, count, calls, positions, way, inplace, chosen):
    layer, shape = made
    assume(layer.bias is not None or chosen != ["layer.bias"])
    between = (positions,) if way == "folded" else ()
    task = around(layer, normal(count, calls, *between, *shape), way, inplace, parameters=chosen)
    check_rule(task, "convolution")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_is_left_out(frozen):
    layer = built(lambda: nn.Conv2d(2, 4, 2, groups=2), torch.float64)
    getattr(layer, frozen).requires_grad_(False)
    check_rule(around(layer, normal(4, 1, 2, 3, 3)), "convolution")


def test_a_large_image_is_taken_sample_by_sample_and_is_right():
    layer = built(lambda: nn.Conv2d(16, 4, 3, padding=1), torch.float64)
    assert convolution.MANY_PATCHES < 16 * 9 * 40 * 40
    agrees_with_the_loop(layer, normal(2, 16, 40, 40))


def test_the_image_is_stored_and_not_its_patches():
    layer = built(lambda: nn.Conv2d(3, 4, 3, padding=1), torch.float64)
    assert RULES["convolution"].stored
    found = gradients_by_rule(layer, normal(2, 3, 5, 5), normal(2, 4, 5, 5, seed=2))
    assert found["weight"].shape == (2, 4, 3, 3, 3)
    assert RULES["convolution"].operations((1, 3, 5, 5), (1, 4, 5, 5), 108) == (25 * 108, None)


def test_settings_are_plain_data():
    layer = nn.Conv2d(4, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=2, groups=2, padding_mode="circular")
    assert RULES["convolution"].settings(layer) == {
        "kernel_size": [2, 3], "stride": [1, 2], "dilation": [2, 2], "pads": [0, 0, 1, 1], "mode": "circular",
        "groups": 2, "transposed": False,
    }  # fmt: skip


class OwnForward(nn.Conv1d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        *((kind(2, 2, 1), True) for kind in (*KINDS, *TRANSPOSED)),
        (nn.Conv1d(2, 2, 1, bias=False), True),
        (OwnForward(2, 2, 1), False),
        (weight_norm(nn.Conv1d(2, 2, 1)), False),
        (nn.Unfold(2), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_rule_holds_for_what_computes_as_torchs_own_do(module, expected):
    assert (rule_for(module) is RULES["convolution"]) is expected
