"""What stage 2 would do and cost: bytes, memory, seconds, and the same of every other solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from infl_cache.config import StestOptions
from infl_cache.maths.solvers.lissa import FIRST_BATCH
from infl_cache.stages.plan.costs import Choice, Costs, Iterations, Sizes, bound, solver_choice
from infl_cache.stages.solving import fitting_sides

# The scale of lissa over the largest eigenvalue: `LiSSA`.
LISSA_MARGIN = 1.33
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


def sizes_of(
    options: StestOptions, asked: int | None, budget: int, size: int, itemsize: int, counts: tuple[int, int]
) -> Sizes:
    """The sizes of stage 2 for (n_train, n_test) samples, `asked` of them solved together if that is given."""
    n_train, n_test = counts
    together = min(asked or fitting_sides(options.solver, budget, size * itemsize), n_test)
    curved = min(n_train, options.curvature_samples or n_train)
    batch = min(curved, options.sample_batch or FIRST_BATCH)
    return Sizes(curved, n_test, size, together, itemsize, budget, batch, options.preconditioner == "nystrom",
                 options.damping == "auto" or options.curvature == "hessian")  # fmt: skip


def plan_stest(
    options: StestOptions, costs: Costs, sizes: Sizes, needed: Iterations, largest: float, damping: float,
    bytes_a_test: float,
) -> StestPlan:  # fmt: skip
    """Stage 2 from the seconds of its pieces; `largest` is the largest eigenvalue, NaN where it is not known."""
    tolerance = 1e-4 if options.tolerance is None else options.tolerance
    depth, known = _depth(options, largest, damping)
    choices = tuple(solver_choice(name, costs, sizes, needed, depth) for name in SOLVERS)
    choices = tuple(replace(each, note=known) if each.name == "lissa" and not each.note else each for each in choices)
    return StestPlan(options.solver, sizes, needed, largest, damping, tolerance, choices, bytes_a_test * sizes.n_test,
                     costs)  # fmt: skip


def _depth(options: StestOptions, largest: float, damping: float) -> tuple[float, str]:
    """Steps of lissa and how they are known: as its error shrinks by the slowest rate, else as many as asked for."""
    most = math.nan if options.depth is None else float(options.depth)
    if not math.isfinite(largest):
        return most * options.repeats, "as many steps as asked for"
    tolerance = 0.02 if options.tolerance is None else options.tolerance
    shift = max(damping, 1e-300)
    enough = LISSA_MARGIN * (max(0.0, largest) + shift) / shift * math.log(1 / min(tolerance, 0.5))
    # Only a recursion that may not come to its end is repeated.
    return most * options.repeats if most < enough else enough, ""
