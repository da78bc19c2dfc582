r"""Block conjugate gradients with a preconditioner: all right-hand sides search one common space.

A test sample's system is solved in the Krylov space of all test samples of the block, so K of them need several times
fewer products than each for itself (O'Leary 1980, The block conjugate gradient algorithm). The directions of a step
are made orthonormal, and what depends on the others is dropped: the breakdown-free variant (Ji & Li 2017). A row that
has converged brings no new directions, but goes on with those of the others. With the preconditioner M:

.. math:: \alpha = (P^T A P)^{-1} P^T R, \quad X \mathrel{+}= P \alpha, \quad R \mathrel{-}= A P \alpha, \quad
          P \leftarrow \mathrm{orth}(M R - P (P^T A P)^{-1} (A P)^T M R)

with the last term for the directions of the last few steps, not of one only, against rounding.

Inner products are float64 whatever the vectors are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, State, norms, pieces

RESTARTS = 5
INDEFINITE = "met a direction of negative curvature; use ggn or more damping"
# A direction that is shorter than this once the others are taken out of it is one of rounding.
DEPENDENT = 1e-3
# New directions are made conjugate to those of so many steps: in float32 those of one step do not stay so by themselves
# (on a small CNN it then takes 16 steps where float64 takes 12).
HISTORY = 4

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PCG:
    """`C s = v` for K rows to a relative residual of `tolerance` each.

    `fit(operator)` gives the preconditioner, a symmetric positive definite approximation of the inverse; it is called
    once. The true residual decides at the end; rows that rounding has carried astray start again from where they are.
    """

    tolerance: float = 1e-4
    max_iterations: int = 1000
    fit: Callable[[Operator], Apply] | None = None

    def check(self, size: int) -> None:
        """Any number of parameters will do."""

    def prepare(self, operator: Operator) -> Solve:
        """Fit the preconditioner when it is first needed."""
        fitted: list[Apply] = []

        def solved(rhs: Tensor, keeper: Keeper = FORGETFUL) -> Solution:
            if not fitted:
                fitted.append(self.fit(operator) if self.fit is not None else lambda rows: rows)
            return self._solve(operator, fitted[0], rhs, keeper)

        return solved

    def _solve(self, operator: Operator, precondition: Apply, rhs: Tensor, keeper: Keeper) -> Solution:
        size = norms(rhs)
        broken = ~torch.isfinite(size)
        rows = torch.nonzero(~broken & (size > 0)).flatten()
        block = _Block(rhs[rows], self.tolerance, precondition)
        found = keeper.found()
        if found is not None:
            block.resume(found)
        while len(rows):
            block.run(operator, self.max_iterations, keeper)
            before, true = block.true, block.restart(operator)
            astray = (true > self.tolerance) & (true < 0.9 * before)
            if not bool(astray.any()) or block.steps >= self.max_iterations or block.restarts > RESTARTS:
                break
        value = torch.zeros_like(rhs)
        value[rows] = block.value
        value[broken] = torch.nan
        residual = torch.where(broken, torch.nan, 0.0).to(torch.float64)
        residual[rows] = block.true
        converged = residual <= self.tolerance
        iterations = torch.zeros(len(rhs), dtype=torch.int64)
        iterations[rows.cpu()] = block.taken
        reasons = tuple(
            "" if fine else "not finite" if wrong else block.reason
            for fine, wrong in zip(converged.tolist(), (~torch.isfinite(residual)).tolist(), strict=True)
        )
        return Solution(value, residual, iterations, converged, reasons)


class _Block:
    """The state of one block of rows: solution, residual, directions; `true` residuals as of the last restart."""

    def __init__(self, rhs: Tensor, tolerance: float, precondition: Apply) -> None:
        self._rhs, self._limit, self._precondition = rhs, tolerance * norms(rhs), precondition
        self.value, self._residual = torch.zeros_like(rhs), rhs.clone()
        self._directions: Tensor | None = None  # none yet since the last restart
        self.true = torch.ones(len(rhs), dtype=torch.float64, device=rhs.device)
        self.taken = torch.zeros(len(rhs), dtype=torch.int64)
        self._searched: list[tuple[Tensor, Tensor, Tensor]] = []
        self.steps = self.restarts = 0
        self.reason = "stopped at its iterations or at rounding"

    def state(self) -> State:
        """Everything that goes on from here."""
        assert self._directions is not None
        parts = {
            "value": self.value, "residual": self._residual, "directions": self._directions, "taken": self.taken,
            "true": self.true, "counts": torch.tensor([self.steps, self.restarts, len(self._searched)]),
        }  # fmt: skip
        for number, (before, image, lower) in enumerate(self._searched):
            parts |= {f"before{number}": before, f"image{number}": image, f"lower{number}": lower}
        return parts

    def resume(self, kept: State) -> None:
        """Go on from a state."""
        self.value, self._residual, self._directions = (
            kept[name].to(self._rhs) for name in ("value", "residual", "directions")
        )
        self.true = kept["true"].to(self.true)
        self.taken, (self.steps, self.restarts, searched) = kept["taken"], kept["counts"].tolist()
        self._searched = [
            (kept[f"before{number}"].to(self._rhs), kept[f"image{number}"].to(self._rhs),
             kept[f"lower{number}"].to(self._rhs.device))
            for number in range(searched)
        ]  # fmt: skip

    def run(self, operator: Operator, most: int, keeper: Keeper) -> None:
        """Iterate until every row's recursive residual is within its limit, or nothing is left to be had."""
        if self._directions is None:
            self._directions = orthonormal(self._precondition(self._residual[self._going()]))
        while self.steps < most and len(self._directions) and len(self._going()):
            directions = self._directions
            product = operator(directions)
            inner = products(directions, product)
            lower, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
            if int(failed) or not bool(torch.isfinite(inner).all()):
                self.reason = INDEFINITE
                break
            self.steps += 1
            self.taken[self._going().cpu()] += 1
            step = torch.cholesky_solve(products(directions, self._residual), lower).to(directions.dtype)
            self.value.addmm_(step.T, directions)
            self._residual.addmm_(step.T, product, alpha=-1)
            fresh = self._precondition(self._residual[self._going()])
            self._searched = [*self._searched, (directions, product, lower)][-HISTORY:]
            for before, image, factor in self._searched:
                back = torch.cholesky_solve(products(image, fresh), factor).to(directions.dtype)
                fresh = fresh.addmm(back.T, before, alpha=-1)
            self._directions = orthonormal(fresh)
            keeper.offer(self.state)

    def restart(self, operator: Operator) -> Tensor:
        """Replace the recursive residual by the true one; its relative norms, float64."""
        self.restarts += 1
        self._residual = self._rhs - operator(self.value)
        self._directions, self._searched = None, []
        self.true = norms(self._residual) / norms(self._rhs)
        return self.true

    def _going(self) -> Tensor:
        return torch.nonzero(norms(self._residual) > self._limit).flatten()


def products(a: Tensor, b: Tensor) -> Tensor:
    """`a b^T` in float64, for rows (K, P) and (M, P), a piece of the columns at a time."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for at in pieces(a):
        total.addmm_(a[:, at].double(), b[:, at].double().T)
    return total


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what the given rows (K, P) span, dependent ones left out.

    >>> orthonormal(torch.tensor([[2.0, 0.0], [4.0, 0.0]])).abs()
    tensor([[1., 0.]])
    """
    for bound in (DEPENDENT, 0.5):  # once to find out what depends on what, once more against rounding
        inner = products(rows, rows)
        scale = inner.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        inner = inner * scale.unsqueeze(1) * scale
        if not bool(torch.isfinite(inner).all()):
            return rows[:0]
        values, vectors = torch.linalg.eigh(inner)
        keep = values > bound**2 * values[-1:] if len(values) else values > 0
        rows = ((vectors[:, keep] * values[keep].rsqrt()).T * scale).to(rows.dtype) @ rows
    return rows
