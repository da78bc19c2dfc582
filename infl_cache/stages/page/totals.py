"""One pass over rows of the matrix: how large influences are, and what each class of samples does to each other one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.layout import blocks
from infl_cache.disk.run import RunFolder
from infl_cache.progress import progress
from infl_cache.stages.between import Between, Grouped
from infl_cache.stages.rankings import matrix_rows

# Powers of two of float32, smallest to largest, as `numpy.frexp` counts them.
LOWEST, HIGHEST = -148, 128
# How many powers of two below the largest a histogram shows one by one; what is smaller is counted together.
SHOWN = 20
# More classes than these are not drawn: the largest ones are.
MOST_CLASSES = 50
# Bytes of the matrix that are read for totals; of a larger one, rows spread over it.
MOST_BYTES = 4 * 10**9
# Bytes that are held at a time.
BUDGET = 64 * 10**6

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Sizes:
    """A histogram of the absolute values over powers of two, exactly: negative and positive ones, zeros, the rest."""

    def __init__(self) -> None:
        self.negative = np.zeros(HIGHEST - LOWEST + 1, np.int64)
        self.positive = np.zeros_like(self.negative)
        self.zeros = self.not_finite = 0

    def add(self, values: Floats) -> None:
        """Count some more values."""
        flat = values.reshape(-1)
        finite = flat[np.isfinite(flat)]
        self.not_finite += flat.size - finite.size
        for counts, side in ((self.negative, finite[finite < 0]), (self.positive, finite[finite > 0])):
            counts += np.bincount(np.frexp(side)[1] - LOWEST, minlength=len(counts))
        self.zeros += int((finite == 0).sum())

    def as_json(self) -> dict[str, Any]:
        """`edges` 2^a to 2^b; `negative`, `positive` (len(edges) - 1,) counts between them; `small` what is below."""
        there = np.flatnonzero(self.negative + self.positive)
        top = int(there[-1]) if len(there) else 0
        low = max(int(there[0]) if len(there) else 0, top - SHOWN + 1)
        return {
            "edges": [float(np.ldexp(1.0, power + LOWEST - 1)) for power in range(low, top + 2)],
            "negative": self.negative[low : top + 1].tolist(),
            "positive": self.positive[low : top + 1].tolist(),
            "small": int(self.negative[:low].sum() + self.positive[:low].sum() + self.zeros),
            "not_finite": self.not_finite,
        }


def totals(
    folder: RunFolder, tests: Ids, train_targets: NDArray[np.float64], test_targets: NDArray[np.float64], show: bool
) -> dict[str, Any]:
    """`sizes` and, where labels are classes, `between`, of the sound matrix's rows `tests`, or of some of them.

    Of more than `MOST_BYTES` so many rows, spread evenly, as `rows` says. Never more than a few rows are in memory.
    """
    most = max(1, MOST_BYTES // (4 * len(train_targets)))
    if len(tests) > most:
        tests = tests[np.arange(most) * len(tests) // most]
    sizes = Sizes()
    groups = Grouped.of(train_targets, most=MOST_CLASSES), Grouped.of(test_targets, tests, MOST_CLASSES)
    between = Between(groups[0], groups[1]) if groups[0] is not None and groups[1] is not None else None
    done = 0
    with progress("report: matrix", len(tests), unit="row", show=show) as bar:
        for rows in matrix_rows(folder, tests, BUDGET):
            for part in blocks(len(rows), 64):
                piece = rows[part.start : part.stop]
                sizes.add(piece)
                if between is not None:
                    between.add(tests[done : done + len(piece)], piece)
                done += len(piece)
                bar.advance(len(piece))
    return {"rows": len(tests), "sizes": sizes.as_json(), "between": between.as_json() if between is not None else None}
