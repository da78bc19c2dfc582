"""Estimates of the ends of an operator's spectrum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest_eigenvalue(operator: Callable[[Tensor], Tensor], size: int, like: Tensor, steps: int = 30) -> float:
    """An estimate of the largest eigenvalue's magnitude by power iteration (never above it, seldom 2 % below)."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, size, generator=generator, dtype=torch.float64).to(like)
    best = 0.0
    for _ in range(steps):
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
        vectors = operator(vectors)
        found = float(vectors.norm(dim=1).max())
        if abs(found - best) <= 1e-3 * found:
            return found
        best = found
    return best
