r"""LiSSA, the recursion of Agarwal et al. (2017) and of Koh & Liang (2017, section 3), with the scale divided out.

.. math:: h_{t+1} = v + h_t - (C_{batch} h_t + \lambda h_t) / scale, \qquad s = h / scale

converges to :math:`(C + \lambda I)^{-1} v` if `scale` exceeds the largest eigenvalue. What users of the
recursion meet as NaN, or as knobs nobody can set, is chosen here: the scale from the ends of the spectrum, the depth
from scale and damping, the batch by doubling it when the residual no longer falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.curvature import Curvature, Spectrum, spectrum_of
from infl_cache.maths.solvers.base import FORGETFUL, Keeper, Operator, Solution, Solve, State, norms, relative_residual

FIRST_BATCH = 128
MAX_DOUBLINGS = 12
# From one batch size to the next; more than there are repeats, so that none draws what another draws.
SEED_STEP = 1_000_003
NO_DAMPING_DEPTH = 5000
# Steps for an indefinite operator, for which the recursion has no limit to go to.
HOPELESS_DEPTH = 20


@dataclass(frozen=True)
class LiSSA:
    """Stops a row when `|residual| / (smallest |s|) <= tolerance`, which bounds the relative error of `s`.

    `smallest` is the operator's smallest eigenvalue: at least `lambda + weight_decay` for ggn; estimated for the
    Hessian, and where that is not positive nothing is ever called converged.
    `scale`, `depth`, `sample_batch` are estimated where they are None. Up to `repeats` recursions are averaged: no more
    are begun of a row whose average meets the tolerance. Each row is solved as it would be alone, to rounding.
    """

    tolerance: float = 0.02
    scale: float | None = None
    depth: int | None = None
    repeats: int = 1
    sample_batch: int | None = None
    seed: int = 42
    # Of the operator without damping and weight decay; estimated if not given.
    spectrum: Spectrum | None = None

    def check(self, size: int) -> None:
        """Any number of parameters will do."""

    def prepare(self, operator: Operator) -> Solve:
        """Estimate the scale once; the operator must be a `Curvature`, whose single batches are sampled."""
        if not isinstance(operator, Curvature):
            raise TypeError(f"LiSSA samples the curvature: expected a Curvature, found {type(operator).__name__}")
        ends: list[tuple[float, float]] = []

        def solved(rhs: Tensor, keeper: Keeper = FORGETFUL) -> Solution:
            if not ends:
                ends.append(self._ends(operator, rhs))
            return self._averaged(operator, rhs, *ends[0], keeper)

        return solved

    def _ends(self, operator: Curvature, rhs: Tensor) -> tuple[float, float]:
        """The scale, and the smallest eigenvalue of the operator."""
        definite, shift = operator.kind != "hessian", operator.shift
        if self.scale is not None and definite:
            return self.scale, shift
        known = self.spectrum or spectrum_of(lambda v: operator(v) - shift * v, rhs.shape[1], rhs[:1])
        scale = stable_scale(known, shift) if self.scale is None else self.scale
        return scale, shift if definite else min(0.0, known.smallest) + shift

    def _averaged(self, operator: Curvature, rhs: Tensor, scale: float, smallest: float, keeper: Keeper) -> Solution:
        """The mean of as many recursions as each row needs."""
        total, value = torch.zeros_like(rhs), torch.zeros_like(rhs)
        done, steps = torch.zeros(len(rhs), dtype=torch.int64), torch.zeros(len(rhs), dtype=torch.int64)
        residual, bound = (torch.full((len(rhs),), math.inf, dtype=torch.float64, device=rhs.device) for _ in range(2))
        kept, first = keeper.found(), 0
        kept = kept if kept is not None and "residuals" in kept else None  # older versions kept another state
        if kept is not None:
            total, first = kept["total"].to(rhs), int(kept["repeat"])
            done, steps = kept["done"].cpu().clone(), kept["steps"].cpu().clone()
        for repeat in range(first, self.repeats):
            open_rows = torch.nonzero(~(bound <= self.tolerance)).flatten().cpu()
            left = open_rows if kept is None else kept["left"].cpu()
            outer = {"total": total.clone(), "done": done.clone(), "steps": steps.clone(), "left": left,
                     "repeat": torch.tensor(repeat)}  # fmt: skip

            def offer(now: Callable[[], State], outer: State = outer) -> None:
                keeper.offer(lambda: {**outer, **now()})

            walk = _Walk(rhs[left], scale, self.seed + repeat, kept)
            self._recursion(operator, rhs[left], smallest, walk, offer)
            kept = None
            total[left] += walk.best
            done[left] += 1
            steps[left] += walk.counts[:, 0]
            value = total / done.to(rhs)[:, None]
            # The mean of one recursion was looked at when it was kept.
            seen = repeat == 0 and bool(torch.isfinite(walk.residuals).all())
            residual = walk.residuals.to(rhs.device) if seen else relative_residual(operator, value, rhs)
            bound = self._bound(smallest, residual, value, rhs)
            if bool((bound <= self.tolerance).all()):
                break
        converged = bound <= self.tolerance
        reasons = tuple(
            "" if ok else "not finite" if not math.isfinite(r) else self._reason(r, smallest)
            for ok, r in zip(converged.tolist(), residual.tolist(), strict=True)
        )
        return Solution(value, residual, steps, converged, reasons)

    def _reason(self, residual: float, smallest: float) -> str:
        if smallest < 0:
            return "the Hessian is indefinite at this damping; use --curvature ggn or more damping"
        if self.scale is not None and residual > 1:
            return "the recursion diverged, its scale is too small; leave --scale and --depth to be estimated"
        return "stopped before its error bound met the tolerance"

    def _recursion(
        self, operator: Curvature, rhs: Tensor, smallest: float, walk: _Walk, offer: Callable[..., None]
    ) -> None:
        """One recursion in rounds of steps, a look at the true residual after each.

        Rows that do the same walk together; each goes the way that it would go alone. Those with the smallest batch
        go first, so that the rows that are to take a larger one begin it together, whenever they came to it.
        """
        n = operator.n_train
        if not walk.counts.any():
            walk.counts[:, 1] = min(n, self.sample_batch or FIRST_BATCH)
            walk.counts[:, 2] = self._depth(smallest, float(walk.reals[0, 0]))
        while (group := walk.together(n, self.tolerance)) is not None:
            rows, steps, batch, scale = group
            v, generator = rhs[rows], walk.generator_of(rows)
            h = _stepped(operator, steps, batch, generator, walk.h[rows], v, scale)
            walk.h[rows] = h
            walk.generators[rows] = generator.get_state()
            walk.counts[rows, 0] += steps
            residual = relative_residual(operator, h / scale, v)
            bound = self._bound(smallest, residual, h / scale, v)
            # Zero where it is not a number, which no more steps will change.
            worst = torch.where(torch.isnan(bound), 0.0, bound).tolist()
            far = self._diverged(operator, h, v, scale)
            for place, row in enumerate(rows.tolist()):
                if far[place]:
                    self._start_over(walk, row, rhs, smallest)
                else:
                    self._decide(walk, row, worst[place], float(residual[place]), n)
            offer(walk.state)

    def _start_over(self, walk: _Walk, row: int, rhs: Tensor, smallest: float) -> None:
        """A row that diverged: from its beginning with twice the scale, unless that was asked for."""
        step, _, _, doublings, _ = walk.counts[row].tolist()
        if self.scale is not None or doublings >= MAX_DOUBLINGS:
            walk.finish(row)
            return
        scale = 2 * float(walk.reals[row, 0])
        walk.h[row] = rhs[row]
        walk.reals[row] = torch.tensor([scale, float(walk.reals[row, 1]), math.inf], dtype=torch.float64)
        walk.counts[row, 2], walk.counts[row, 3] = step + self._depth(smallest, scale), doublings + 1

    def _decide(self, walk: _Walk, row: int, worst: float, residual: float, n: int) -> None:
        """Keep what is better, and see how a row goes on."""
        scale, best, last = walk.reals[row].tolist()
        batch = int(walk.counts[row, 1])
        if worst < best:
            walk.best[row] = walk.h[row] / scale
            walk.reals[row, 1], walk.residuals[row] = worst, residual
        if worst > 0.9 * last and batch < n:
            if self.sample_batch is not None:
                walk.finish(row)  # the noise of the batch size that was asked for: it will not get better
            walk.enlarge(row, min(n, 2 * batch))
        elif worst > 0.9999 * last:
            walk.finish(row)  # as stable as rounding lets it be
        walk.reals[row, 2] = worst

    def _diverged(self, operator: Curvature, h: Tensor, rhs: Tensor, scale: float) -> list[bool]:
        """Which rows are far beyond the largest fixed point that the damping allows."""
        limit = 1e3 * scale * norms(rhs) / max(operator.shift, 1e-3 * scale)
        far: list[bool] = (torch.isfinite(norms(rhs)) & ~(norms(h) <= limit)).tolist()
        return far

    def _bound(self, smallest: float, residual: Tensor, value: Tensor, rhs: Tensor) -> Tensor:
        """`|residual| / (smallest |s|)`, an upper bound of the relative error; the residual itself without damping."""
        if smallest == 0:
            return residual
        if smallest < 0:
            return torch.full_like(residual, math.inf)
        return residual * norms(rhs) / (smallest * norms(value)).clamp_min(1e-300)

    def _depth(self, smallest: float, scale: float) -> int:
        """Steps until the slowest direction, which shrinks by `1 - smallest/scale`, is below the tolerance."""
        if self.depth is not None:
            return self.depth
        return steps_needed(scale, smallest, self.tolerance)


def stable_scale(spectrum: Spectrum, shift: float) -> float:
    """A scale at which the recursion does not diverge: a third above the largest eigenvalue of `C + shift I`.

    A third, for single batches curve more than the mean.
    """
    return 1.33 * (max(0.0, spectrum.largest) + shift) + 1e-12


def steps_needed(scale: float, smallest: float, tolerance: float) -> int:
    """Steps after which the slowest direction, which shrinks by `1 - smallest/scale` each, is surely below `tolerance`.

    >>> steps_needed(2.0, 0.1, 0.02)
    349
    """
    if smallest <= 0:
        return NO_DAMPING_DEPTH if smallest == 0 else HOPELESS_DEPTH
    return 100 + math.ceil(2 * scale / smallest * math.log(10 / min(tolerance, 1.0)))


class _Walk:
    """Where one recursion has come to, row by row.

    `reals` (K, 3) are scale, best bound and last bound, `residuals` (K,) those of the best; `counts` (K, 5) step,
    batch, depth, doublings and whether the row has come to its end; `generators` (K, .) what draws its batches.
    """

    def __init__(self, rhs: Tensor, scale: float, seed: int, kept: State | None) -> None:
        self.h, self.best = rhs.clone(), rhs / scale
        self.reals = torch.tensor([[scale, math.inf, math.inf]], dtype=torch.float64).repeat(len(rhs), 1)
        self.residuals = torch.full((len(rhs),), math.inf, dtype=torch.float64)
        self.counts = torch.zeros(len(rhs), 5, dtype=torch.int64)
        self.seed, self.generators = seed, torch.Generator().manual_seed(seed).get_state().repeat(len(rhs), 1)
        if kept is not None:
            self.h, self.best = kept["h"].to(rhs, copy=True), kept["best"].to(rhs, copy=True)
            self.reals, self.residuals, self.counts, self.generators = (
                kept[name].cpu().clone() for name in ("reals", "residuals", "counts", "generators")
            )

    def together(self, n: int, tolerance: float) -> tuple[Tensor, int, int, float] | None:
        """Rows that do the same next, the steps they do, their batch and scale; None when all are at their end."""
        step, batch, depth = self.counts[:, 0], self.counts[:, 1], self.counts[:, 2]
        going = (self.counts[:, 4] == 0) & (step < depth) & (self.reals[:, 1] > tolerance)
        if not bool(going.any()):
            return None
        # A look costs one pass over the data: every fourth pass' worth of steps, every 20th of full passes.
        steps = torch.minimum(depth - step, torch.where(batch == n, 20, -(-4 * n // batch)))
        least = going & (batch == batch[going].min())
        first = int(torch.where(least, step, torch.iinfo(torch.int64).max).argmin())
        same = going & (steps == steps[first]) & (batch == batch[first]) & (self.reals[:, 0] == self.reals[first, 0])
        if batch[first] < n:  # whole passes draw nothing
            same &= (self.generators == self.generators[first]).all(1)
        rows = torch.nonzero(same).flatten()
        return rows, int(steps[first]), int(batch[first]), float(self.reals[first, 0])

    def generator_of(self, rows: Tensor) -> torch.Generator:
        """What draws the batches of rows that go together."""
        generator = torch.Generator()
        generator.set_state(self.generators[rows[0]].clone())
        return generator

    def enlarge(self, row: int, batch: int) -> None:
        """A row goes on with batches of another size, drawn by a seed of that size."""
        self.counts[row, 1] = batch
        self.generators[row] = torch.Generator().manual_seed((self.seed + SEED_STEP * batch) % 2**32).get_state()

    def finish(self, row: int) -> None:
        """A row goes on no more."""
        self.counts[row, 4] = 1

    def state(self) -> State:
        """Everything that goes on from here."""
        return {
            "h": self.h, "best": self.best, "reals": self.reals, "residuals": self.residuals, "counts": self.counts,
            "generators": self.generators,
        }  # fmt: skip


def _stepped(
    operator: Curvature, steps: int, batch: int, generator: torch.Generator, h: Tensor, v: Tensor, scale: float
) -> Tensor:
    """So many steps from h, which may be overwritten, each with C over `batch` samples drawn without replacement."""
    n = operator.n_train
    if batch < n and operator.kind != "fisher":
        drawn = [torch.randperm(n, generator=generator)[:batch].tolist() for _ in range(steps)]
        return operator.steps(drawn, h, v, scale)
    for _ in range(steps):
        found = operator(h)
        # In place: memory that is new to the process costs more than the sum.
        h.add_(v).add_(found, alpha=-1 / scale)
    return h
