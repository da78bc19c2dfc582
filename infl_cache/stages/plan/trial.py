"""Stage 2 tried out on a few samples: seconds of its pieces, iterations, and what s_test looks like on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import array_layout
from infl_cache.disk.trial import try_store
from infl_cache.maths.capture import Forms, capture, decide_forms, rows_of
from infl_cache.maths.curvature import Curvature, Spectrum, spectrum_of
from infl_cache.maths.curvature.jacobian import forms_for_products, of_gradients
from infl_cache.maths.ekfac import sides_with_bases
from infl_cache.maths.gram import gram
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import groups_among, spread
from infl_cache.maths.solvers import make_solver
from infl_cache.maths.solvers.base import State
from infl_cache.stages.grads import CHECKED_SAMPLES, rows_at_once
from infl_cache.stages.opening import Opened, stored_dtype
from infl_cache.stages.plan.costs import PCG_SHARE, Costs, Iterations, Sizes
from infl_cache.stages.spectrum import auto_damping
from infl_cache.stages.system import OUTPUTS_A_SIDE, curvature_kind, curvature_samples, damped_curvature, solve_dtype

# Training and test samples of the trial, and the seconds that a trial solve may take.
TRAIN, TESTS, SECONDS = 512, 8, 4.0
PAIRS = 64
# Bytes of the nine numbers that are kept beside a row of s_test.
BESIDE = 72


@dataclass(frozen=True)
class Tried:
    """What was found: seconds of the pieces, iterations, the spectrum, the damping, bytes of a row of s_test."""

    costs: Costs
    needed: Iterations
    spectrum: Spectrum
    damping: float
    bytes_a_test: float


class _Enough(Exception):
    """A trial solve has had its time."""


class _Watch:
    """A keeper that keeps nothing: it counts iterations and stops a trial that takes too long."""

    def __init__(self) -> None:
        self.until, self.state, self.count = time.perf_counter() + SECONDS, {}, 0  # type: ignore[var-annotated]

    def found(self) -> State | None:
        """Nothing."""

    def offer(self, state: Callable[[], State]) -> None:
        """Count an iteration."""
        self.count += 1
        if time.perf_counter() > self.until:
            self.state = dict(state())
            raise _Enough


def tried(run: Opened, stored: Forms, sizes: Sizes, read: float, tests: Sequence[int]) -> Tried:
    """Time the pieces of stage 2 on a few samples and solve for a few test samples."""
    run = _without_grads(run)
    started = time.perf_counter()
    explained = replace(run.task, train=run.task.test, loss=run.task.measure or run.task.loss, measure=None)
    first = probe_batch(explained, range(min(CHECKED_SAMPLES, len(run.task.test))), run.device)
    forms, _ = decide_forms(explained, run.parameters, first, "dense", rows_at_once(run))
    start = time.perf_counter() - started
    rhs, side = _sides_of(run, forms, [tests[place] for place in spread(len(tests), TESTS)])
    rows = curvature_samples(run, TRAIN)
    operator = damped_curvature(run, forms, sizes.together, 0.0, rows, tick=run.check, note=lambda text: None)
    operator, capture_seconds, row_bytes = _rows_or_not(operator, sizes)
    product, vector = _products(operator, rhs, len(rows), sizes.together)
    flat = replace(operator, damping=-run.task.weight_decay)
    started = time.perf_counter()
    spectrum = spectrum_of(flat, run.parameters.size, rhs[:0])
    damping = run.options.stest.damping
    damping = auto_damping(spectrum, run.task.weight_decay) if damping == "auto" else damping
    start += (time.perf_counter() - started) * min(sizes.n_train, 4096) / len(rows)
    needed, value = _solved(run, replace(operator, damping=damping), rhs, spectrum)
    costs = Costs(
        start, side, capture_seconds, product, vector, _pair(run, stored), read, _operation(), row_bytes,
        tuple(length for pair in sides_with_bases(forms).values() for length in pair),
    )  # fmt: skip
    return Tried(costs, needed, spectrum, damping, _bytes_a_test(run, value))


def _without_grads(run: Opened) -> Opened:
    """The run with a system that needs no stored gradients: Gauss-Newton in place of the empirical Fisher matrix."""
    options = run.options
    stest, influence = options.stest, replace(options.influence, nonfinite="stop")
    if curvature_kind(stest) == "fisher":
        wide = stored_dtype(run.parameters, run.task) if stest.solve_dtype == "auto" else stest.solve_dtype
        stest = replace(stest, solver="cg", curvature="ggn", solve_dtype="float64" if wide == "float64" else "float32")
    return replace(run, options=replace(options, stest=stest, influence=influence))


def _sides_of(run: Opened, forms: Forms, tests: Sequence[int]) -> tuple[Tensor, float]:
    """Right-hand sides of a few test samples, and the seconds of one."""
    size, parts = forms.at_once(min(CHECKED_SAMPLES, rows_at_once(run))), []
    started = time.perf_counter()
    for group in groups_among(tests, size):
        found = capture(run.task, forms, probe_batch(run.task, group, run.device, "test"), measure=True)
        parts.append(rows_of(forms, found.factors, found.dense))
    _wait(run.device)
    return torch.cat(parts).to(solve_dtype(run)), (time.perf_counter() - started) / len(tests)


def _rows_or_not(operator: Curvature, sizes: Sizes) -> tuple[Curvature, float, int]:
    """The operator as the whole stage would have it, seconds to capture a sample's rows, and their bytes."""
    if operator.rows is None:
        return operator, 0.0, 0
    started, outputs = time.perf_counter(), 1
    for jacobian in operator.rows.passes():
        outputs = jacobian.dense.shape[1]
    seconds = (time.perf_counter() - started) / operator.n_train
    row_bytes = operator.rows.row_bytes
    fits = sizes.n_train * row_bytes <= sizes.budget // 3
    if not fits and operator.kind == "ggn" and outputs > OUTPUTS_A_SIDE * sizes.together:
        return replace(operator, rows=None), 0.0, 0
    return operator, seconds, row_bytes


