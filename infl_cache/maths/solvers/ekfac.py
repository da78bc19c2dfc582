"""EK-FAC as a solver: an approximate inverse that is fitted once and costs a few small products a test sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.curvature import Curvature
from infl_cache.maths.ekfac import EKFAC, fit
from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, norms, relative_residual

FAR = "ekfac is an approximation; --solver pcg solves the system itself"


@dataclass(frozen=True)
class ByEKFAC:
    """`s = (C' + shift I)^-1 v` with C' the EK-FAC approximation of the curvature (see `maths.ekfac`).

    The residuals are true ones, with the operator itself; only a row within the tolerance is called converged.
    """

    tolerance: float = 0.1
    fits: Keeper = FORGETFUL

    def check(self, size: int) -> None:
        """Any number of parameters will do."""

    def prepare(self, operator: Operator) -> Solve:
        """Fit when it is first needed, or take the fit that was kept."""
        fitted: list[Callable[[Tensor], Tensor]] = []

        def solved(rhs: Tensor, keeper: Keeper = FORGETFUL) -> Solution:
            del keeper
            if not fitted:
                fitted.append(approximate_inverse(operator, self.fits))
            value = fitted[0](rhs)
            residual = relative_residual(operator, value, rhs)
            fine = torch.isfinite(residual) & torch.isfinite(norms(value))
            converged = fine & (residual <= self.tolerance)
            reasons = tuple(
                "" if good else FAR if finite else "not finite"
                for good, finite in zip(converged.tolist(), fine.tolist(), strict=True)
            )
            return Solution(value, residual, torch.ones(len(rhs), dtype=torch.int64), converged, reasons)

        return solved


def approximate_inverse(operator: Operator, fits: Keeper) -> Callable[[Tensor], Tensor]:
    """`v -> (C' + shift I)^-1 v`, fitted to the operator, which must be a `Curvature`, or as it was kept."""
    if not isinstance(operator, Curvature):
        raise TypeError(f"EK-FAC looks into the curvature: expected a Curvature, found {type(operator).__name__}")
    kept = fits.found()
    like = torch.zeros(0, dtype=operator.dtype, device=next(operator.task.model.parameters()).device)
    if kept is None:
        found = fit(operator.fit_rows(), operator.n_train)
        fits.offer(found.state)
    else:
        found = EKFAC.of_state(operator.parameters, kept, like)
    return lambda rows: found.solve(rows, operator.shift)
