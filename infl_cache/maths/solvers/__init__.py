"""Solve `(C + damping I) s = v` for K right-hand sides: one file a solver, one interface.

A solver is a frozen dataclass of its options; `prepare(operator)` does what is done once a run (factorise,
estimate the spectrum) and returns the function from right-hand sides to a `Solution`. None raises on
non-convergence: the stage decides.
"""

from __future__ import annotations

from torch import Tensor

from infl_cache.config import StestOptions
from infl_cache.maths.curvature import Spectrum
from infl_cache.maths.solvers.base import Operator, Solution, Solve, Solver
from infl_cache.maths.solvers.cg import CG
from infl_cache.maths.solvers.exact import Exact
from infl_cache.maths.solvers.fisher import Fisher
from infl_cache.maths.solvers.identity import Identity
from infl_cache.maths.solvers.lissa import LiSSA
from infl_cache.maths.solvers.pcg import PCG

__all__ = [
    "CG", "PCG", "Exact", "Fisher", "Identity", "LiSSA", "Operator", "Solution", "Solve", "Solver", "make_solver",
    "solve",
]  # fmt: skip


def make_solver(options: StestOptions, memory: int | None = None, spectrum: Spectrum | None = None) -> Solver:
    """The solver that the options name, with its share of them and of `memory` bytes."""
    tolerance = 1e-4 if options.tolerance is None else options.tolerance
    if options.solver == "identity":
        return Identity()
    if options.solver == "pcg":
        return PCG(tolerance, options.max_iterations)
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
