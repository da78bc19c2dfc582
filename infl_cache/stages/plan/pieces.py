"""Seconds of the pieces that stage 2 is made of, each at the size it has there, as far as a moment allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from infl_cache.maths.capture import Forms, capture
from infl_cache.maths.curvature import Curvature, Rows
from infl_cache.maths.curvature.jacobian import Jacobian, forms_for_products, of_gradients
from infl_cache.maths.curvature.jacobian import product as product_of_rows
from infl_cache.maths.curvature.products import batch_product
from infl_cache.maths.ekfac import EKFAC, fit
from infl_cache.maths.gram import gram
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import digests_at, plain_tensors, spread
from infl_cache.maths.solvers.cg import CG
from infl_cache.maths.solvers.pcg import PCG, orthonormal
from infl_cache.maths.task import losses_of
from infl_cache.stages.opening import Opened
from infl_cache.stages.plan.clock import clocked, line, once, wait
from infl_cache.stages.same import CHECK_SECONDS, CHECKED_AT_ONCE, CHECKED_LOSSES

# Vectors of a timed product, iterations of a timed recursion, rows made orthonormal, side of a timed matrix.
VECTORS, STEPS, BASIS, SIDE = 16, 3, 48, 768
# Samples whose digests are timed one by one.
COMPARED = 32
# Samples of a product by differentiating twice, of the fit of EK-FAC, of an inner product.
TWICE, FITTED, PAIRS, MOST_PAIRS = 32, 32, 64, 512


def products(operator: Curvature, vectors: Tensor) -> tuple[float, float]:
    """Seconds of a training sample in a product, and for each vector in it: from products of one and of several."""
    device = vectors.device
    few = [(len(rows), clocked(lambda rows=rows: operator(rows), device)) for rows in (vectors[:1], vectors)]  # type: ignore[misc]
    whole, each = line(few[0], few[1])
    return whole / operator.n_train, each / operator.n_train


def twice(operator: Curvature, vectors: Tensor) -> tuple[float, float]:
    """The same by differentiating one batch twice."""
    batch = probe_batch(operator.task, range(min(TWICE, operator.n_train)), vectors.device)
    kind = "ggn" if operator.kind == "fisher" else operator.kind

    def differentiated(rows: Tensor) -> Callable[[], Tensor]:
        return lambda: batch_product(operator.task, operator.parameters, kind, batch, rows, operator.note)

    few = [(len(rows), clocked(differentiated(rows), vectors.device)) for rows in (vectors[:1], vectors[:3])]
    whole, each = line(few[0], few[1])
    return whole / len(batch.indices), each / len(batch.indices)


def algebra(vectors: Tensor) -> tuple[float, float]:
    """Seconds of an iteration of cg and of pcg for each vector, besides its products."""
    count, size = vectors.shape
    scale = torch.linspace(1.0, 1e3, size, dtype=vectors.dtype, device=vectors.device)
    # Right-hand sides that depend on one another would leave a block of directions.
    apart = torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(vectors)
    found = []
    for solver in (CG(1e-30, STEPS), PCG(1e-30, STEPS)):
        solve = solver.prepare(lambda v: v * scale)
        found.append(clocked(lambda solve=solve: solve(apart), vectors.device) / (STEPS * count))  # type: ignore[misc]
    return found[0], found[1]


def square(size: int, like: Tensor, most: int) -> float:
    """Seconds, for each pair of them, to make rows of `size` numbers orthonormal."""
    count = max(1, min(BASIS, most, size))
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(like)
    return clocked(lambda: orthonormal(rows), like.device) / count**2


def fitting(operator: Curvature) -> tuple[float, float, EKFAC]:
    """Seconds of EK-FAC's bases, and of a training sample in its two passes over rows in memory; and one of a few."""
    rows = operator.fit_rows()
    batch = next(iter(rows.passes()))
    count, spent = min(FITTED, batch.size), 0.0
    hessian = None if batch.hessian is None else batch.hessian[:count]
    factors = {key: (a[:count], g[:count]) for key, (a, g) in batch.factors.items()}
    part = replace(batch, factors=factors, dense=batch.dense[:count], hessian=hessian)

    def passes() -> Iterator[Jacobian]:
        nonlocal spent
        started = time.perf_counter()
        yield part
        wait(part.dense.device)  # what was done with it is done
        spent += time.perf_counter() - started

    made: list[EKFAC] = []
    seconds = once(lambda: made.append(fit(Rows(rows.forms, passes, rows.row_bytes), count)), part.dense.device)
    return max(0.0, seconds - spent), spent / count, made[0]


def inner_products(run: Opened, stored: Forms, vectors: int, many: bool) -> tuple[float, float, float, int]:
    """Of stored gradients, float64: seconds of a pair, of a sample in a product, of a vector in it; a row's bytes."""
    forms = forms_for_products(stored, 1, stored.factored)
    numbers = forms.n_dense + sum(layer.factor_size for layer in forms.factored)
    room = max(1, run.budget // 16 // (8 * max(1, numbers + stored.n_dense)))
    count = stored.at_once(max(1, min(MOST_PAIRS if many else PAIRS, room, len(run.task.train))))
    found = capture(run.task, stored, probe_batch(run.task, spread(len(run.task.train), count), run.device))
    factors = {k: (a.double() if a.is_floating_point() else a, g.double()) for k, (a, g) in found.factors.items()}
    rows = of_gradients(stored, forms, factors, found.dense.double())
    pair = clocked(lambda: gram(forms, rows, rows), run.device) / rows.size**2
    asked = torch.ones(vectors, run.parameters.size, dtype=torch.float64, device=run.device)
    few = [(len(v), clocked(lambda v=v: product_of_rows(forms, [rows], v), run.device)) for v in (asked[:1], asked)]  # type: ignore[misc]
    whole, each = line(few[0], few[1])
    return pair, whole / rows.size, each / rows.size, 8 * numbers


def operations(device: torch.device) -> tuple[float, float]:
    """Seconds of a float64 operation in a product of large matrices, and in a triangular factorisation."""
    matrix = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    definite = torch.eye(SIDE, dtype=torch.float64, device=device) * SIDE
    multiplied = clocked(lambda: matrix @ matrix.T, device) / (2 * SIDE**3)
    return multiplied, clocked(lambda: torch.linalg.cholesky(definite), device) / (SIDE**3 / 3)


def compared(run: Opened, name: str, count: int) -> float:
    """Seconds of a stage to see that the data are those of a store, and eight losses: `same.check_against_store`."""
    dataset = getattr(run.task, name)
    alone = plain_tensors(dataset) is None
    rows = spread(len(dataset), min(COMPARED if alone else CHECKED_AT_ONCE, len(dataset)))
    groups = [[row] for row in rows] if alone else [rows]
    digests = clocked(lambda: [digests_at(dataset, name, group) for group in groups], run.device) / len(rows)

    def loss() -> None:
        with torch.no_grad():
            losses_of(run.task, probe_batch(run.task, rows[:1], run.device, name))

    most = math.inf if run.options.resources.check_data == "full" else CHECK_SECONDS
    return min(most, count * digests) + min(count, CHECKED_LOSSES) * clocked(loss, run.device)
