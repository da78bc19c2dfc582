r"""The empirical Fisher matrix, inverted exactly through the Gram matrix of the training gradients.

.. math:: (G^T G / n + \lambda I)^{-1} v = (v - G^T (G G^T + n \lambda I)^{-1} G v) / \lambda

with G (n, P) the gradients of the n training samples: a matrix of n x n takes the place of one of P x P (Woodbury), and
no product with the curvature is needed to build it. The true residual decides, and what is above the tolerance is
refined: solved for once more with the residual on the right-hand side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.errors import BadInput
from infl_cache.maths.curvature import Curvature, Rows
from infl_cache.maths.curvature.jacobian import Cut, add_transposed, times
from infl_cache.maths.gram import ROOM, gram
from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, norms
from infl_cache.maths.tiled import InMemory, Tiles, all_and_there, factorise, fill, matrix_bytes, solved, tile_side
from infl_cache.progress import progress

REFINEMENTS = 3
INDEFINITE = "the Gram matrix is not positive definite to rounding; use more damping"
ROUNDING = "rounding leaves no more; use more damping or --solve-dtype float64"

# For a matrix of n rows in tiles of `side` rows: where they are kept.
Keep = Callable[[int, int], Tiles]


@dataclass(frozen=True)
class Fisher:
    """Equals a dense float64 solve with `G^T G / n + shift I` for any number of parameters; P does not matter, n does.

    The Gram matrix takes 4 n^2 bytes, and its factorisation n^3 / 3 multiplications, once a run. It is held in memory
    where three times that fits into `memory` bytes, else in the tiles that `keep` gives, from which a killed run goes
    on. `side` is the number of rows in a tile, `panel` the number of samples held while the others pass by.
    """

    tolerance: float = 1e-4
    memory: int | None = None
    keep: Keep | None = None
    side: int | None = None
    panel: int | None = None
    show: bool = False

    def check(self, size: int) -> None:
        """Any number of parameters will do."""

    def prepare(self, operator: Operator) -> Solve:
        """Fill and factorise when first needed; the operator must be a `Curvature` with rows, its shift positive."""
        if not isinstance(operator, Curvature) or operator.rows is None:
            raise TypeError(f"expected a Curvature with gradient rows, found {type(operator).__name__}")
        require_shift(operator.shift)
        curvature, rows = operator, operator.rows
        made: list[_Inverse] = []

        def solve(rhs: Tensor, keeper: Keeper = FORGETFUL) -> Solution:
            del keeper
            if not made:
                made.append(self._inverse(curvature, rows))
            if not made[0].sound:
                nothing, none = torch.full_like(rhs, torch.nan), torch.full_like(norms(rhs), torch.nan)
                count = torch.zeros(len(rhs), dtype=torch.int64)
                return Solution(nothing, none, count, none <= self.tolerance, (INDEFINITE,) * len(rhs))
            return self._solve(curvature, made[0], rhs)

        return solve

    def _inverse(self, operator: Curvature, rows: Rows) -> _Inverse:
        return _Inverse(operator, rows, *self.factorised(operator, rows))

    def factorised(self, operator: Curvature, rows: Rows) -> tuple[Tiles, bool]:
        """Tiles of L with `L L^T = G G^T + n shift I`, and whether that was positive definite."""
        n = operator.n_train
        room = ROOM if self.memory is None else max(2**20, min(ROOM, self.memory // 16))
        # A panel is a copy of its samples where these do not stay in memory anyway.
        panel = self.panel or (n if self.memory is None else self.memory // 6 // max(1, rows.row_bytes))
        side = self.side or tile_side(n, panel, self.memory)
        fits = self.memory is None or 3 * matrix_bytes(n, side) <= self.memory
        tiles = InMemory(side) if fits or self.keep is None else self.keep(n, side)
        every, there = all_and_there(tiles, n)
        with progress("fisher", every, there, "tile", self.show) as bar:

            def done() -> None:
                bar.advance(1)
                operator.tick()

            fill(tiles, n, rows.passes, lambda a, b: gram(rows.forms, a, b, room), panel, done)
            sound = factorise(tiles, n, n * operator.shift, done)
        return tiles, sound

    def _solve(self, operator: Curvature, inverse: _Inverse, rhs: Tensor) -> Solution:
        size = norms(rhs).clamp_min(torch.finfo(torch.float64).tiny)
        value = inverse(rhs)
        left = operator(value).neg_().add_(rhs)
        residual = norms(left) / size
        iterations = torch.ones(len(rhs), dtype=torch.int64)
        todo = torch.nonzero(residual > self.tolerance).flatten()
        left = left[todo]
        for _ in range(REFINEMENTS):
            if not len(todo):
                break
            better = inverse(left).add_(value[todo])
            left = operator(better).neg_().add_(rhs[todo])
            now = norms(left) / size[todo]
            iterations[todo.cpu()] += 1
            gained = now < residual[todo]
            value[todo[gained]], residual[todo[gained]] = better[gained], now[gained]
            again = gained & (now > self.tolerance)
            todo, left = todo[again], left[again]
        broken = ~torch.isfinite(residual)
        value[broken], residual[broken] = torch.nan, torch.nan
        converged = residual <= self.tolerance
        reasons = tuple(
            "" if fine else "not finite" if wrong else ROUNDING
            for fine, wrong in zip(converged.tolist(), broken.tolist(), strict=True)
        )
        return Solution(value, residual, iterations, converged, reasons)


def require_shift(shift: float) -> None:
    """`BadInput` unless there is something to divide by."""
    if not shift > 0:
        raise BadInput(
            f"solver fisher: expected damping (with the task's weight decay) above zero, found {shift:g};\n"
            "the Fisher matrix of fewer samples than parameters is singular: give some --damping, or auto"
        )


class _Inverse:
    """`v -> (v - G^T (G G^T + n shift I)^-1 G v) / shift` by the factor; the inner vectors are float64."""

    def __init__(self, operator: Curvature, rows: Rows, tiles: Tiles, sound: bool) -> None:
        self._operator, self._rows, self._tiles, self.sound = operator, rows, tiles, sound

    def __call__(self, vectors: Tensor) -> Tensor:
        forms, passes, tick = self._rows.forms, self._rows.passes, self._operator.tick
        cut, total = Cut.of(forms, vectors), Cut.zeros(forms, vectors)
        seen = []
        for jacobian in passes():
            tick()
            seen.append(times(forms, jacobian, cut).squeeze(2).double())
        weights = solved(self._tiles, torch.cat(seen).T, tick).to(vectors.dtype)
        at = 0
        for jacobian in passes():
            tick()
            coefficients = weights[:, at : at + jacobian.size].T.unsqueeze(2).contiguous()
            add_transposed(forms, jacobian, coefficients, total)
            at += jacobian.size
        return total.joined(forms).neg_().add_(vectors).div_(self._operator.shift)
