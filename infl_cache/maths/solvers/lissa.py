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
NO_DAMPING_DEPTH = 5000
# Steps for an indefinite operator, for which the recursion has no limit to go to.
HOPELESS_DEPTH = 20


@dataclass(frozen=True)
class LiSSA:
    """Stops a row when `|residual| / (smallest |s|) <= tolerance`, which bounds the relative error of `s`.

    `smallest` is the operator's smallest eigenvalue: at least `lambda + weight_decay` for ggn; estimated for the
    Hessian, and where that is not positive nothing is ever called converged.
    `scale`, `depth`, `sample_batch` are estimated where they are None. Up to `repeats` recursions are averaged: no more
    are begun once every row's average meets the tolerance.
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
        total, first, steps = torch.zeros_like(rhs), 0, 0
        kept = keeper.found()
        kept = kept if kept is not None and "total" in kept else None  # older versions kept the mean
        if kept is not None:
            total, (first, steps) = kept["total"].to(rhs), kept["repeats"].tolist()
        for repeat in range(first, self.repeats):
            outer = {"total": total.clone(), "repeats": torch.tensor([repeat, steps])}

            def offer(now: Callable[[], State], outer: State = outer) -> None:
                keeper.offer(lambda: {**outer, **now()})

            walk = _Walk(rhs, scale, self.seed + repeat, kept if repeat == first else None)
            self._recursion(operator, rhs, smallest, walk, offer)
            total += walk.best
            steps += walk.step
            value = total / (repeat + 1)
            residual = relative_residual(operator, value, rhs)
            if bool((self._bound(smallest, residual, value, rhs) <= self.tolerance).all()):
                break
        converged = self._bound(smallest, residual, value, rhs) <= self.tolerance
        reasons = tuple(
            "" if ok else "not finite" if not math.isfinite(r) else self._reason(r, smallest)
            for ok, r in zip(converged.tolist(), residual.tolist(), strict=True)
        )
        return Solution(value, residual, torch.full((len(rhs),), steps), converged, reasons)

    def _reason(self, residual: float, smallest: float) -> str:
        if smallest < 0:
            return "the Hessian is indefinite at this damping; use --curvature ggn or more damping"
        if self.scale is not None and residual > 1:
            return "the recursion diverged, its scale is too small; leave --scale and --depth to be estimated"
        return "stopped before its error bound met the tolerance"

    def _recursion(
        self, operator: Curvature, rhs: Tensor, smallest: float, walk: _Walk, offer: Callable[..., None]
    ) -> None:
        """One recursion in rounds of steps, a look at the true residual after each."""
        n = operator.n_train
        if not walk.step:
            walk.batch = min(n, self.sample_batch or FIRST_BATCH)
            walk.depth = self._depth(smallest, walk.scale)
        while walk.step < walk.depth and walk.best_worst > self.tolerance:
            # A look costs one pass over the data: every second pass' worth of steps, every 20th of full passes.
            steps = min(walk.depth - walk.step, 20 if walk.batch == n else -(-2 * n // walk.batch))
            for _ in range(steps):
                found = _sampled(operator, walk.batch, walk.generator, walk.h)
                # In place: memory that is new to the process costs more than the sum.
                walk.h.add_(rhs).add_(found, alpha=-1 / walk.scale)
            walk.step += steps
            if self._diverged(operator, walk.h, rhs, walk.scale):
                if self.scale is not None:
                    break
                walk.scale, walk.h, walk.last = 2 * walk.scale, rhs.clone(), math.inf
                walk.doublings += 1
                left = self._depth(smallest, walk.scale) if walk.doublings <= MAX_DOUBLINGS else 0
                walk.depth = walk.step + left
                continue
            worst = self._worst(operator, smallest, walk.h / walk.scale, rhs)
            if worst < walk.best_worst:
                walk.best, walk.best_worst = walk.h / walk.scale, worst
            if worst > 0.9 * walk.last and walk.batch < n:
                if self.sample_batch is not None:
                    break  # the noise of the batch size that was asked for: it will not get better
                walk.batch = min(n, 2 * walk.batch)
            elif worst > 0.9999 * walk.last:
                break  # as stable as rounding lets it be
            walk.last = worst
            offer(walk.state)

    def _diverged(self, operator: Curvature, h: Tensor, rhs: Tensor, scale: float) -> bool:
        """Whether some row is far beyond the largest fixed point that the damping allows."""
        finite = torch.isfinite(norms(rhs))
        limit = 1e3 * scale * norms(rhs) / max(operator.shift, 1e-3 * scale)
        return not bool((norms(h)[finite] <= limit[finite]).all())

    def _worst(self, operator: Curvature, smallest: float, value: Tensor, rhs: Tensor) -> float:
        bound = self._bound(smallest, relative_residual(operator, value, rhs), value, rhs)
        finite = bound[~torch.isnan(bound)]
        return float(finite.max()) if len(finite) else 0.0

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
    """Where one recursion has come to."""

    def __init__(self, rhs: Tensor, scale: float, seed: int, kept: State | None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.h, self.best, self.scale = rhs.clone(), rhs / scale, scale
        self.best_worst, self.last = math.inf, math.inf
        self.step = self.batch = self.depth = self.doublings = 0
        if kept is not None:
            self.generator.set_state(kept["generator"].cpu())
            self.h, self.best = kept["h"].to(rhs, copy=True), kept["best"].to(rhs)
            self.scale, self.best_worst, self.last = kept["reals"].tolist()
            self.step, self.batch, self.depth, self.doublings = kept["counts"].tolist()

    def state(self) -> State:
        """Everything that goes on from here."""
        return {
            "generator": self.generator.get_state(), "h": self.h, "best": self.best,
            "reals": torch.tensor([self.scale, self.best_worst, self.last], dtype=torch.float64),
            "counts": torch.tensor([self.step, self.batch, self.depth, self.doublings]),
        }  # fmt: skip


def _sampled(operator: Curvature, batch: int, generator: torch.Generator, h: Tensor) -> Tensor:
    """The operator with C over `batch` training samples drawn without replacement."""
    if batch >= operator.n_train or operator.kind == "fisher":
        return operator(h)
    chosen = torch.randperm(operator.n_train, generator=generator)[:batch].tolist()
    return operator.sampled(chosen, h)
