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
from infl_cache.disk.trial import Trial, try_store
from infl_cache.maths.capture import Forms, capture, decide_forms, rows_of
from infl_cache.maths.curvature import Curvature, Spectrum, spectrum_of
from infl_cache.maths.ekfac import sides_with_bases
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import groups_among, spread
from infl_cache.maths.solvers import make_solver
from infl_cache.maths.solvers.base import State
from infl_cache.stages.grads import CHECKED_SAMPLES, rows_at_once
from infl_cache.stages.opening import Opened, stored_dtype
from infl_cache.stages.plan import pieces
from infl_cache.stages.plan.costs import PCG_SHARE, Costs, Iterations, Sizes
from infl_cache.stages.plan.grads import SETTLED, settled
from infl_cache.stages.spectrum import auto_damping
from infl_cache.stages.stest import columns_of
from infl_cache.stages.system import OUTPUTS_A_SIDE, curvature_kind, curvature_samples, damped_curvature, solve_dtype

# Training samples of a trial solve: at most, at the least (of fewer too many units are dead, and s_test is too full of
# zeros that compress), and of the look that says how many a moment allows.
TRAIN, LEAST, FIRST = 512, 32, 8
# Seconds that the rows of the trial, its Lanczos steps, and its iterations may take.
CAPTURE_SECONDS, SPECTRUM_SECONDS, SOLVE_SECONDS = 0.4, 0.5, 0.8
# Samples that the forms of a trial are proved on: the stage proves them on more.
PROVED = 2


@dataclass(frozen=True)
class Tried:
    """What was found: seconds, iterations, spectrum, damping; what so many rows of s_test are on the disk."""

    costs: Costs
    needed: Iterations
    spectrum: Spectrum
    damping: float
    kept: Trial
    rows: int


class _Enough(Exception):
    """A trial solve has had its time."""


class _Watch:
    """A keeper that keeps nothing: it counts iterations and stops a trial that takes too long."""

    def __init__(self) -> None:
        self.until, self.count = time.perf_counter() + SOLVE_SECONDS, 0
        self.state: State = {}

    def found(self) -> State | None:
        """Nothing."""

    def offer(self, state: Callable[[], State]) -> None:
        """Count an iteration."""
        self.count += 1
        if time.perf_counter() > self.until:
            self.state = dict(state())
            raise _Enough


