"""What 16-bit storage does to the influence values themselves: estimated by stage 1, measured by stage 3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infl_cache.maths import scores
from infl_cache.maths.capture import Factors, Forms, capture, rows_of
from infl_cache.maths.narrow import agreement
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import groups_of, spread
from infl_cache.stages.opening import Opened
from infl_cache.stages.stored import rounded

TRAIN_SAMPLES, TEST_SAMPLES = 256, 8


def measured_rounding(run: Opened, forms: Forms, dtype: str, queries: Tensor, at_once: int) -> dict[str, float | int]:
    """Influences of some training samples on `queries` (M, n_params), from exact and from rounded gradients."""
    wide = next(run.task.model.parameters()).dtype
    chosen = spread(len(run.task.train), TRAIN_SAMPLES)
    asked = scores.queries(forms, queries.to(wide))
    exact, kept = [], []
    for group in groups_of(0, len(chosen), forms.at_once(max(1, at_once))):
        captured = capture(run.task, forms, probe_batch(run.task, chosen[group.start : group.stop], run.device))
        exact.append(scores.scores(forms, asked, captured.factors, captured.dense, run.budget // 8))
        factors, dense = rounded(forms, captured, dtype, wide)
        kept.append(scores.scores(forms, asked, factors, dense, run.budget // 8))
    right, found = torch.cat(exact, 1).double(), torch.cat(kept, 1).double()
    finite = torch.isfinite(right).all(0)  # samples without a finite gradient have no influence to be compared
    return {**agreement(right[:, finite], found[:, finite]), "train": int(finite.sum()), "test": len(queries)}


def product_error(
    forms: Forms, queries: Tensor, factors: Factors, dense: Tensor, budget: int
) -> dict[str, float | int]:
    """Influences of some training samples on `queries` (M, n_params), in bfloat16 beside their own type."""
    kept = {key: (a[:TRAIN_SAMPLES], g[:TRAIN_SAMPLES]) for key, (a, g) in factors.items()}
    finite = queries[torch.isfinite(queries).all(1)]
    right, found = (
        scores.scores(forms, scores.queries(forms, finite.to(kind)), kept, dense[:TRAIN_SAMPLES], budget).double()
        for kind in (finite.dtype, torch.bfloat16)
    )
    columns = torch.isfinite(right).all(0)
    return {**agreement(right[:, columns], found[:, columns]), "train": int(columns.sum()), "test": len(finite)}


def test_gradients(run: Opened, forms: Forms, at_once: int) -> Tensor:
    """Gradients of some test samples (M, n_params): they stand in for their s_test until stage 2 has computed it."""
    rows = torch.cat([_row(run, forms, index) for index in spread(len(run.task.test), min(TEST_SAMPLES, at_once))])
    return rows[torch.isfinite(rows).all(1)]


def rounding_line(rounding: Mapping[str, float]) -> str:
    """The error that 16-bit storage makes in the influences, in words."""
    return (
        f"influences change by {rounding['relative']:.1e} (relative norm), lowest Spearman {rounding['spearman']:.6f},"
        f" measured on {rounding['train']:.0f} x {rounding['test']:.0f} pairs"
    )


def _row(run: Opened, forms: Forms, index: int) -> Tensor:
    captured = capture(run.task, forms, probe_batch(run.task, [index], run.device, "test"), measure=True)
    return rows_of(forms, captured.factors, captured.dense)
