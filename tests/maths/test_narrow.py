"""16-bit rows: the rounding is as small as promised, at any scale, and agreement is measured truly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.maths.narrow import NARROW, agreement, narrowed, widened

ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("kind", NARROW.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(exponent=st.integers(-120, 120), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_rows_of_any_scale_keep_their_digits(kind, dtype, exponent, seed):
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2.0**exponent
    found = widened(*narrowed(values, kind), dtype)
    largest = values.abs().flatten(1).amax(1).view(-1, 1, 1)
    assert found.dtype == dtype
    assert bool(((found - values).abs() <= ERROR[kind] * largest).all())
    large = values.abs() > largest / 16
    assert bool(((found - values).abs()[large] <= ERROR[kind] * values.abs()[large]).all())


@pytest.mark.parametrize("kind", NARROW.values(), ids=str)
def test_rows_do_not_share_a_scale(kind):
    values = torch.tensor([[1e20, -3e19], [1e-30, 5e-31], [0.0, 0.0]])
    assert torch.allclose(widened(*narrowed(values, kind), torch.float32), values, rtol=4e-3, atol=0)


@pytest.mark.parametrize("kind", NARROW.values(), ids=str)
def test_what_is_not_finite_stays_so(kind):
    values = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [2.0, 3.0]])
    found = widened(*narrowed(values, kind), torch.float32)
    assert torch.equal(torch.isfinite(found).all(1), torch.tensor([False, False, True]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2,)])
def test_empty_rows_and_single_numbers_are_rows_too(shape):
    values = torch.ones(shape)
    assert torch.equal(widened(*narrowed(values, torch.float16), torch.float32), values)


def test_agreement_is_the_relative_norm_and_the_worst_rank_correlation():
    exact = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    moved = exact.clone()
    moved[1] = torch.tensor([1.0, 3.0, 2.0, 4.0])
    found = agreement(exact, moved)
    assert found["relative"] == pytest.approx(math.sqrt(2) / math.sqrt(60))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert agreement(exact, exact) == {"relative": 0.0, "spearman": 1.0}
