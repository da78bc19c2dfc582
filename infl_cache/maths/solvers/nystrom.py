r"""A preconditioner from the top of the spectrum: what conjugate gradients would spend most of their steps on.

With U the leading eigenvectors of a randomised Nystrom approximation of C and :math:`\hat\lambda_1 \ge \dots \ge
\hat\lambda_r` its eigenvalues,

.. math:: M^{-1} = I + U\, \mathrm{diag}\!\Big(\frac{\hat\lambda_r + \mu}{\hat\lambda_i + \mu} - 1\Big)\, U^T

takes the eigenvalues above :math:`\hat\lambda_r` down to it and leaves all others, among them the many that are the
damping :math:`\mu` itself, where they are (Frangella, Tropp & Udell 2023, Randomized Nystrom preconditioning). C may be
that of a subsample of the training set, which makes the approximation cost a small part of one solve.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infl_cache.maths.curvature import Curvature
from infl_cache.maths.solvers.pcg import orthonormal, products

# Of the largest eigenvalue: smaller ones are rounding.
NEGLIGIBLE = 1e-6


def nystrom(operator: Curvature, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (r, P) and eigenvalues (r,) of the curvature without its shift, r at most `rank`.

    Two block products: one to turn random rows towards the leading ones, one to measure.
    """
    like = next(operator.task.model.parameters())
    size = operator.parameters.size
    start = torch.randn(min(rank, size), size, generator=torch.Generator().manual_seed(seed), dtype=operator.dtype)
    basis = orthonormal(start.to(like.device))
    basis = orthonormal(operator(basis) - operator.shift * basis)
    image = operator(basis) - operator.shift * basis
    inner = products(basis, image)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    keep = values > NEGLIGIBLE * values[-1:] if len(values) else values > 0
    half = (vectors[:, keep] * values[keep].rsqrt()).T.to(image.dtype) @ image  # C is about half^T half
    values, vectors = torch.linalg.eigh(products(half, half))
    leading = ((vectors * values.rsqrt()).T.to(half.dtype) @ half).flip(0)
    return leading, values.flip(0)


def preconditioner(leading: Tensor, values: Tensor, shift: float) -> Callable[[Tensor], Tensor]:
    """`v -> M^-1 v` for rows v (K, P)."""
    if not len(values):
        return lambda rows: rows
    scale = ((values[-1] + shift) / (values + shift) - 1).to(leading.dtype)
    return lambda rows: rows + (rows @ leading.T * scale) @ leading
