"""What stage 2 would do and cost: bytes, memory, seconds, and the same of every other solver."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infl_cache.stages.plan.costs import Choice, Costs, Iterations, Sizes, bound, solver_choice
from infl_cache.stages.solving import fitting_sides

SOLVERS = ("cg", "pcg", "ekfac", "fisher", "exact", "lissa", "identity")


@dataclass(frozen=True)
class StestPlan:
    """Stage 2 on paper."""

    solver: str
    sizes: Sizes
    iterations: Iterations
    largest: float
    damping: float
    tolerance: float
    choices: tuple[Choice, ...]
    n_bytes: float
    costs: Costs

    @property
    def chosen(self) -> Choice:
        """What the solver that was asked for takes."""
        return next(each for each in self.choices if each.name == self.solver)

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.chosen.seconds

    @property
    def memory(self) -> float:
        """Bytes the stage holds at most, besides the process as it starts."""
        return self.chosen.memory

    @property
    def cg_bound(self) -> float:
        """Iterations of cg that surely suffice, NaN where the spectrum is not known."""
        return bound(self.largest, self.damping, self.tolerance) if math.isfinite(self.largest) else math.nan


def solved_together(solver: str, asked: int | None, budget: int, size: int, itemsize: int, n_test: int) -> int:
    """Test samples that stage 2 solves together."""
    return min(asked or fitting_sides(solver, budget, size * itemsize), n_test)


def plan_stest(
    solver: str, costs: Costs, sizes: Sizes, needed: Iterations, largest: float, damping: float, tolerance: float,
    bytes_a_test: float,
) -> StestPlan:  # fmt: skip
    """Stage 2 from the seconds of its pieces."""
    shift = max(damping, 1e-300)
    # As many steps as the error needs to shrink by the slowest rate, as `LiSSA` takes them.
    steepest = 1.33 * (max(0.0, largest) + shift) / shift if math.isfinite(largest) else math.nan
    depth = steepest * math.log(1 / min(tolerance, 0.5))
    choices = tuple(solver_choice(name, costs, sizes, needed, depth) for name in SOLVERS)
    n_bytes = bytes_a_test * sizes.n_test
    return StestPlan(solver, sizes, needed, largest, damping, tolerance, choices, n_bytes, costs)
