"""What each solver of stage 2 takes, from the seconds of its pieces: pure arithmetic, whatever the sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infl_cache.maths.solvers import LARGEST_RANK, PRODUCTS_WORTH
from infl_cache.maths.solvers.exact import COLUMNS, MAX_PARAMETERS
from infl_cache.maths.solvers.lissa import FIRST_BATCH
from infl_cache.maths.solvers.pcg import HISTORY
from infl_cache.maths.tiled import tile_side
from infl_cache.stages.solving import PRECONDITIONER_SAMPLES, VECTORS_A_SIDE
from infl_cache.stages.spectrum import SPECTRUM_SAMPLES
from infl_cache.stages.system import OUTPUTS_A_SIDE, ROWS_WORKING_SET

# Products with the curvature that block cg takes for each of cg's, with a preconditioner: README, "How fast stage 2
# is": 816 of 2,936 and 924 of 4,165.
PCG_SHARE = 0.26
# Products with one vector that a look at the spectrum takes.
LOOKS = 24
# What an eigendecomposition of d rows takes in operations: d^3 of them, so often.
EIGH = 9
# EK-FAC's second moments and squares cost a sample about as much as so many vectors in a product, where they were not
# timed.
EKFAC_VECTORS = 8
# Matrices at once in an eigendecomposition, and copies of the basis while it is made.
EIGH_COPIES, BASIS_COPIES = 3, 4
# Bytes of threads, of buffers, of what an allocator keeps.
FIXED = 30e6
# How often the rows of a Nystrom approximation are multiplied with each other as in making them orthonormal.
ORTHONORMAL = 3


@dataclass(frozen=True)
class Sizes:
    """Training samples of the curvature, test samples, parameters; bytes a number, bytes of memory.

    `together` test samples are solved at once, `batch` are the samples of a step of lissa; `nystrom` says whether pcg
    has that preconditioner, `looks` whether fisher and ekfac look at the spectrum.
    """

    n_train: int
    n_test: int
    n_params: int
    together: int
    itemsize: int
    budget: int
    batch: int = FIRST_BATCH
    nystrom: bool = True
    looks: bool = True

    @property
    def blocks(self) -> int:
        """How often a block of test samples is solved."""
        return -(-self.n_test // self.together)


@dataclass(frozen=True)
class Costs:
    """Seconds of the pieces.

    Once: `start` before anything is solved, `eigen` for EK-FAC's bases. For each test sample `side`, its right-hand
    side; for each block of them `commit`. Of each training sample: `capture` to have the rows that products are made
    of (0 where they differentiate twice), `product` in each product, and `vector` more for each vector in it; `twice`
    and `twice_vector` the same by differentiating twice; `moments` to fit EK-FAC to its rows; `read` its stored
    gradient, `single` and `single_vector` multiply with that. `pair` is an inner product of two gradients, `cg` and
    `pcg` are an iteration's arithmetic for each vector besides the products, `square` is making rows orthonormal, for
    each pair of them; `operation` and `division` one of float64 arithmetic in products of large matrices and in their
    factorisation. `row_bytes` and `stored_bytes` are those of a sample's rows, `outputs` how many these are, `sides`
    those of the bases.
    """

    start: float = 0.0
    eigen: float = math.nan
    side: float = 0.0
    commit: float = 0.0
    capture: float = 0.0
    product: float = 0.0
    vector: float = 0.0
    twice: float = 0.0
    twice_vector: float = 0.0
    moments: float = math.nan
    read: float = 0.0
    single: float = 0.0
    single_vector: float = 0.0
    pair: float = 0.0
    cg: float = 0.0
    pcg: float = 0.0
    square: float = 0.0
    operation: float = 0.0
    division: float = 0.0
    row_bytes: int = 0
    stored_bytes: int = 0
    outputs: int = 0
    sides: tuple[int, ...] = ()

    def kept(self, sizes: Sizes, n: int | None = None) -> bool:
        """Whether the rows (of n samples) are captured once and stay in memory."""
        return self.row_bytes > 0 and (n or sizes.n_train) * self.row_bytes <= sizes.budget // 3

    def captures(self, sizes: Sizes, products: float) -> float:
        """Seconds to have the rows for so many products."""
        return sizes.n_train * self.capture * (1 if self.kept(sizes) else products)

    def spectrum(self, sizes: Sizes) -> float:
        """Seconds of a look at the spectrum: products of one vector, by rows where these are kept or few."""
        n = min(sizes.n_train, SPECTRUM_SAMPLES)
        if self.row_bytes and (self.kept(sizes, n) or self.outputs <= OUTPUTS_A_SIDE):
            captures = 1 if self.kept(sizes, n) else LOOKS
            return n * (captures * self.capture + LOOKS * (self.product + self.vector))
        return n * LOOKS * (self.twice + self.twice_vector)


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
    """What the solver of that name takes; `depth` are the steps of lissa, NaN where nobody knows."""
    sides = costs.start + sizes.n_test * costs.side + sizes.blocks * costs.commit
    # The rows that are kept, and those of a batch on their way.
    passing = min(sizes.n_train * costs.row_bytes, ROWS_WORKING_SET, sizes.budget // 4)
    held = min(sizes.n_train * costs.row_bytes, sizes.budget // 3) + passing
    vectors = VECTORS_A_SIDE * sizes.together * sizes.n_params * sizes.itemsize + FIXED
    if name == "identity":
        return Choice(name, sides, vectors)
    if name == "fisher":
        return _fisher(costs, sizes, sides + (costs.spectrum(sizes) if sizes.looks else 0.0), vectors)
    if name == "ekfac":
        looks = costs.spectrum(sizes) if sizes.looks else 0.0
        seconds = sides + looks + _ekfac(costs, sizes) + _checked(costs, sizes)
        return Choice(name, seconds, vectors + held + passing + _bases(costs, sizes))
    sides += costs.spectrum(sizes)
    if name == "exact":
        return _exact(costs, sizes, sides)
    if name == "lissa":
        return _lissa(costs, sizes, sides, depth, vectors)
    if name == "cg":
        algebra = sizes.n_test * (needed.mean + 1) * costs.cg
        return Choice(name, sides + iterated(costs, sizes, needed) + algebra, vectors + held)
    needed = Iterations(PCG_SHARE * needed.mean, PCG_SHARE * needed.longest, needed.known)
    algebra = sizes.n_test * (needed.mean + 1) * costs.pcg + _nystrom(costs, sizes)
    # While the basis is made there are no right-hand sides; then it alone is left of that.
    basis = _rank(sizes) * sizes.n_params * sizes.itemsize if sizes.nystrom else 0
    searched = 2 * HISTORY * sizes.together * sizes.n_params * sizes.itemsize
    memory = held + max(basis + vectors + searched, BASIS_COPIES * basis)
    return Choice(name, sides + iterated(costs, sizes, needed) + algebra, memory)


def iterated(costs: Costs, sizes: Sizes, needed: Iterations) -> float:
    """Seconds of an iteration in which rows that are done leave the products; one more product certifies them."""
    passes = sizes.blocks * (needed.longest + 1)
    vectors = sizes.n_test * (needed.mean + 1)
    return costs.captures(sizes, passes) + sizes.n_train * (passes * costs.product + vectors * costs.vector)


def _checked(costs: Costs, sizes: Sizes) -> float:
    """A product for the residuals of each block, and the rows for these and for two passes of EK-FAC."""
    products = sizes.blocks * costs.product + sizes.n_test * costs.vector
    return costs.captures(sizes, 2 + sizes.blocks) + sizes.n_train * products


def _ekfac(costs: Costs, sizes: Sizes) -> float:
    eigen, moments = costs.eigen, costs.moments
    if math.isnan(eigen):
        eigen = EIGH * sum(float(side) ** 3 for side in costs.sides) * costs.operation
    if math.isnan(moments):
        moments = EKFAC_VECTORS * (costs.product + costs.vector)
    return eigen + sizes.n_train * moments


def _nystrom(costs: Costs, sizes: Sizes) -> float:
    """Two products of the leading vectors with the curvature of a subsample, and what makes a basis of them."""
    if not sizes.nystrom:
        return 0.0
    n = min(sizes.n_train, PRECONDITIONER_SAMPLES)
    rank = _rank(sizes)
    captures = 1 if costs.kept(sizes, n) else 2
    return n * (captures * costs.capture + 2 * costs.product + 2 * rank * costs.vector) + (
        ORTHONORMAL * rank**2 * costs.square
    )


def _rank(sizes: Sizes) -> int:
    """Leading vectors of a Nystrom approximation: the rule of `make_solver`."""
    worth = PRODUCTS_WORTH * sizes.n_train // min(sizes.n_train, PRECONDITIONER_SAMPLES)
    return min(LARGEST_RANK, worth, sizes.n_params, sizes.budget // 8 // (sizes.n_params * sizes.itemsize))


def _bases(costs: Costs, sizes: Sizes) -> float:
    """Bytes of EK-FAC: moments and bases in float64, the widest of them being decomposed; values and their sums."""
    squares = [float(side) ** 2 for side in costs.sides]
    return 8 * (2 * sum(squares) + EIGH_COPIES * max(squares, default=0.0)) + 16.0 * sizes.n_params


def _exact(costs: Costs, sizes: Sizes, sides: float) -> Choice:
    if sizes.n_params > MAX_PARAMETERS:
        return Choice("exact", math.inf, math.inf, note=f"for up to {MAX_PARAMETERS:,} parameters")
    products = -(-sizes.n_params // COLUMNS)
    once = products * costs.product + sizes.n_params * costs.vector
    checks = sizes.blocks * costs.product + sizes.n_test * costs.vector
    build = costs.captures(sizes, products + sizes.blocks) + sizes.n_train * (once + checks)
    factor = sizes.n_params**3 / 3 * costs.division
    return Choice("exact", sides + build + factor, 24.0 * sizes.n_params**2)


def _lissa(costs: Costs, sizes: Sizes, sides: float, depth: float, vectors: float) -> Choice:
    """Steps of a batch that is differentiated twice; after every two passes' worth of them a look at the residual."""
    if math.isnan(depth):
        note = "its steps are not known without a spectrum; give --depth"
        return Choice("lissa", math.nan, vectors, note=note)
    n = sizes.n_train
    whole = n * (costs.product + sizes.together * costs.vector)
    whole += 0.0 if costs.kept(sizes) else n * costs.capture
    step = sizes.batch * (costs.twice + sizes.together * costs.twice_vector) if sizes.batch < n else whole
    looks = 1 + depth / (max(1.0, 2 * n / sizes.batch) if sizes.batch < n else 20)
    algebra = depth * sizes.together * costs.cg
    first = n * costs.capture if costs.kept(sizes) else 0.0
    return Choice("lissa", sides + first + sizes.blocks * (depth * step + looks * whole + algebra), vectors)


