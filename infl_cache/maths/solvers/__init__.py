"""Solve `(C + damping I) s = v` for K right-hand sides: one file a solver, one interface.

A solver is a frozen dataclass of its options; `prepare(operator)` does what is done once a run (factorise,
estimate the spectrum) and returns the function from right-hand sides to a `Solution`. None raises on
non-convergence: the stage decides.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from infl_cache.config import StestOptions
from infl_cache.maths.curvature import Curvature, Spectrum
from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, Solver
from infl_cache.maths.solvers.cg import CG
from infl_cache.maths.solvers.ekfac import ByEKFAC, approximate_inverse
from infl_cache.maths.solvers.exact import Exact
from infl_cache.maths.solvers.fisher import Fisher
from infl_cache.maths.solvers.identity import Identity
from infl_cache.maths.solvers.lissa import LiSSA
from infl_cache.maths.solvers.nystrom import nystrom, preconditioner
from infl_cache.maths.solvers.pcg import PCG

__all__ = [
    "CG", "PCG", "ByEKFAC", "Exact", "Fisher", "Identity", "LiSSA", "Operator", "Solution", "Solve", "Solver",
    "make_solver",
    "solve",
]  # fmt: skip


# Leading eigenvectors of the preconditioner; each costs a vector of n_params.
LARGEST_RANK = 320
# What a preconditioner may cost in vectors multiplied with the whole curvature, each of its two passes.
PRODUCTS_WORTH = 32


def make_solver(
    options: StestOptions,
    memory: int | None = None,
    spectrum: Spectrum | None = None,
    fits: Keeper = FORGETFUL,
    sampled: Callable[[], Curvature] | None = None,
) -> Solver:
    """The solver that the options name, with its share of them and of `memory` bytes.

    `fits` keeps what it fits, `sampled()` is the curvature over a subsample, for a preconditioner.
    """
    tolerance = 1e-4 if options.tolerance is None else options.tolerance
    if options.solver == "identity":
        return Identity()
    if options.solver == "pcg":
        return PCG(tolerance, options.max_iterations, _preconditioner(options.preconditioner, memory, fits, sampled))
    if options.solver == "ekfac":
        return ByEKFAC(0.1 if options.tolerance is None else options.tolerance, fits)
    if options.solver == "fisher":
        return Fisher(tolerance, memory)
    if options.solver == "exact":
        return Exact(memory)
    if options.solver == "cg":
        return CG(tolerance, options.max_iterations)
    return LiSSA(
        tolerance=0.02 if options.tolerance is None else options.tolerance,
        scale=options.scale,
        depth=options.depth,
        repeats=options.repeats,
        sample_batch=options.sample_batch,
        seed=options.seed,
        spectrum=spectrum,
    )


def _preconditioner(
    name: str, memory: int | None, fits: Keeper, sampled: Callable[[], Curvature] | None
) -> Callable[[Operator], Callable[[Tensor], Tensor]] | None:
    """What makes a preconditioner of the operator, None for none."""
    if name == "ekfac":
        return lambda operator: approximate_inverse(operator, fits)
    if name == "none" or sampled is None:
        return None

    def by_nystrom(operator: Operator) -> Callable[[Tensor], Tensor]:
        if not isinstance(operator, Curvature):
            raise TypeError(f"expected a Curvature, found {type(operator).__name__}")
        small = sampled()
        kept = fits.found()
        if kept is None:
            row = small.parameters.size * small.dtype.itemsize
            rank = min(LARGEST_RANK, PRODUCTS_WORTH * operator.n_train // small.n_train)
            rank = rank if memory is None else min(rank, memory // 8 // row)
            leading, values = nystrom(small, rank)
            kept = {"leading": leading, "values": values}
            fits.offer(lambda: {"leading": leading, "values": values})
        like = next(small.task.model.parameters())
        return preconditioner(kept["leading"].to(like.device), kept["values"].to(like.device), small.shift)

    return by_nystrom


def solve(operator: Operator, rhs: Tensor, options: Solver) -> Solution:
    """`s` with `operator(s) = rhs` for each row of `rhs` (K, n_params).

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> found = solve(lambda v: v @ matrix, torch.ones(1, 2, dtype=torch.float64), CG())
        >>> [round(each, 9) for each in found.value[0].tolist()]
        [0.5, 0.25]
    """
    return options.prepare(operator)(rhs)
