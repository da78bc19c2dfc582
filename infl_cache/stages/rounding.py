"""What 16-bit storage does to the influence values themselves, measured before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from infl_cache.maths import scores
from infl_cache.maths.capture import Forms, capture, rows_of
from infl_cache.maths.narrow import agreement
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import groups_of, spread
from infl_cache.stages.opening import Opened
from infl_cache.stages.stored import rounded

TRAIN_SAMPLES, TEST_SAMPLES = 256, 8


def measured_rounding(run: Opened, forms: Forms, dtype: str, at_once: int) -> dict[str, float | int]:
    """Influences of some training samples on some test samples, exact and from rounded gradients, compared.

    The gradients of the test samples stand in for their s_test, which stage 2 has yet to compute.
    """
    wide = next(run.task.model.parameters()).dtype
    tests = spread(len(run.task.test), min(TEST_SAMPLES, at_once))
    chosen = spread(len(run.task.train), TRAIN_SAMPLES)
    asked = scores.queries(forms, torch.cat([_row(run, forms, index) for index in tests]).to(wide))
    exact, kept = [], []
    for group in groups_of(0, len(chosen), max(1, at_once)):
        captured = capture(run.task, forms, probe_batch(run.task, chosen[group.start : group.stop], run.device))
        exact.append(scores.scores(forms, asked, captured.factors, captured.dense, run.budget // 8))
        factors, dense = rounded(forms, captured, dtype, wide)
        kept.append(scores.scores(forms, asked, factors, dense, run.budget // 8))
    found = agreement(torch.cat(exact, 1).double(), torch.cat(kept, 1).double())
    return {**found, "train": len(chosen), "test": len(tests)}


def _row(run: Opened, forms: Forms, index: int) -> Tensor:
    captured = capture(run.task, forms, probe_batch(run.task, [index], run.device, "test"), measure=True)
    return rows_of(forms, captured.factors, captured.dense)
