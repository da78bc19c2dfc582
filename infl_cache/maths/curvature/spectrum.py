"""Estimates of the ends of an operator's spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """What is known of an operator's eigenvalues: estimates of the ends, an estimate of their mean, products taken."""

    largest: float
    smallest: float
    mean: float
    steps: int


def spectrum_of(operator: Callable[[Tensor], Tensor], size: int, like: Tensor, steps: int = 24) -> Spectrum:
    r"""Estimates by `steps` products with one vector (Lanczos 1950; Golub & Meurant 2010, Matrices, Moments).

    From a random vector q of length 1 the three-term recurrence gives a tridiagonal matrix T whose extreme
    eigenvalues converge to those of the operator, from inside; both are moved outwards by the norm of their residuals
    :math:`|\beta_m s_m|`, within which an eigenvalue surely lies. :math:`q^T C q` is an unbiased estimate of the mean
    eigenvalue (Hutchinson 1990). Nothing is orthogonalised again: that makes copies of the ends, but does not move
    them.

    >>> matrix = torch.diag(torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64))
    >>> found = spectrum_of(lambda v: v @ matrix, 3, matrix)
    >>> round(found.largest, 6), round(found.smallest, 6)
    (4.0, -1.0)
    """
    generator = torch.Generator().manual_seed(0)
    # Not of signs: those are eigenvectors of matrices as plain as [[0, 1], [1, 0]], whose other end they hide.
    start = torch.randn(1, size, generator=generator, dtype=torch.float64)
    vector, before = (start / start.norm()).to(like), torch.zeros(1, size).to(like)
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, size)):
        product = operator(vector)
        diagonal.append(float((product.double() * vector.double()).sum()))
        product = product - diagonal[-1] * vector - (beside[-1] if beside else 0.0) * before
        beside.append(float(torch.linalg.vector_norm(product, dtype=torch.float64)))
        if not math.isfinite(beside[-1]):
            return Spectrum(math.nan, math.nan, diagonal[0], len(diagonal))
        if beside[-1] <= 1e-7 * max(map(abs, diagonal)):
            break
        before, vector = vector, product / beside[-1]
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(inner, 1) + torch.diag(inner, -1)
    values, within = torch.linalg.eigh(tridiagonal)
    off = beside[-1] * within[-1].abs()
    return Spectrum(float(values[-1] + off[-1]), float(values[0] - off[0]), diagonal[0], len(diagonal))
