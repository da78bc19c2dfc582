"""Once a run, before anything is solved: the curvature's spectrum, the damping that `auto` stands for, warnings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from infl_cache.config import StestOptions
from infl_cache.maths.capture import Forms
from infl_cache.maths.curvature import Spectrum, require_finite, spectrum_of
from infl_cache.stages.opening import Opened
from infl_cache.stages.system import curvature_kind, curvature_samples, damped_curvature

# Training samples that the spectrum is estimated over: its ends hardly move beyond.
SPECTRUM_SAMPLES = 4096
# `--damping auto`: conjugate gradients then need some tens of steps, and float32 has digits to spare.
AUTO_FRACTION = 1e-3
# An indefinite operator is moved this much further than its smallest eigenvalue asks for.
AUTO_MARGIN = 1.5


def needs_spectrum(options: StestOptions) -> bool:
    """Whether the curvature is looked at before: by what chooses from it, iterates, or is to be warned.

    `fisher` and `ekfac` invert what they have made, `lissa` chooses its scale from it unless that was asked for, and a
    sum of squares is never indefinite.
    """
    chosen = options.solver == "ekfac" or (options.solver == "lissa" and options.scale is not None)
    return options.damping == "auto" or not (
        options.solver == "fisher" or (chosen and curvature_kind(options) != "hessian")
    )


def known_damping(run: Opened) -> float:
    """The damping, where it does not hang on a spectrum."""
    asked = run.options.stest.damping
    return 0.0 if asked == "auto" else asked


def known_spectrum(run: Opened, forms: Forms, note: Callable[[str], None], stage: str = "stest") -> Spectrum:
    """The spectrum of the curvature without damping, from the stage's plan, or estimated now and kept there."""
    plan = run.folder.plan(stage)
    if "spectrum" not in plan:
        found, count = estimated_spectrum(run, forms, note)
        run.folder.remember(stage, spectrum={**dataclasses.asdict(found), "samples": count})
    kept = run.folder.plan(stage)["spectrum"]
    return Spectrum(**{field.name: kept[field.name] for field in dataclasses.fields(Spectrum)})


def estimated_spectrum(run: Opened, forms: Forms, note: Callable[[str], None]) -> tuple[Spectrum, int]:
    """The spectrum of the curvature without damping, and the number of training samples it is estimated over."""
    rows = curvature_samples(run, SPECTRUM_SAMPLES)
    operator = damped_curvature(run, forms, 1, -run.task.weight_decay, rows, tick=run.check, note=note)
    like = torch.empty(0, dtype=operator.dtype, device=run.device)
    found = spectrum_of(operator, run.parameters.size, like)
    require_finite(math.isfinite(found.largest))
    if operator.kind != "hessian":  # a sum of squares; what the estimate finds below zero is its own margin
        found = dataclasses.replace(found, smallest=max(0.0, found.smallest))
    return found, len(rows)


def chosen_damping(run: Opened, spectrum: Spectrum) -> float:
    """The damping that was asked for, or what `auto` makes of the spectrum."""
    asked = run.options.stest.damping
    if asked != "auto":
        return asked
    return auto_damping(spectrum, run.task.weight_decay)


def auto_damping(spectrum: Spectrum, weight_decay: float) -> float:
    """A thousandth of the largest eigenvalue, and beyond the smallest where that is negative.

    >>> auto_damping(Spectrum(largest=2.0, smallest=0.0, mean=0.1, steps=9), weight_decay=0.0)
    0.002
    """
    least = AUTO_FRACTION * max(spectrum.largest, -spectrum.smallest, 1e-12)
    return max(least, -AUTO_MARGIN * (spectrum.smallest + weight_decay))


def advice(run: Opened, spectrum: Spectrum, damping: float) -> list[str]:
    """In plain words, what the spectrum says against the system that was asked for."""
    lowest = spectrum.smallest + run.task.weight_decay + damping
    # The estimate's own rounding is no sign of anything.
    if curvature_kind(run.options.stest) == "hessian" and lowest < -1e-5 * abs(spectrum.largest):
        enough = auto_damping(spectrum, run.task.weight_decay)
        return [
            f"the damped Hessian is indefinite: its smallest eigenvalue is about {lowest:.2g}, the largest"
            f" {spectrum.largest:.2g}; use --curvature ggn, or --damping {enough:.2g} or more"
        ]
    return []
