"""The dense solve: build the matrix once in float64, factorise it, use it for every test sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.errors import BadInput
from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, relative_residual

MAX_PARAMETERS = 20_000
SINGULAR = "the matrix is singular or nearly so; use more damping"
COLUMNS = 256


@dataclass(frozen=True)
class Exact:
    """Equals `numpy.linalg.solve(C + damping I, v)` in float64, for up to 20,000 parameters.

    The matrix is built from products with unit vectors, `columns` at a time, made symmetric, and
    factorised once: Cholesky, or LU where it is not positive definite. Refuses what three copies of the
    matrix in `memory` bytes cannot hold.
    """

    memory: int | None = None
    columns: int = COLUMNS

    def check(self, size: int) -> None:
        """`BadInput` if a matrix of `size` parameters is too large."""
        if size > MAX_PARAMETERS:
            raise BadInput(
                f"solver exact: expected at most {MAX_PARAMETERS:,} parameters, found {size:,};"
                " use --solver cg, or fewer parameters="
            )
        if self.memory is not None and 3 * 8 * size**2 > self.memory:
            raise BadInput(
                f"solver exact: expected {3 * 8 * size**2:,} bytes of memory for {size:,} parameters, found a budget of"
                f" {self.memory:,}; give more --memory, or use --solver cg"
            )

    def prepare(self, operator: Operator) -> Solve:
        """Build on the first right-hand side, whose length is the matrix's."""
        factor: list[Callable[[Tensor], Tensor]] = []

        def solved(rhs: Tensor, keeper: Keeper = FORGETFUL) -> Solution:
            del keeper
            self.check(rhs.shape[1])
            if not factor:
                factor.append(_factorised(self._matrix(operator, rhs)))
            value = factor[0](rhs.double().T).T.contiguous()
            residual = relative_residual(lambda v: operator(v.to(rhs.dtype)).double(), value, rhs.double())
            fine = residual <= (1e-6 if rhs.dtype == torch.float64 else 1e-3)
            reasons = tuple(
                "" if ok else SINGULAR if math.isfinite(r) else "not finite"
                for ok, r in zip(fine.tolist(), residual.tolist(), strict=True)
            )
            return Solution(value, residual, torch.ones(len(rhs), dtype=torch.int64), fine, reasons)

        return solved

    def _matrix(self, operator: Operator, rhs: Tensor) -> Tensor:
        size = rhs.shape[1]
        matrix = torch.empty(size, size, dtype=torch.float64, device=rhs.device)
        for start in range(0, size, self.columns):
            stop = min(start + self.columns, size)
            unit = torch.zeros(stop - start, size, dtype=rhs.dtype, device=rhs.device)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
            matrix[start:stop] = operator(unit)
        return (matrix + matrix.T).div_(2)


def _factorised(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that solves with `matrix`."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return lambda right: torch.cholesky_solve(right, lower)
    packed, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return lambda right: torch.linalg.lu_solve(packed, pivots, right)
