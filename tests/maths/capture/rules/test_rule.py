"""What a layer sees with other weights, and its transpose, agree with the gradient of the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.maths.capture.rules import RULES
from tests.tasks import labels, normal

KINDS = {
    "linear": [{}],
    "embedding": [{"rows": 6, "padding_idx": None}, {"rows": 6, "padding_idx": 2}],
    "embedding_bag": [{"rows": 6, "padding_idx": p, "mean": mean} for p in (None, 2) for mean in (False, True)],
}
CASES = [(name, given) for name, every in KINDS.items() for given in every]


def drawn(name, size, n, wide, deep, dtype, seed):
    """Inputs (B, n, *in) and the shape of a weight."""
    if name == "linear":
        return normal(size, n, wide, dtype=dtype, seed=seed), (deep, wide)
    shape = (size, n) if name == "embedding" else (size, n, wide)
    count = size * n * (1 if name == "embedding" else wide)
    return labels(count, 6, seed).reshape(shape), (6, deep)


@pytest.mark.parametrize(("name", "given_settings"), CASES, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 5), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_seen_and_add_combined_are_transposes_and_agree_with_the_weight_gradient(
    name, given_settings, sizes, seed, dtype
):
    (size, n, wide, deep, count), rule = sizes, RULES[name]
    inputs, shape = drawn(name, size, n, wide, deep, dtype, seed)
    weights = normal(count, *shape, dtype=dtype, seed=seed + 1)
    grads = normal(size, count, n, deep, dtype=dtype, seed=seed + 2)
    seen = rule.seen(given_settings, weights, inputs)
    assert seen.shape == grads.shape
    total = torch.zeros_like(weights)
    rule.add_combined(given_settings, inputs, grads, total)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    built = torch.stack([rule.weight_gradient(given_settings, inputs, grads[:, m]) for m in range(count)])
    torch.testing.assert_close(total, built.sum(1), **near)
    torch.testing.assert_close((weights * total).sum(), (seen * grads).sum(), **near)
    torch.testing.assert_close(
        torch.einsum("bmno,bmno->bm", seen, grads), (built * weights.unsqueeze(1)).flatten(2).sum(2).T, **near
    )
    rule.add_combined(given_settings, inputs, grads, total)
    torch.testing.assert_close(total, 2 * built.sum(1), **near)  # it adds to what is there
