"""What the training samples of one class do to the test samples of another: means over rows of the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.stages.columns import classes_of
from infl_cache.stages.standings import NO_CLASS

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Grouped:
    """Classes that are drawn, and the place among them of each sample, -1 where its class is not."""

    labels: list[int]
    place: Ids
    left_out: int

    @classmethod
    def of(cls, targets: NDArray[np.float64], among: Ids | None = None, most: int | None = None) -> Grouped | None:
        """The classes of the samples `among` (of all), at most the `most` largest; None without any."""
        classes = classes_of(targets)
        if classes is None:
            return None
        here = classes if among is None else classes[among]
        labels, counts = np.unique(here[here != NO_CLASS], return_counts=True)
        kept = np.sort(labels[np.argsort(-counts, kind="stable")[:most]])
        if not len(kept):
            return None
        place = np.searchsorted(kept, classes).clip(max=len(kept) - 1)
        place[kept[place] != classes] = -1
        return cls(kept.tolist(), place.astype(np.int64), len(labels) - len(kept))


class Between:
    """The mean influence of the training samples of a class on the test samples of a class; NaN and Inf left out."""

    def __init__(self, train: Grouped, test: Grouped) -> None:
        self.train, self.test = train, test
        members = np.flatnonzero(train.place >= 0)
        # Columns of one class beside one another, so that a class is a run of them.
        self._order = members[np.argsort(train.place[members], kind="stable")]
        self._starts = np.searchsorted(train.place[self._order], np.arange(len(train.labels)))
        shape = len(train.labels), len(test.labels)
        self.sums, self.counts = np.zeros(shape), np.zeros(shape, np.int64)

    def add(self, tests: Ids, values: Floats) -> None:
        """Rows of the matrix, of the test samples `tests`."""
        values = values[:, self._order]
        finite = np.isfinite(values)
        sums = np.add.reduceat(np.where(finite, values, np.float32(0)), self._starts, axis=1, dtype=np.float64)
        counts = np.add.reduceat(finite, self._starts, axis=1, dtype=np.int64)
        for place, row, count in zip(self.test.place[tests], sums, counts, strict=True):
            if place >= 0:
                self.sums[:, place] += row
                self.counts[:, place] += count

    @property
    def means(self) -> NDArray[np.float64]:
        """A row for each class of training samples, a column for each of test samples; NaN where there is no pair."""
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = self.sums / self.counts
        return means

    def as_json(self) -> dict[str, Any]:
        """`train`, `test` labels; `mean` and `pairs`, a row for each class of training samples."""
        return {
            "train": self.train.labels, "test": self.test.labels, "mean": self.means, "pairs": self.counts,
            "left_out": [self.train.left_out, self.test.left_out],
        }  # fmt: skip
