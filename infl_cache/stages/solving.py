"""The solver and the system of a stage that solves one, after a look at the curvature's spectrum."""

from __future__ import annotations

from collections.abc import Callable

from infl_cache.maths.capture import Forms
from infl_cache.maths.curvature import Curvature
from infl_cache.maths.solvers import Identity, Solve, Solver, make_solver
from infl_cache.maths.solvers.pcg import HISTORY
from infl_cache.progress import Bar
from infl_cache.stages.fisher import with_tiles
from infl_cache.stages.fits import KeptFit
from infl_cache.stages.opening import Opened, log
from infl_cache.stages.spectrum import advice, chosen_damping, known_damping, known_spectrum, needs_spectrum
from infl_cache.stages.system import curvature_kind, curvature_samples, damped_curvature, solve_dtype

MAX_RIGHT_HAND_SIDES = 128
# Vectors of n_params a right-hand side needs at once: itself, solution, residual, direction, product, vmap's own.
VECTORS_A_SIDE = 12
# Training samples that a preconditioner is made from.
PRECONDITIONER_SAMPLES = 512


class Products:
    """Counts products for the bar, lets a signal stop a long solve, and says once what is slow."""

    def __init__(self, check: Callable[[], None], bar: Bar) -> None:
        self._check, self._bar, self._count = check, bar, 0
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        """Say something, once."""
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def tick(self) -> None:
        """Called before each batch of a product."""
        self._check()
        self._count += 1
        if self._count % 16 == 0:
            self._bar.advance(0, note=f"{self._count} batch products")


def sides_at_once(run: Opened, asked: int | None) -> int:
    """Right-hand sides that are solved together: as many as are asked for, or as a third of the budget holds."""
    return asked or fitting_sides(run.options.stest.solver, run.budget, run.parameters.size * solve_dtype(run).itemsize)


def fitting_sides(solver: str, budget: int, vector_bytes: int) -> int:
    """Right-hand sides whose vectors a third of the budget holds.

    >>> fitting_sides("cg", 10**9, 10**6)
    27
    """
    vectors = VECTORS_A_SIDE + (2 * HISTORY if solver == "pcg" else 0)
    return max(1, min(budget // 3 // (vector_bytes * vectors), MAX_RIGHT_HAND_SIDES))


def prepared(run: Opened, forms: Forms, sides: int, products: Products, stage: str) -> Solve:
    """The solver of the run's system, for `sides` right-hand sides at once."""
    if run.options.stest.solver == "identity":
        return Identity().prepare(lambda v: v)
    solver, operator = system(run, forms, sides, products, stage)
    return solver.prepare(operator)


def system(run: Opened, forms: Forms, sides: int, products: Products, stage: str) -> tuple[Solver, Curvature]:
    """The solver and the damped curvature, whose damping and spectrum the plan of `stage` keeps."""
    spectrum = known_spectrum(run, forms, products.note, stage) if needs_spectrum(run.options.stest) else None
    damping = known_damping(run) if spectrum is None else chosen_damping(run, spectrum)
    for text in [] if spectrum is None else advice(run, spectrum, damping):
        products.note(text)
    run.folder.remember(stage, damping=damping, curvature=curvature_kind(run.options.stest))
    rows = curvature_samples(run)
    operator = damped_curvature(run, forms, sides, damping, rows, tick=products.tick, note=products.note)

    def sampled() -> Curvature:
        few = curvature_samples(run, PRECONDITIONER_SAMPLES)
        return damped_curvature(run, forms, sides, damping, few, tick=products.tick, note=products.note)

    solver = make_solver(run.options.stest, run.budget, spectrum, KeptFit(run, stage), sampled)
    return with_tiles(run, solver, rows, operator.shift), operator
