"""No curvature at all: s_test is the gradient of the test sample itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, norms


@dataclass(frozen=True)
class Identity:
    """`s = v`: influences are plain products of gradients, TracIn at one checkpoint (Pruthi et al., NeurIPS 2020)."""

    def check(self, size: int) -> None:
        """Any number of parameters will do."""

    def prepare(self, operator: Operator) -> Solve:
        """Nothing is done once, and the operator is never used."""
        del operator

        def solved(rhs: Tensor, keeper: Keeper = FORGETFUL) -> Solution:
            del keeper
            fine = torch.isfinite(norms(rhs))
            residual = torch.where(fine, 0.0, torch.nan).to(torch.float64)
            reasons = tuple("" if ok else "not finite" for ok in fine.tolist())
            return Solution(rhs, residual, torch.zeros(len(rhs), dtype=torch.int64), fine, reasons)

        return solved
