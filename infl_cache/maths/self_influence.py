r"""How much a training sample's own loss hangs on that sample: large where the model had to memorise it.

.. math:: \mathrm{self}_i = g_i^T (C + \lambda I)^{-1} g_i, \qquad g_i = \nabla_\theta L(z_i)

Its influence on itself is :math:`-\mathrm{self}_i / n`, the paper's :math:`I_{up,loss}(z_i, z_i)` over n (Koh & Liang
2017, section 5.4, find wrong labels by it). There are three ways to it, equal where the system is the same: by a
solver, `s_i . g_i`; by an inverse that is at hand, without residuals; and, for the empirical Fisher matrix, by the Gram
matrix K of the gradients that it is the mean of,

.. math:: \mathrm{self}_i = (K_{ii} - |L^{-1} k_i|^2) / \lambda, \qquad L L^T = K + n \lambda I

with :math:`k_i` the inner products of :math:`g_i` with them (Woodbury), for which no vector of the parameters is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.capture import Forms
from infl_cache.maths.curvature import Curvature, Rows
from infl_cache.maths.curvature.jacobian import Jacobian
from infl_cache.maths.gram import ROOM, gram, squared_norms
from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Solve, relative_residual, row_dots
from infl_cache.maths.solvers.fisher import Fisher
from infl_cache.maths.tiled import forward

# Rows of a block whose residual is measured where none is needed to find the values.
CERTIFIED = 4
EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class SelfInfluence:
    """`value` (B,) float64, and its certificate: `residual` (NaN where not measured), `iterations`, `converged`.

    The residual is that of the system of s_i; where none is solved, what rounding may leave of the value, relative.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


def by_solver(solve: Solve, gradients: Tensor, keeper: Keeper = FORGETFUL) -> SelfInfluence:
    """`s_i . g_i` of gradients (B, n_params), each solved for as a right-hand side.

    Example:
        >>> from infl_cache.maths.solvers import Identity
        >>> by_solver(Identity().prepare(lambda v: v), torch.tensor([[3.0, 4.0]])).value
        tensor([25.], dtype=torch.float64)
    """
    found = solve(gradients, keeper)
    value = row_dots(found.value, gradients.to(found.value.dtype))
    return SelfInfluence(value, found.residual, found.iterations, found.converged)


def by_inverse(
    inverse: Callable[[Tensor], Tensor], operator: Callable[[Tensor], Tensor], gradients: Tensor, tolerance: float
) -> SelfInfluence:
    """`g_i . inverse(g_i)`; the true residual of the first few rows only, because one costs far more than the value."""
    solved = inverse(gradients)
    count = len(gradients)
    residual = torch.full((count,), torch.nan, dtype=torch.float64, device=gradients.device)
    first = slice(0, min(CERTIFIED, count))
    residual[first] = relative_residual(operator, solved[first], gradients[first])
    return SelfInfluence(
        row_dots(solved, gradients), residual, torch.ones(count, dtype=torch.int64), residual <= tolerance
    )


def by_norm(forms: Forms, gradients: Jacobian, room: int = ROOM) -> SelfInfluence:
    """`|g_i|^2`: no curvature, C + damping I being the identity; from factors, no row is built."""
    value = squared_norms(forms, gradients, room)
    fine = torch.isfinite(value)
    residual = torch.where(fine, 0.0, torch.nan).to(torch.float64)
    return SelfInfluence(value, residual, torch.zeros(len(value), dtype=torch.int64), fine)


def by_gram(solver: Fisher, operator: Curvature, rows: Rows, room: int = ROOM) -> Callable[[Jacobian], SelfInfluence]:
    """A function of gradients in the forms of `rows`, for the empirical Fisher matrix of `rows` plus the shift.

    The matrix is filled and factorised here, or taken from the tiles that were kept. Of a value near zero beside
    `K_ii / shift` rounding leaves little: that is its residual. A matrix that is not positive definite gives NaN.
    """
    tiles, sound = solver.factorised(operator, rows)

    def values(gradients: Jacobian) -> SelfInfluence:
        norm = squared_norms(rows.forms, gradients, room)
        if not sound:
            norm = torch.full_like(norm, torch.nan)
        right = []
        for part in rows.passes() if sound else ():
            operator.tick()
            right.append(gram(rows.forms, gradients, part, room))
        seen = torch.zeros_like(norm)
        for piece in forward(tiles, torch.cat(right, 1), operator.tick) if sound else ():
            seen += piece.square().sum(0)
        left = norm - seen
        # A gradient of zeros has none, exactly.
        residual = torch.where(norm == 0, 0.0, EPSILON * norm / left.clamp_min(0))
        return SelfInfluence(
            left / operator.shift, residual, torch.zeros(len(norm), dtype=torch.int64), residual <= solver.tolerance
        )

    return values
