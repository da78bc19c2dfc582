"""Conjugate gradients for K right-hand sides at once (Hestenes & Stiefel 1952)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.solvers.base import FORGETFUL, Operator, Solution, Solve, norms

RESTARTS = 5
INDEFINITE = "met a direction of negative curvature; use ggn or more damping"


@dataclass(frozen=True)
class CG:
    """Equals `scipy.sparse.linalg.cg(rtol=tolerance)` per row; rows share each pass over the data.

    A row that has converged leaves the products. The recursion's residual is replaced by the true one at
    the end, and rows that rounding has carried astray are restarted from where they are.
    """

    tolerance: float = 1e-4
    max_iterations: int = 1000

    def check(self, size: int) -> None:
        """Any number of parameters will do."""

    def prepare(self, operator: Operator) -> Solve:
        """Nothing is done once."""
        return lambda rhs, keeper=FORGETFUL: self._solve(operator, rhs)

    def _solve(self, operator: Operator, rhs: Tensor) -> Solution:
        size = norms(rhs)
        value = torch.zeros_like(rhs)
        iterations = torch.zeros(len(rhs), dtype=torch.int64)
        residual = torch.where(size > 0, 1.0, 0.0).to(torch.float64)
        broken = ~torch.isfinite(size)
        indefinite = torch.zeros_like(broken)
        for attempt in range(RESTARTS):
            todo = torch.nonzero((residual > self.tolerance) & ~broken & ~indefinite).flatten()
            if not len(todo):
                break
            start = rhs[todo] - operator(value[todo]) if attempt else rhs[todo]
            left = self.max_iterations - int(iterations.max())
            change, steps, negative = self._recursion(operator, start, size[todo], left)
            value[todo] += change
            iterations[todo.cpu()] += steps
            indefinite[todo] = negative
            before = residual[todo]
            residual[todo] = norms(rhs[todo] - operator(value[todo])) / size[todo]
            broken |= ~torch.isfinite(residual)
            if iterations.max() >= self.max_iterations or not bool((residual[todo] < 0.5 * before).any()):
                break
        residual[broken] = torch.nan
        value[broken] = torch.nan
        converged = residual <= self.tolerance
        return Solution(value, residual, iterations, converged, self._reasons(converged, broken, indefinite))

    def _recursion(
        self, operator: Operator, start: Tensor, size: Tensor, max_steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CG from zero for the right-hand side `start`, stopping rows at `tolerance * size`."""
        value = torch.zeros_like(start)
        residual, direction = start.clone(), start.clone()
        squared = norms(residual).square()
        steps = torch.zeros(len(start), dtype=torch.int64)
        negative = torch.zeros_like(squared, dtype=torch.bool)
        active = torch.arange(len(start), device=start.device)
        for _ in range(max_steps):
            active = active[(squared[active].sqrt() > self.tolerance * size[active]) & ~negative[active]]
            active = active[torch.isfinite(squared[active])]
            if not len(active):
                break
            product = operator(direction[active])
            steps[active.cpu()] += 1
            curvature = _dots(direction[active], product)
            negative[active[curvature <= 0]] = True
            going = curvature > 0
            active, product, curvature = active[going], product[going], curvature[going]
            alpha = (squared[active] / curvature).to(start.dtype).unsqueeze(1)
            value[active] += alpha * direction[active]
            residual[active] -= alpha * product
            new = norms(residual[active]).square()
            beta = (new / squared[active]).to(start.dtype).unsqueeze(1)
            direction[active] = residual[active] + beta * direction[active]
            squared[active] = new
        return value, steps, negative

    def _reasons(self, converged: Tensor, broken: Tensor, indefinite: Tensor) -> tuple[str, ...]:
        words = []
        for fine, nonfinite, negative in zip(converged.tolist(), broken.tolist(), indefinite.tolist(), strict=True):
            if fine:
                words.append("")
            elif nonfinite:
                words.append("not finite")
            else:
                words.append(INDEFINITE if negative else "stopped at its iterations or at rounding")
        return tuple(words)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot products, accumulated in float64."""
    return (a.double() * b.double()).sum(1) if a.dtype == torch.float64 else _dots_of_floats(a, b)


def _dots_of_floats(a: Tensor, b: Tensor, piece: int = 1 << 20) -> Tensor:
    """float32 rows: products and sums in float64, a piece of the columns at a time."""
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], piece):
        total += (a[:, start : start + piece].double() * b[:, start : start + piece].double()).sum(1)
    return total
