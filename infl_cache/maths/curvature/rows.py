"""Passes over the training set that are kept in memory where they fit: batches of samples, or their Jacobian rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from infl_cache.maths.capture.forms import Forms
from infl_cache.maths.cast import in_dtype
from infl_cache.maths.curvature.jacobian import (
    Jacobian,
    capture_jacobian,
    forms_for_products,
    product,
    taken,
    together,
)
from infl_cache.maths.curvature.products import batch_product
from infl_cache.maths.samples import Batch, size_in_bytes
from infl_cache.maths.task import Task, out_of_memory

T = TypeVar("T")
# More outputs a sample than this are never differentiated one by one.
MOST_OUTPUTS = 1024


@dataclass(frozen=True)
class Rows:
    """Jacobian rows of the whole training set, a pass at a time, in the forms they have; `row_bytes` a sample.

    `of_batch` captures those of any batch, where that is cheaper than to differentiate twice.
    """

    forms: Forms
    passes: Callable[[], Iterable[Jacobian]]
    row_bytes: int
    of_batch: Callable[[Batch], Jacobian] | None = None

    def kept(self) -> Sequence[Jacobian] | None:
        """Those of the whole training set, where they are kept in memory."""
        return self.passes.kept() if isinstance(self.passes, Remembered) else None

    def of_samples(self, positions: Sequence[int]) -> Jacobian | None:
        """The rows of some samples, by their places in a pass; None where rows are not kept in memory."""
        every = self.kept()
        if not every:
            return None
        starts = list(itertools.accumulate((each.size for each in every), initial=0))
        parts = []
        for each, start in zip(every, starts, strict=False):
            inside = [position - start for position in sorted(positions) if start <= position < start + each.size]
            if inside:
                parts.append(taken(each, torch.tensor(inside, device=each.dense.device)))
        return together(parts)


def output_rows(
    task: Task, forms: Forms, probe: Batch, dtype: torch.dtype, note: Callable[[str], None]
) -> tuple[Task, Forms, int, int] | None:
    """What is needed to capture rows of the outputs' Jacobian, the bytes and the rows of a sample; None if they cannot.

    One product with them is compared with one by differentiating twice.
    """
    if forms.mapped or any(unit.engine == "loop" for unit in forms.alone):
        return None
    try:
        task = in_dtype(task, dtype)
        with torch.no_grad():
            outputs = task.forward(task.model, probe.data)
        size = len(probe.indices)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.shape[:1] != (size,):
            return None
        count = outputs.numel() // size
        if not 0 < count <= MOST_OUTPUTS:
            return None
        forms = forms_for_products(forms, count)
        rows = capture_jacobian(task, forms, probe)
        vectors = torch.randn(2, forms.parameters.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vectors = vectors.to(rows.dense)
        found = product(forms, [rows], vectors)
        # Two vectors are not worth importing `torch.func` for, which takes seconds.
        expected = batch_product(task, forms.parameters, "ggn", probe, vectors, note, plain=True)
    except Exception as error:  # models that cannot be copied, watched or cast fail in many ways: they go the other way
        if out_of_memory(error):
            raise
        return None
    bound = 1e-8 if dtype == torch.float64 else 2e-3
    if not float((found - expected).norm()) <= bound * float(expected.norm()):
        note("products from captured rows differ from differentiating twice, which takes their place")
        return None
    return task, forms, -(-rows.n_bytes // size), count


def captured(task: Task, forms: Forms, batches: Callable[[], Iterable[Batch]]) -> Callable[[], Iterable[Jacobian]]:
    """Passes of the Jacobian rows of batches."""
    return lambda: (capture_jacobian(task, forms, batch) for batch in batches())


def batch_bytes(batch: Any) -> int:
    """Bytes of a batch's tensors."""
    return size_in_bytes(batch.data)


class Remembered(Generic[T]):
    """Passes over what `load` gives, kept in memory after the first one if that fits into `budget` bytes."""

    def __init__(self, load: Callable[[], Iterable[T]], budget: int, bytes_of: Callable[[T], int]) -> None:
        self._load, self._budget, self._bytes_of = load, budget, bytes_of
        self._kept: list[T] = []
        # Whether it fits, once a pass has come to its end.
        self._fits: bool | None = None

    def __call__(self) -> Iterator[T]:
        """One pass."""
        if self._fits:
            yield from self._kept
            return
        self._kept.clear()
        total = 0
        for each in self._load():
            total += self._bytes_of(each)
            if total <= self._budget:
                self._kept.append(each)
            else:
                self._kept.clear()
            yield each
        self._fits = total <= self._budget

    def kept(self) -> Sequence[T] | None:
        """All of it, after a pass if there was none yet; None where it does not fit."""
        if self._fits is None:
            for _ in self():
                pass
        return self._kept if self._fits else None


def remembered(
    load: Callable[[], Iterable[T]], budget: int, bytes_of: Callable[[T], int] = batch_bytes
) -> Remembered[T]:
    """`load`, kept in memory after the first pass if what it gives fits into `budget` bytes."""
    return Remembered(load, budget, bytes_of)
