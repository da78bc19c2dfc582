r"""Numbers in 16 bits: each row is scaled by a power of two before it is rounded, so that small rows keep their digits.

A row x is stored as :math:`y = \mathrm{round}(x\,2^{-e})` with one exponent e a row: scaling by a power of two is
exact, so the only error is the rounding: at most 2^-8 (bfloat16) or 2^-11 (float16, down to 2^-29 of the row's
largest) of a number.
Plain float16 would lose everything under 6e-8, which is where the gradients of converged samples are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infl_cache.maths.correlation import spearman

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The largest number of a row comes to lie in [2^(top - 1), 2^top): float16 has its range below 2^16.
TOP = {torch.bfloat16: 0, torch.float16: 15}


def narrowed(values: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows `(B, ...)` rounded to a 16-bit type, and their exponents e, int16 (B,).

    >>> rounded, exponent = narrowed(torch.tensor([[1e-12, 5e-13]]), torch.float16)
    >>> bool(torch.allclose(widened(rounded, exponent, torch.float32), torch.tensor([[1e-12, 5e-13]]), rtol=1e-3))
    True
    """
    flat = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    largest = flat.abs().amax(1) if flat.numel() else flat.new_zeros(len(flat))
    _, exponent = torch.frexp(largest)
    exponent = torch.where(torch.isfinite(largest) & (largest > 0), exponent - TOP[kind], 0)
    shape = (-1, *[1] * (values.dim() - 1))
    return torch.ldexp(values, -exponent.view(shape)).to(kind), exponent.to(torch.int16)


def widened(rounded: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `narrowed`, up to the rounding."""
    shape = (-1, *[1] * (rounded.dim() - 1))
    return torch.ldexp(rounded.to(dtype), exponent.to(torch.int32).view(shape))


def agreement(exact: Tensor, rounded: Tensor) -> dict[str, float]:
    """How well rounded influences `(M, B)` agree with the exact ones.

    `relative` is ||rounded - exact|| / ||exact||; `spearman` is the lowest rank correlation of a row.
    """
    relative = float((rounded - exact).norm() / exact.norm().clamp_min(1e-300))
    lowest = min(
        (1.0 if torch.equal(a, b) else spearman(a, b) for a, b in zip(exact, rounded, strict=True)), default=math.nan
    )
    return {"relative": relative, "spearman": lowest}
