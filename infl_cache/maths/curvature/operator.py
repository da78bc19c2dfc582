"""The damped curvature as one operator, whatever its products are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infl_cache.errors import BadInput
from infl_cache.maths.curvature.jacobian import Jacobian, product, steps
from infl_cache.maths.curvature.products import batch_product
from infl_cache.maths.curvature.rows import Rows
from infl_cache.maths.params import Parameters
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task


def _nothing() -> None:
    """The default of `tick`."""


def _say_nothing(text: str) -> None:
    """The default of `note`."""


@dataclass(frozen=True)
class Curvature:
    """The operator `C + (weight_decay + damping) I` on `(K, n_params)`, C the mean over `n_train` samples.

    `batches()` gives one pass over the training set, `pick(indices)` some of its samples; `tick()` is called
    before each batch and may raise to stop a long product; `note(text)` hears of slower ways that had to be
    taken. Arithmetic is in `dtype`. Where `rows` are given (always for fisher) they make the products; `other_rows`
    is for approximations where they are not.
    """

    task: Task
    parameters: Parameters
    kind: Literal["ggn", "hessian", "fisher"]
    batches: Callable[[], Iterable[Batch]]
    pick: Callable[[Sequence[int]], Iterable[Batch]]
    n_train: int
    damping: float
    dtype: torch.dtype
    tick: Callable[[], None] = _nothing
    note: Callable[[str], None] = _say_nothing
    rows: Rows | None = None
    other_rows: Callable[[], Rows] | None = None

    def fit_rows(self) -> Rows:
        """Rows whose sum of squares is the curvature, or as near to it as can be had."""
        if self.rows is not None:
            return self.rows
        if self.other_rows is None:
            raise TypeError("expected rows to fit an approximation to, found none")
        return self.other_rows()

    @property
    def shift(self) -> float:
        """What is added to the diagonal: the task's weight decay and the damping."""
        return self.task.weight_decay + self.damping

    def __call__(self, vectors: Tensor) -> Tensor:
        """`(C + shift I) v` for each row v of `vectors` (K, n_params)."""
        if self.rows is None:
            return self.mean_over(self.batches(), self.n_train, vectors)
        total = product(self.rows.forms, self._ticking(self.rows.passes()), vectors)
        return total.div_(self.n_train).add_(vectors, alpha=self.shift)

    def _ticking(self, jacobians: Iterable[Jacobian]) -> Iterator[Jacobian]:
        for each in jacobians:
            self.tick()
            yield each

    def sampled(self, positions: Sequence[int], vectors: Tensor) -> Tensor:
        """The same with C the mean over some training samples."""
        rows = None if self.rows is None else self.rows.of_samples(positions)
        if self.rows is None or rows is None:
            return self.mean_over(self.pick(positions), len(positions), vectors)
        total = product(self.rows.forms, self._ticking([rows]), vectors)
        return total.div_(len(positions)).add_(vectors, alpha=self.shift)

    def steps(self, batches: Sequence[Sequence[int]], vectors: Tensor, rhs: Tensor, scale: float) -> Tensor:
        """`h <- v + h - (C_b + shift I) h / scale` for each b, C_b the mean over a batch of training samples.

        `vectors` and `rhs` are h and v, (K, n_params); neither is written to.
        """
        rows = self.rows
        if rows is not None and rows.kept():
            found = (part for positions in batches if (part := rows.of_samples(positions)) is not None)
            return steps(rows.forms, self._ticking(found), vectors, rhs, 1 - self.shift / scale, 1 / scale)
        for positions in batches:
            vectors = (vectors + rhs).add_(self.sampled(positions, vectors), alpha=-1 / scale)
        return vectors

    def mean_over(self, batches: Iterable[Batch], n: int, vectors: Tensor) -> Tensor:
        """The same with C the mean over the `n` samples of the given batches."""
        if self.rows is not None and self.rows.of_batch is not None:
            jacobians = self._ticking(map(self.rows.of_batch, batches))
            return product(self.rows.forms, jacobians, vectors).div_(n).add_(vectors, alpha=self.shift)
        total = torch.zeros_like(vectors)
        for batch in batches:
            self.tick()
            total += batch_product(self.task, self.parameters, self.kind, batch, vectors, self.note)
        return total.div_(n).add_(vectors, alpha=self.shift)


def require_finite(finite: bool) -> None:
    """`BadInput` where what is made of the training samples is not finite."""
    if not finite:
        raise BadInput(
            "curvature: expected finite products, found NaN or Inf; look at the training samples' losses, or"
            " leave samples without a finite gradient out by --nonfinite skip"
        )
