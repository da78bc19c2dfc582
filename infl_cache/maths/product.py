r"""The matrix product that everything of stage 3 comes down to: :math:`A B^T`, float32 out, on the fastest units.

On a CPU float32 goes through oneDNN where PyTorch has it: on processors that MKL has no kernels for it is about twice
as fast as `torch.mm`, to the same accuracy (scripts/bench_influence.py shows both). Where MKL has them, what is added
to a sum is added by MKL, in place. bfloat16 operands use the matrix units there are (AMX, AVX-512, tensor cores). These
add in float32; where PyTorch can only give the sum back in bfloat16, columns are cut into slabs whose sums are added in
float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from infl_cache.processor import made_by_intel

# Numbers of a product that is made beside what it is added to.
ROOM = 2**21
# Columns whose sum is rounded to bfloat16 once, where no float32 result can be had.
SLAB = 4096


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a (m, k) @ b (n, k)^T`, in float32 for bfloat16 operands, else in their own type.

    >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[11.,  2.]])
    """
    if a.dtype == torch.bfloat16:
        return _narrow_product(a, b)
    if a.dtype == torch.float32 and a.device.type == "cpu" and min(*a.shape, *b.shape) > 1 and _has_onednn():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return found
    return a @ b.T


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a (m, k) @ b (n, k)^T` to `total` (m, n), some rows after the others where the product is made beside it.

    >>> total = torch.ones(1, 2)
    >>> add_product(total, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> total
    tensor([[12.,  3.]])
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or _has_mkl_kernels():
        total.addmm_(a, b.T)
        return
    step, b = max(1, ROOM // max(1, len(b))), b.contiguous()
    for start in range(0, len(a), step):
        total[start : start + step] += product(a[start : start + step], b)


def _narrow_product(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        wide: Tensor = torch.mm(a, b.T, out_dtype=torch.float32)
        return wide
    total = torch.zeros(len(a), len(b), device=a.device)
    for start in range(0, a.shape[1], SLAB):
        at = slice(start, start + SLAB)
        total += a[:, at] @ b[:, at].T
    return total


def _has_mkl_kernels() -> bool:
    """Whether MKL has kernels for this processor: sums in place are then faster than products beside them."""
    return made_by_intel() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


@functools.cache
def _has_onednn() -> bool:
    """Whether PyTorch's own door to oneDNN is there and does what is expected of it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    a, b = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(2, 4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, a @ b.T)
