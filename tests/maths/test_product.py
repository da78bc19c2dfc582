"""Products by the fast units equal plain ones, and bfloat16 adds in float32."""

import pytest
import torch

from infl_cache.maths import product as products
from infl_cache.maths.product import add_product, product


def pair(rows, columns, inner, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, inner, generator=generator, dtype=dtype), torch.randn(
        columns, inner, generator=generator, dtype=dtype
    )


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 1), (5, 1, 7), (0, 3, 4), (3, 0, 4), (20, 300, 513), (64, 64, 9000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_the_plain_one(shape, dtype):
    a, b = pair(*shape, dtype)
    found, expected = product(a, b), a.double() @ b.double().T
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * shape[2] ** 0.5)


def test_operands_may_be_slices_of_others():
    a, b = pair(8, 9, 40)
    torch.testing.assert_close(product(a[::2, 3:17], b[1:, 3:17]), a[::2, 3:17] @ b[1:, 3:17].T)
    torch.testing.assert_close(product(a.T[:14].T, b.T[:14].T), a[:, :14] @ b[:, :14].T)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 4), (5, 7, 0), (20, 300, 64), (3000, 900, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_added_whichever_way_is_faster(shape, dtype, in_place, monkeypatch):
    monkeypatch.setattr(products, "_has_mkl_kernels", lambda: in_place)
    (a, b), total = pair(*shape, dtype), torch.ones(shape[0], shape[1], dtype=dtype)
    add_product(total, a.T.contiguous().T, b)
    torch.testing.assert_close(total.double(), 1 + a.double() @ b.double().T, rtol=1e-5, atol=1e-5 * 64**0.5)


def test_without_onednn_it_is_plain(monkeypatch):
    a, b = pair(4, 5, 6)
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    assert torch.equal(product(a, b), a @ b.T)


def test_an_onednn_that_is_not_there_is_noticed(monkeypatch):
    products._has_onednn.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products._has_onednn()
    products._has_onednn.cache_clear()


def test_bfloat16_adds_in_float32_beyond_a_slab():
    """Ones in bfloat16 stop counting at 256 when the sum is bfloat16 too."""
    ones = torch.ones(2, 40 * products.SLAB, dtype=torch.bfloat16)
    found = product(ones, ones)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, 2), 40.0 * products.SLAB))


def test_bfloat16_is_near():
    a, b = pair(16, 16, 10000)
    found, expected = product(a.bfloat16(), b.bfloat16()).double(), a.double() @ b.double().T
    assert (found - expected).norm() / expected.norm() < 1e-2
