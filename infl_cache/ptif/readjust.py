r"""LiSSA that does not explode: the scale by the spectrum where the one given will not do, and what was saved.

With :math:`h \leftarrow v + (1 - damp/scale)\, h - C h / scale` and :math:`s = h / scale` the limit
:math:`(C + damp\, I)^{-1} v` is the same at any scale; the recursion diverges unless the scale exceeds (half of) the
largest eigenvalue of the damped curvature, and the number of steps grows with it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from infl_cache.config import Options
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.maths.capture import decide_forms
from infl_cache.maths.curvature import Spectrum
from infl_cache.maths.probe import check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import spread
from infl_cache.maths.solvers.lissa import stable_scale, steps_needed
from infl_cache.maths.task import Task
from infl_cache.ptif.config import Config
from infl_cache.stages.grads import CHECKED_SAMPLES, rows_at_once
from infl_cache.stages.opening import Opened, looked_at
from infl_cache.stages.spectrum import chosen_damping, estimated_spectrum
from infl_cache.stages.system import curvature_kind

log = logging.getLogger("infl_cache")

LISSA_TOLERANCE = 0.02


@dataclass(frozen=True)
class Adjusted:
    """The scale to give (None: the machinery takes the stable one), and what there is to say about it."""

    scale: float | None
    facts: dict[str, Any]


def adjusted(config: Config, folder: RunFolder, task: Task, options: Options) -> Adjusted:
    """The scale for LiSSA; of other solvers nothing is to be chosen.

    Raises `BadInput` for a scale that could diverge, unless `config.readjust`.
    """
    if config.solver != "lissa" or config.scale is None:
        return Adjusted(None, {})
    with looked_at(folder, task, options) as run:
        spectrum = spectrum_for(run)
        shift = chosen_damping(run, spectrum) + task.weight_decay
        definite = curvature_kind(options.stest) != "hessian"
    return _adjusted(config, spectrum, shift, shift if definite else min(0.0, spectrum.smallest) + shift)


def spectrum_for(run: Opened) -> Spectrum:
    """The spectrum of the undamped curvature, as stage 2 will estimate it."""
    task = run.task
    check_independence(task, "train", spread(len(task.train), 4), run.device)
    check_gradients_arrive(task, run.parameters, spread(len(task.train), 4), run.device)
    first = probe_batch(task, range(min(CHECKED_SAMPLES, len(task.train))), run.device)
    forms, _ = decide_forms(task, run.parameters, first, "dense", rows_at_once(run))
    return estimated_spectrum(run, forms, log.warning)[0]


def _adjusted(config: Config, spectrum: Spectrum, shift: float, smallest: float) -> Adjusted:
    assert config.scale is not None
    largest, stable = max(0.0, spectrum.largest) + shift, stable_scale(spectrum, shift)
    tolerance = LISSA_TOLERANCE if config.tolerance is None else config.tolerance
    facts = {"scale_asked": config.scale, "largest_eigenvalue": largest}
    # Of what the machinery takes by itself, which is rounded here.
    chosen = Adjusted(None, {**facts, "scale": float(f"{stable:.6g}")})
    if config.scale < stable and config.readjust:
        log.info(
            f"scale: {config.scale:g} could diverge, the damped curvature's largest eigenvalue is {largest:.3g};"
            f" {stable:.3g} is taken, which gives the same result"
        )
        return chosen
    if config.scale <= largest:
        raise BadInput(
            f"config['scale']: expected more than {largest:.3g}, the largest eigenvalue of the damped curvature, found"
            f" {config.scale:g}: LiSSA could diverge; give {stable:.3g}, or None, or config['readjust'] = True"
        )
    steps, fewer = steps_needed(config.scale, smallest, tolerance), steps_needed(stable, smallest, tolerance)
    if config.readjust and fewer < steps and steps > config.recursion_depth:
        log.info(
            f"scale: {config.scale:g} may take {steps:,} steps, more than recursion_depth {config.recursion_depth:,};"
            f" {stable:.3g} is taken, which gives the same result in fewer (at most {fewer:,})"
        )
        return chosen
    return Adjusted(config.scale, {**facts, "scale": config.scale})


def saved_steps(config: Config, iterations: Any) -> dict[str, Any]:
    """How many of the steps that were allowed the test samples took (`iterations`, one of each)."""
    if config.solver != "lissa":
        return {}
    allowed, taken = config.recursion_depth * config.r, np.asarray(iterations, np.int64)
    found = {
        "steps_allowed": allowed,
        "steps_median": float(np.median(taken)),
        "steps_most": int(taken.max()),
        "steps_saved": round(1 - float(taken.mean()) / allowed, 4),
    }
    if found["steps_saved"] > 0:
        log.info(
            f"LiSSA: of recursion_depth {config.recursion_depth:,} times r {config.r} a test sample took"
            f" {found['steps_median']:,.0f} steps (median, at most {found['steps_most']:,}):"
            f" {found['steps_saved']:.0%} saved, the bound of the error was met"
        )
    return found
