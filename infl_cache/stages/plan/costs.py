"""What each solver of stage 2 takes, from the seconds of its pieces: pure arithmetic, whatever the sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infl_cache.maths.solvers.exact import COLUMNS, MAX_PARAMETERS
from infl_cache.maths.solvers.lissa import FIRST_BATCH

# Products with the curvature that block cg takes for each of cg's, with a preconditioner: README, "How fast stage 2
# is": 816 of 2,936 and 924 of 4,165.
PCG_SHARE = 0.26
# What an eigendecomposition of d rows takes in operations: d^3 of them, so often.
EIGH = 9
# EK-FAC's second moments and squares cost a sample about as much as so many vectors in a product.
EKFAC_VECTORS = 4


@dataclass(frozen=True)
class Sizes:
    """Training and test samples, parameters, test samples solved together, bytes a number, bytes of memory."""

    n_train: int
    n_test: int
    n_params: int
    together: int
    itemsize: int
    budget: int

    @property
    def blocks(self) -> int:
        """How often a block of test samples is solved."""
        return -(-self.n_test // self.together)


@dataclass(frozen=True)
class Costs:
    """Seconds of the pieces.

    `start` once; `side` for each test sample's right-hand side; of each training sample `capture` to have the rows
    that products are made of (0 where they differentiate twice), `product` in each product, and `vector` more for
    each vector in it; `pair` for an inner product of two gradients, `read` to read a stored gradient; `operation`
    for one of float64 arithmetic in large matrices. `row_bytes` are those of a sample's rows.
    """

    start: float
    side: float
    capture: float
    product: float
    vector: float
    pair: float
    read: float
    operation: float
    row_bytes: int
    sides: tuple[int, ...]

    def kept(self, sizes: Sizes) -> bool:
        """Whether the rows are captured once and stay in memory."""
        return self.row_bytes > 0 and sizes.n_train * self.row_bytes <= sizes.budget // 3

    def captures(self, sizes: Sizes, products: float) -> float:
        """Seconds to have the rows for so many products."""
        return sizes.n_train * self.capture * (1 if self.kept(sizes) else products)


@dataclass(frozen=True)
class Iterations:
    """What a solver needs: products a test sample on the average, in the longest of a block, and how that is known."""

    mean: float
    longest: float
    known: str


@dataclass(frozen=True)
class Choice:
    """What something else would cost: seconds, bytes of memory, bytes on the disk besides the stores."""

    name: str
    seconds: float
    memory: float
    disk: float = 0.0
    note: str = ""


def bound(largest: float, shift: float, tolerance: float) -> float:
    """Iterations of cg that surely suffice: `sqrt(kappa) / 2 log(2 / tolerance)` (Saad 2003, eq. 6.128).

    >>> round(bound(99.0, 1.0, 1e-4))
    50
    """
    kappa = max(1.0, (largest + shift) / max(shift, 1e-300))
    return 0.5 * math.sqrt(kappa) * math.log(2 / tolerance)


def solver_choice(name: str, costs: Costs, sizes: Sizes, needed: Iterations, depth: float) -> Choice:
    """What the solver of that name takes; `depth` are the steps of lissa."""
    n, tests = sizes.n_train, sizes.n_test
    sides = costs.start + tests * costs.side
    held = min(n * costs.row_bytes, sizes.budget // 3)
    vectors = 12 * sizes.together * sizes.n_params * sizes.itemsize
    if name == "identity":
        return Choice(name, sides, vectors)
    if name == "fisher":
        return _fisher(costs, sizes, sides, vectors)
    if name == "ekfac":
        eigen = EIGH * sum(float(side) ** 3 for side in costs.sides) * costs.operation
        fit = n * 2 * EKFAC_VECTORS * (costs.product + costs.vector) + eigen
        check = sizes.blocks * n * costs.product + tests * n * costs.vector
        return Choice(name, sides + costs.captures(sizes, 2 + sizes.blocks) + fit + check, vectors + held)
    if name == "exact":
        if sizes.n_params > MAX_PARAMETERS:
            return Choice(name, math.inf, math.inf, note=f"for up to {MAX_PARAMETERS:,} parameters")
        products = -(-sizes.n_params // COLUMNS)
        build = costs.captures(sizes, products) + 2 * n * (products * costs.product + sizes.n_params * costs.vector)
        return Choice(name, sides + build + sizes.n_params**3 / 3 * costs.operation, 24.0 * sizes.n_params**2)
    if name == "lissa":
        step = costs.capture + costs.product + sizes.together * costs.vector
        return Choice(name, sides + sizes.blocks * depth * FIRST_BATCH * step, vectors)
    if name == "pcg":
        vectors *= 3
        needed = Iterations(PCG_SHARE * needed.mean, PCG_SHARE * needed.longest, needed.known)
    return Choice(name, sides + iterated(costs, sizes, needed), vectors + held)


def iterated(costs: Costs, sizes: Sizes, needed: Iterations) -> float:
    """Seconds of an iteration in which rows that are done leave the products; one more product certifies them."""
    passes = sizes.blocks * (needed.longest + 1)
    vectors = sizes.n_test * (needed.mean + 1)
    return costs.captures(sizes, passes) + sizes.n_train * (passes * costs.product + vectors * costs.vector)


def _fisher(costs: Costs, sizes: Sizes, sides: float, vectors: float) -> Choice:
    """The Gram matrix and its factor: in memory where three times its half fits, else on the disk."""
    n = sizes.n_train
    matrix = 4.0 * n * n
    on_disk = 3 * matrix > sizes.budget
    pairs = n * n / 2 * costs.pair + n**3 / 3 * costs.operation
    solve = sizes.n_test * (2.0 * n * n * costs.operation + 6 * n * costs.pair)
    passes = n * costs.read * 4 * sizes.blocks
    memory = vectors + (sizes.budget / 2 if on_disk else 3 * matrix)
    return Choice("fisher", sides + pairs + solve + passes, memory, matrix if on_disk else 0.0)
