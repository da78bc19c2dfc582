"""Conjugate gradients for K right-hand sides at once (Hestenes & Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, State, norms, row_dots

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
        return lambda rhs, keeper=FORGETFUL: self._solve(operator, rhs, keeper)

    def _solve(self, operator: Operator, rhs: Tensor, keeper: Keeper) -> Solution:
        size = norms(rhs)
        value = torch.zeros_like(rhs)
        iterations = torch.zeros(len(rhs), dtype=torch.int64)
        residual = torch.where(size > 0, 1.0, 0.0).to(torch.float64)
        broken = ~torch.isfinite(size)
        indefinite = torch.zeros_like(broken)
        first, found = 0, keeper.found()
        if found is not None:
            first = int(found["attempt"])
            value, iterations, residual = found["before"].to(rhs), found["iterations"], found["residual"].to(size)
            indefinite = found["indefinite"].to(broken)
        for attempt in range(first, RESTARTS):
            todo = torch.nonzero((residual > self.tolerance) & ~broken & ~indefinite).flatten()
            if not len(todo):
                break
            outer = {
                "attempt": torch.tensor(attempt), "before": value, "iterations": iterations, "residual": residual,
                "indefinite": indefinite,
            }  # fmt: skip
            start = rhs[todo] - operator(value[todo]) if attempt else rhs[todo]
            left = self.max_iterations - int(iterations.max())
            inner = _Recursion(start, size[todo], self.tolerance, found if attempt == first else None)
            inner.run(operator, left, lambda now, outer=outer: keeper.offer(lambda: {**outer, **now()}))  # type: ignore[misc]
            value = value.index_add(0, todo, inner.value)
            iterations = iterations.index_add(0, todo.cpu(), inner.steps)
            indefinite = indefinite.index_put((todo,), inner.negative)
            before = residual[todo]
            now = norms(rhs[todo] - operator(value[todo])) / size[todo]
            residual = residual.index_put((todo,), now)
            broken |= ~torch.isfinite(residual)
            if iterations.max() >= self.max_iterations or not bool((now < 0.5 * before).any()):
                break
        residual[broken] = torch.nan
        value[broken] = torch.nan
        converged = residual <= self.tolerance
        return Solution(value, residual, iterations, converged, self._reasons(converged, broken, indefinite))

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


class _Recursion:
    """CG from zero for K right-hand sides, stopping rows at `tolerance * size`; only rows still going are held."""

    def __init__(self, start: Tensor, size: Tensor, tolerance: float, kept: State | None) -> None:
        self._limit = tolerance * size
        if kept is None:
            self.value = torch.zeros_like(start)
            self.steps = torch.zeros(len(start), dtype=torch.int64)
            self.negative = torch.zeros_like(size, dtype=torch.bool)
            self._active = torch.arange(len(start), device=start.device)
            self._x, self._r, self._p = torch.zeros_like(start), start.clone(), start.clone()
            self._squared = norms(start).square()
        else:
            self.value, self.steps, self.negative = (
                kept["value"].to(start),
                kept["steps"],
                kept["negative"].to(start.device),
            )
            self._active, self._squared = kept["active"].to(start.device), kept["squared"].to(size)
            self._x, self._r, self._p = (kept[name].to(start) for name in ("x", "r", "p"))

    def state(self) -> State:
        """Everything that goes on from here."""
        return {
            "value": self.value, "steps": self.steps, "negative": self.negative, "active": self._active,
            "squared": self._squared, "x": self._x, "r": self._r, "p": self._p,
        }  # fmt: skip

    def run(self, operator: Operator, max_steps: int, offer: Callable[[Callable[[], State]], None]) -> None:
        """Iterate until no row is left, or one has taken `max_steps`."""
        while True:
            self._retire()
            if not len(self._active) or int(self.steps.max()) >= max_steps:
                break
            product = operator(self._p)
            self.steps[self._active.cpu()] += 1
            curvature = row_dots(self._p, product)
            self.negative[self._active[curvature <= 0]] = True
            alpha = torch.where(curvature > 0, self._squared / curvature, 0.0).to(product.dtype).unsqueeze(1)
            self._x.addcmul_(alpha, self._p)
            self._r.addcmul_(alpha, product, value=-1)
            new = norms(self._r).square()
            self._p.mul_((new / self._squared).to(product.dtype).unsqueeze(1)).add_(self._r)
            self._squared = new
            offer(self.state)
        self.value[self._active] = self._x

    def _retire(self) -> None:
        """Put rows that are done, not finite or of negative curvature aside."""
        going = (self._squared.sqrt() > self._limit[self._active]) & torch.isfinite(self._squared)
        going &= ~self.negative[self._active]
        if not bool(going.all()):
            self.value[self._active[~going]] = self._x[~going]
            self._x, self._r, self._p = self._x[going], self._r[going], self._p[going]
            self._active, self._squared = self._active[going], self._squared[going]
