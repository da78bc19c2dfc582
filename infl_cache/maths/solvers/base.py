"""What every solver takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
State = Mapping[str, Tensor]
# Columns of a piece: some tens of rows of it, as float64, fit into a processor's cache.
CACHED = 4096


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


class Keeper(Protocol):
    """Keeps the state of a long iteration, so that a kill loses minutes of it and not hours."""

    def found(self) -> State | None:
        """The state last kept for the very same system and right-hand sides, if any."""
        ...

    def offer(self, state: Callable[[], State]) -> None:
        """Called after each iteration; keeps `state()` if the last one kept is some minutes old."""
        ...


class Forgetful:
    """Keeps nothing."""

    def found(self) -> None:
        """Nothing."""

    def offer(self, state: Callable[[], State]) -> None:
        """Not kept."""


FORGETFUL = Forgetful()
Solve = Callable[..., "Solution"]


class Solver(Protocol):
    """A frozen dataclass of options."""

    def check(self, size: int) -> None:
        """Raise `BadInput` if the solver cannot take `size` parameters; before anything is written."""
        ...

    def prepare(self, operator: Operator) -> Solve:
        """Do what is done once for an operator; return the function that solves `(rhs, keeper=FORGETFUL)`.

        A solution that goes on from a state that was kept has the bits of one that was never interrupted.
        """
        ...


def pieces(rows: Tensor) -> Iterator[slice]:
    """Columns of rows (K, P) a piece at a time: on a CPU a piece in float64 stays in the cache."""
    width = CACHED if rows.device.type == "cpu" else 1 << 20
    return (slice(start, start + width) for start in range(0, rows.shape[1], width))


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of two (K, P), float64 (K,), products and sums in float64."""
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for at in pieces(a):
        total += torch.linalg.vecdot(a[:, at].double(), b[:, at].double())
    return total


def norms(rows: Tensor) -> Tensor:
    """Euclidean norms of rows, in float64."""
    return row_dots(rows, rows).sqrt()


def relative_residual(operator: Operator, value: Tensor, rhs: Tensor) -> Tensor:
    """The true relative residual of each row, float64 (K,); zero for a zero right-hand side solved by zero."""
    distance, size = norms(operator(value) - rhs), norms(rhs)
    return torch.where(size > 0, distance / size.clamp_min(torch.finfo(torch.float64).tiny), distance)
