"""What a validation found: predicted and actual changes, how well they agree, and both as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infl_cache.maths.correlation import error_of_mean, pearson, slope, spearman

# Test samples that have a line of their own in the table.
LINES = 10
WHAT = {
    "loo": "leave-one-out: {n} training samples, one removed at a time",
    "group": "groups: {n} groups of {size} training samples, one removed at a time",
    "lds": "linear datamodeling score: {n} random subsets of {kept} training samples",
}
WAY = {"task": "retrained by the task's own function", "lbfgs": "retrained to the minimum by L-BFGS in float64"}


@dataclass(frozen=True)
class Figures:
    """How well predictions agree with what happened; `slope` is of actual against predicted, 1 is right."""

    pearson: float
    spearman: float
    slope: float


@dataclass(frozen=True)
class Validation:
    """Changes of the measure of test samples when training samples are removed: predicted, and by retraining.

    `predicted[t, k]` is minus the sum of the influences of `removed[k]` on test sample `tests[t]`, `actual[t, k]` is
    measure(retrained without them) - measure(retrained on all). For `loo` and `group` the figures are of all these
    pairs together; for `lds` Pearson and Spearman are means over test samples, `spearman` is the linear datamodeling
    score (Ilyas et al. 2022, Park et al. 2023), `error` the standard error of that mean, and `slope` that of all pairs
    after each test sample's mean has been taken off. `by_test` has the figures of each test sample.

    >>> changes, figures = np.array([[0.25, -0.5]]), Figures(1.0, 1.0, 1.0)
    >>> removed = np.array([3]), np.array([8])
    >>> found = Validation("loo", "lbfgs", "loss", (0,), (0.7,), removed, 20, changes, changes, figures, (figures,))
    >>> print(f"{found.title}: {found.headline}")
    leave-one-out: 2 training samples, one removed at a time: Pearson 1.0000, Spearman 1.0000, slope 1.000
    """

    kind: str
    way: str
    measure: str
    tests: tuple[int, ...]
    losses: tuple[float, ...]
    removed: tuple[NDArray[np.int64], ...]
    n_train: int
    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]
    figures: Figures
    by_test: tuple[Figures, ...]
    error: float = math.nan
    notes: tuple[str, ...] = ()
    retrained: int = 0
    picture: Path | None = None

    @property
    def pearson(self) -> float:
        """Of all pairs; for `lds` the mean over test samples."""
        return self.figures.pearson

    @property
    def spearman(self) -> float:
        """Of all pairs; for `lds` the mean over test samples, which is the score."""
        return self.figures.spearman

    @property
    def slope(self) -> float:
        """Of the line of least squares, actual against predicted."""
        return self.figures.slope

    @property
    def title(self) -> str:
        """What was removed."""
        size = len(self.removed[0])
        return WHAT[self.kind].format(
            n=len(self.removed), size=size, kept=f"{self.n_train - size:,} of {self.n_train:,}"
        )

    @property
    def headline(self) -> str:
        """The figures in one line."""
        if self.kind != "lds":
            return f"Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}, slope {self.slope:.3f}"
        error = f" ± {self.error:.3f}" if math.isfinite(self.error) else ""
        return f"LDS (mean Spearman) {self.spearman:.3f}{error}, Pearson {self.pearson:.3f}, slope {self.slope:.3f}"

    def __str__(self) -> str:
        tests = f"{len(self.tests)} test sample{'s' if len(self.tests) > 1 else ''}"
        lines = [
            f"{self.title}; {tests}",
            f"change of the {self.measure}, {WAY[self.way]} ({self.retrained} now, the others kept from before)"
            if self.retrained <= len(self.removed)
            else f"change of the {self.measure}, {WAY[self.way]}",
            "",
            f"    {self.headline}",
            "",
        ]
        return "\n".join([*lines, *(self._each() if len(self.tests) <= LINES else self._spread())])

    def _each(self) -> list[str]:
        lines = [f"    {'test sample':>11}  {'loss':>9}  {'Pearson':>8}  {'Spearman':>8}  {'slope':>8}  largest change"]
        for t, (test, loss, each) in enumerate(zip(self.tests, self.losses, self.by_test, strict=True)):
            k = int(np.argmax(np.abs(np.nan_to_num(self.predicted[t]))))
            lines.append(
                f"    {test:>11}  {loss:>9.3g}  {each.pearson:>8.3f}  {each.spearman:>8.3f}  {each.slope:>8.3f}"
                f"  {self.predicted[t, k]:+.2e} predicted, {self.actual[t, k]:+.2e} found"
            )
        return lines

    def _spread(self) -> list[str]:
        lines = [
            f"    {'test samples':>12}  {'lowest':>8}  {'quarter':>8}  {'median':>8}  {'quarter':>8}  {'highest':>8}"
        ]
        for name in ("Pearson", "Spearman", "slope"):
            values = np.array([getattr(each, name.lower()) for each in self.by_test])
            marks = np.nanquantile(values, (0, 0.25, 0.5, 0.75, 1)) if np.isfinite(values).any() else [math.nan] * 5
            lines.append(f"    {name:>12}  " + "  ".join(f"{mark:>8.3f}" for mark in marks))
        return lines

    def to_json(self, **facts: Any) -> bytes:
        """Everything, numbers that are not finite as null; `removed` is left out for `lds`, whose seed tells it."""
        content = {
            **facts, "kind": self.kind, "retrained_by": self.way, "measure": self.measure, "title": self.title,
            **vars(self.figures), "error": self.error, "n_train": self.n_train, "notes": list(self.notes),
            "tests": [
                {"test": test, "loss": loss, **vars(each), "predicted": self.predicted[t].tolist(),
                 "actual": self.actual[t].tolist()}
                for t, (test, loss, each) in enumerate(zip(self.tests, self.losses, self.by_test, strict=True))
            ],
            "removed": [each.tolist() for each in self.removed] if self.kind != "lds" else None,
        }  # fmt: skip
        return json.dumps(_finite(content), indent=1).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures_of(
    kind: str, predicted: NDArray[np.float64], actual: NDArray[np.float64], seed: int
) -> tuple[Figures, tuple[Figures, ...], float]:
    """The figures in all, of each test sample (a row), and the standard error of the mean Spearman (of `lds`)."""
    by_test = tuple(_agreement(p, a) for p, a in zip(predicted, actual, strict=True))
    if kind != "lds":
        return _agreement(predicted.ravel(), actual.ravel()), by_test, math.nan
    centred = [(each - np.nanmean(each, axis=1, keepdims=True)).ravel() for each in (predicted, actual)]
    scores = [each.spearman for each in by_test]
    means = Figures(
        float(np.mean([each.pearson for each in by_test])), float(np.mean(scores)), _agreement(*centred).slope
    )
    return means, by_test, error_of_mean(torch.tensor(scores, dtype=torch.float64), seed)


def _agreement(predicted: NDArray[np.float64], actual: NDArray[np.float64]) -> Figures:
    """Of the pairs that are finite; nothing can be said of fewer than two."""
    finite = np.isfinite(predicted) & np.isfinite(actual)
    if finite.sum() < 2:
        return Figures(math.nan, math.nan, math.nan)
    pair: Sequence[torch.Tensor] = [torch.from_numpy(each[finite]) for each in (predicted, actual)]
    return Figures(pearson(*pair), spearman(*pair), slope(*pair))