def tried(run: Opened, stored: Forms, sizes: Sizes, start: float, read: float, tests: Sequence[int]) -> Tried:
    """Time the pieces of stage 2 on a few samples and solve for a few test samples; `start` goes before all of it."""
    asked, run = run.options.stest, _without_grads(run)
    explained = replace(run.task, train=run.task.test, loss=run.task.measure or run.task.loss, measure=None)
    first = probe_batch(explained, range(min(PROVED, len(run.task.test))), run.device)
    forms, _ = decide_forms(explained, run.parameters, first, "dense", rows_at_once(run))
    count = max(1, min(sizes.together, len(tests), pieces.VECTORS))
    rhs, side = _sides_of(run, forms, [tests[place] for place in spread(len(tests), count)])
    operator, costs = _system(run, forms, sizes)
    vectors = rhs[torch.arange(min(sizes.together, pieces.VECTORS)) % len(rhs)]
    product, vector = pieces.products(operator, vectors)
    spectrum = _spectrum(operator, run, rhs)
    damping = asked.damping
    damping = auto_damping(spectrum, run.task.weight_decay) if damping == "auto" else damping
    needed, value = _solved(run, replace(operator, damping=damping), rhs, spectrum)
    if asked.solver == "ekfac" or (asked.solver == "pcg" and asked.preconditioner == "ekfac"):
        eigen, moments, inverse = pieces.fitting(operator)
        costs = replace(costs, eigen=eigen, moments=moments)
        value = inverse.solve(rhs, damping + run.task.weight_decay) if asked.solver == "ekfac" else value
    kept = _kept(run, rhs if asked.solver == "identity" else value)
    pair, single, single_vector, stored_bytes = pieces.inner_products(
        run, stored, len(vectors), asked.solver == "fisher"
    )
    multiplied, divided = pieces.operations(run.device)
    by_cg, by_pcg = pieces.algebra(vectors)
    costs = replace(
        costs, start=start + settled(kept, *SETTLED["stest"]), side=side,
        commit=kept.encode_seconds + kept.write_seconds + kept.commit_seconds, product=product, vector=vector,
        read=read, pair=pair, single=single, single_vector=single_vector, stored_bytes=stored_bytes,
        operation=multiplied, division=divided, cg=by_cg, pcg=by_pcg,
        square=pieces.square(run.parameters.size, rhs, max(1, run.budget // 16 // rhs[0].nbytes)),
        sides=tuple(length for pair in sides_with_bases(forms).values() for length in pair),
    )  # fmt: skip
    return Tried(costs, needed, spectrum, damping, kept, len(value))


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
    rhs = torch.cat(parts).to(solve_dtype(run))
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return rhs, (time.perf_counter() - started) / len(tests)


def _system(run: Opened, forms: Forms, sizes: Sizes) -> tuple[Curvature, Costs]:
    """The operator over as many training samples as a moment allows, made as in the stage; what its pieces take."""

    def over(count: int) -> Curvature:
        rows = curvature_samples(run, count)
        return damped_curvature(run, forms, sizes.together, 0.0, rows, tick=run.check, note=lambda text: None)

    operator = over(FIRST)
    one = torch.ones(1, run.parameters.size, dtype=operator.dtype, device=run.device)
    costs = Costs()
    if operator.kind != "fisher":
        each = pieces.twice(operator, one.expand(3, -1))
        costs = replace(costs, twice=each[0], twice_vector=each[1])
    if operator.rows is None:
        count = int(CAPTURE_SECONDS / max(1e-9, costs.twice + costs.twice_vector))
        return over(min(TRAIN, max(FIRST, count))), costs
    outputs, seconds = _captured(operator)
    costs = replace(costs, row_bytes=operator.rows.row_bytes, outputs=outputs)
    if not costs.kept(sizes) and outputs > OUTPUTS_A_SIDE * sizes.together:
        return replace(operator, rows=None), replace(costs, row_bytes=0)
    room = sizes.budget // 3 // max(1, costs.row_bytes)
    quick = CAPTURE_SECONDS / max(1e-9, seconds)
    operator = over(max(FIRST, int(min(TRAIN, room, max(LEAST, quick)))))
    return operator, replace(costs, capture=_captured(operator)[1])


def _captured(operator: Curvature) -> tuple[int, float]:
    """Rows of a sample's Jacobian, and seconds of a sample to have them, unless they are there."""
    assert operator.rows is not None
    started, outputs = time.perf_counter(), 1
    for jacobian in operator.rows.passes():
        outputs = jacobian.dense.shape[1]
    return outputs, (time.perf_counter() - started) / operator.n_train


def _spectrum(operator: Curvature, run: Opened, rhs: Tensor) -> Spectrum:
    """Lanczos steps for a moment: what they find of the ends is less the fewer there are."""
    flat = replace(operator, damping=-run.task.weight_decay)
    started = time.perf_counter()
    flat(rhs[:1])
    steps = int(SPECTRUM_SECONDS / max(1e-6, time.perf_counter() - started))
    return spectrum_of(flat, run.parameters.size, rhs[:0], max(4, min(24, steps)))


def _solved(run: Opened, operator: Curvature, rhs: Tensor, spectrum: Spectrum) -> tuple[Iterations, Tensor]:
    """Iterations of a trial solve over the few samples, and what comes out of it."""
    options = run.options.stest
    by: Literal["cg", "pcg"] = "pcg" if options.solver == "pcg" else "cg"
    options = replace(options, solver=by, preconditioner="none" if by == "pcg" else options.preconditioner)
    watch, solver = _Watch(), make_solver(options, run.budget, spectrum)
    where = f"{by}, a trial on {operator.n_train:,} training and {len(rhs)} test samples"
    # The arithmetic of `costs` takes this share away again.
    share, most = PCG_SHARE if by == "pcg" else 1.0, float(options.max_iterations)
    try:
        found = solver.prepare(operator)(rhs, watch)
    except _Enough:
        value = watch.state["value"].clone()
        if "x" in watch.state:  # of cg, where the rows that are still going are held apart
            value[watch.state["active"]] = watch.state["x"]
        steps = min(most, _extrapolated(watch, rhs, 1e-4 if options.tolerance is None else options.tolerance))
        return Iterations(steps / share, steps / share, where + ", stopped early"), value
    taken = found.iterations.double()
    return Iterations(float(taken.mean()) / share, float(taken.max()) / share, where), found.value


def _extrapolated(watch: _Watch, rhs: Tensor, tolerance: float) -> float:
    """Iterations of a solve that had no time: as its residuals fell so far, they are thought to go on falling."""
    size = rhs.double().norm(dim=1)
    if "residual" in watch.state and len(watch.state["residual"].shape) == 2:  # of pcg
        left = float((watch.state["residual"].double().norm(dim=1) / size[: len(watch.state["residual"])]).median())
    elif "squared" in watch.state and len(watch.state["squared"]):
        left = float((watch.state["squared"].double().sqrt().to(size) / size[watch.state["active"]]).median())
    else:
        return float(watch.count)
    return watch.count * max(1.0, min(20.0, math.log(tolerance) / min(-1e-9, math.log(max(left, 1e-30)))))


def _kept(run: Opened, value: Tensor) -> Trial:
    """A block of s_test on the disk, with what is kept beside it."""
    rows = value.detach().cpu().to(getattr(torch, stored_dtype(run.parameters, run.task))).numpy()
    arrays = [array_layout(path, len(rows), shape, kind, len(rows), fill=-1 if path == "index" else 0)
              for path, shape, kind in columns_of(run.parameters.size, str(rows.dtype))]  # fmt: skip
    data = {layout.path: rows.astype(layout.dtype) if layout.path == "s_test" else rows[:, 0].astype(layout.dtype)
            for layout in arrays}  # fmt: skip
    return try_store(run.folder.path, arrays, Codec("lz4", 5), data)
