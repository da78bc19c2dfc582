"""What every solver takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """`value` (K, P); per row the true relative residual, the products taken, whether that will do, and why not.

    `residual[k] = |operator(value[k]) - rhs[k]| / |rhs[k]|`, recomputed with the operator at the end.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    reasons: tuple[str, ...]


class Solver(Protocol):
    """A frozen dataclass of options."""

    def check(self, size: int) -> None:
        """Raise `BadInput` if the solver cannot take `size` parameters; before anything is written."""
        ...

    def prepare(self, operator: Operator) -> Callable[[Tensor], Solution]:
        """Do what is done once for an operator; return the function that solves for right-hand sides."""
        ...


def norms(rows: Tensor) -> Tensor:
    """Euclidean norms of rows, in float64."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return found


def relative_residual(operator: Operator, value: Tensor, rhs: Tensor) -> Tensor:
    """The true relative residual of each row, float64 (K,); zero for a zero right-hand side solved by zero."""
    distance, size = norms(operator(value) - rhs), norms(rhs)
    return torch.where(size > 0, distance / size.clamp_min(torch.finfo(torch.float64).tiny), distance)