def _products(operator: Curvature, rhs: Tensor, n: int, together: int) -> tuple[float, float]:
    """Seconds of a training sample in a product, and for each vector in it: from products of one and of several."""
    few = rhs[torch.arange(min(together, 16)) % len(rhs)]
    seconds = []
    for vectors in (rhs[:1], few):
        operator(vectors)
        started = time.perf_counter()
        operator(vectors)
        _wait(rhs.device)
        seconds.append((time.perf_counter() - started) / n)
    if len(few) == 1:
        return 0.0, seconds[0]
    each = max(0.0, seconds[1] - seconds[0]) / (len(few) - 1)
    return max(0.0, seconds[0] - each), each


def _solved(run: Opened, operator: Curvature, rhs: Tensor, spectrum: Spectrum) -> tuple[Iterations, Tensor]:
    """Iterations of a trial solve over the few samples, and what comes out of it."""
    options = run.options.stest
    by: Literal["cg", "pcg"] = "pcg" if options.solver == "pcg" else "cg"
    options = replace(options, solver=by, preconditioner="none" if by == "pcg" else options.preconditioner)
    watch, solver = _Watch(), make_solver(options, run.budget, spectrum)
    where = f"{by}, a trial on {operator.n_train:,} training and {len(rhs)} test samples"
    try:
        found = solver.prepare(operator)(rhs, watch)
    except _Enough:
        value = watch.state["value"].clone()
        if "x" in watch.state:  # of cg, where the rows that are still going are held apart
            value[watch.state["active"]] = watch.state["x"]
        return _extrapolated(watch, rhs, 1e-4 if options.tolerance is None else options.tolerance, by, where), value
    steps = found.iterations.double()
    share = PCG_SHARE if by == "pcg" else 1.0  # which the arithmetic of `costs` takes away again
    return Iterations(float(steps.mean()) / share, float(steps.max()) / share, where), found.value


def _extrapolated(watch: _Watch, rhs: Tensor, tolerance: float, by: str, where: str) -> Iterations:
    """Iterations of a solve that had no time: as its residuals fell so far, they are thought to go on falling."""
    squared, share = watch.state.get("squared"), PCG_SHARE if by == "pcg" else 1.0
    if squared is None or not len(squared):
        return Iterations(watch.count / share, watch.count / share, where)
    left = float((squared.double().sqrt().cpu() / rhs.double().norm(dim=1).cpu()[watch.state["active"].cpu()]).median())
    steps = watch.count * max(1.0, min(20.0, math.log(tolerance) / min(-1e-9, math.log(max(left, 1e-30)))))
    return Iterations(steps, steps, where + ", stopped early")


def _pair(run: Opened, stored: Forms) -> float:
    """Seconds of an inner product of two stored gradients."""
    forms = forms_for_products(stored, 1, stored.factored)
    count = stored.at_once(min(PAIRS, 4 * rows_at_once(run)))
    batch = probe_batch(run.task, spread(len(run.task.train), count), run.device)
    found = capture(run.task, stored, batch)
    factors = {k: (a.double() if a.is_floating_point() else a, g.double()) for k, (a, g) in found.factors.items()}
    jacobian = of_gradients(stored, forms, factors, found.dense.double())
    gram(forms, jacobian, jacobian)
    started = time.perf_counter()
    gram(forms, jacobian, jacobian)
    _wait(run.device)
    return (time.perf_counter() - started) / len(batch.indices) ** 2


def _operation(size: int = 512) -> float:
    """Seconds of one of the n^3 / 3 operations of a Cholesky factorisation."""
    matrix = torch.eye(size, dtype=torch.float64) * size
    torch.linalg.cholesky(matrix)
    started = time.perf_counter()
    torch.linalg.cholesky(matrix)
    return (time.perf_counter() - started) / (size**3 / 3)


def _bytes_a_test(run: Opened, value: Tensor) -> float:
    """Bytes of a row of s_test on the disk, with what is kept beside it."""
    rows = value.detach().cpu().to(getattr(torch, stored_dtype(run.parameters, run.task))).numpy()
    layout = array_layout("s_test", len(rows), rows.shape[1:], str(rows.dtype), len(rows))
    trial = try_store(run.folder.path, [layout], Codec("lz4", 5), {"s_test": rows})
    return trial.n_bytes / len(rows) + BESIDE


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