def _fisher(costs: Costs, sizes: Sizes, sides: float, vectors: float) -> Choice:
    """The Gram matrix and its factor: in memory where three times its half fits, else on the disk."""
    n = sizes.n_train
    matrix = 4.0 * n * n
    on_disk = 3 * matrix > sizes.budget
    row = max(1, costs.stored_bytes)
    side = tile_side(n, sizes.budget // 6 // row, sizes.budget)
    # Whole tiles are multiplied, also on the diagonal; a last tile that is not full counts as its part.
    tiles = n / side
    pairs = side**2 * tiles * (tiles + 1) / 2 * costs.pair
    products = 2 * side**3 * tiles * max(0.0, tiles**2 - 1) / 6 * costs.operation
    divisions = side**3 * (tiles * max(0.0, tiles - 1) / 2 + tiles / 3) * costs.division
    solve = sizes.n_test * 4.0 * n * n * costs.operation
    # In the inverse and for the residual: two products of each test sample, three passes over the gradients a block.
    reads = 1 if n * row <= sizes.budget // 3 else 3 * sizes.blocks + 2 * max(1.0, n * row / (sizes.budget / 6))
    vectored = 2 * n * (sizes.blocks * costs.single + sizes.n_test * costs.single_vector)
    # Besides what stays: a block of gradients as it was stored and in float64, and pairs of layers being multiplied.
    passing = 2 * min(n * row, sizes.budget / 8) + sizes.budget / 16
    memory = vectors + passing + min(n * row, sizes.budget / 3) + (sizes.budget / 2 if on_disk else 3 * matrix)
    return Choice("fisher", sides + pairs + products + divisions + solve + n * costs.read * reads + vectored, memory,
                  matrix if on_disk else 0.0)  # fmt: skip
