"""The distribution of the influences, of a whole matrix or on one test sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.run import RunFolder
from infl_cache.progress import progress
from infl_cache.stages.figures.canvas import HARMFUL, HELPFUL, LINE, one_axes, tidied
from infl_cache.stages.rankings import matrix_rows

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

ROWS_BYTES, BINS = 1 << 26, 80


@dataclass(frozen=True)
class Distribution:
    """How many influences are in each bin between `edges`, one of which is zero; how many are negative, positive, 0."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    negative: int
    positive: int
    zero: int


def distribution(folder: RunFolder, tests: NDArray[np.int64], show: bool = True) -> Distribution:
    """Of the finished matrix's rows `tests`, read twice, a few at a time; what is not finite is left out."""
    low, high, signs = 0.0, 0.0, np.zeros(3, np.int64)
    with progress("histogram", 2 * len(tests), unit="test sample", show=show) as bar:
        for rows in matrix_rows(folder, tests, ROWS_BYTES):
            values = rows[np.isfinite(rows)]
            low, high = min(low, float(values.min(initial=0))), max(high, float(values.max(initial=0)))
            signs += [np.count_nonzero(values < 0), np.count_nonzero(values > 0), np.count_nonzero(values == 0)]
            bar.advance(len(rows))
        edges = edges_of(low, high)
        counts = np.zeros(len(edges) - 1, np.int64)
        for rows in matrix_rows(folder, tests, ROWS_BYTES):
            counts += np.histogram(rows[np.isfinite(rows)], edges)[0]
            bar.advance(len(rows))
    return Distribution(edges, counts, *signs.tolist())


def edges_of(low: float, high: float) -> NDArray[np.float64]:
    """Edges of about `BINS` equal bins from `low` <= 0 to `high` >= 0, zero one of them.

    >>> edges = edges_of(-1.0, 3.0)
    >>> len(edges), 0.0 in edges, bool(edges[0] <= -1.0 and edges[-1] >= 3.0)
    (83, True, True)
    """
    width = (high - low) / BINS or 1.0
    edges: NDArray[np.float64] = np.float64(width) * np.arange(-int(-low / width) - 1, int(high / width) + 2)
    return edges


def draw_histogram(found: Distribution, sign: int = 1, on: str = "", axes: Axes | None = None) -> AnyFigure:
    """Bars over a log axis: the helpful side blue, the harmful one red."""
    figure, axes = one_axes(axes, 6.8, 3.8)
    left, right = (HELPFUL, HARMFUL) if sign > 0 else (HARMFUL, HELPFUL)
    colours = [left if edge < 0 else right for edge in found.edges[:-1]]
    axes.bar(found.edges[:-1], found.counts, np.diff(found.edges), align="edge", color=colours)
    if found.counts.any():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.axvline(0, color=LINE, linewidth=0.8)
    total = max(1, int(found.counts.sum()))
    words = {-1: ("harmful", "helpful"), 1: ("helpful", "harmful")}[sign]
    axes.text(0.01, 0.98, f"{words[0]}: {found.negative / total:.1%}", color=left, transform=axes.transAxes, va="top")
    axes.text(
        0.99, 0.98, f"{words[1]}: {found.positive / total:.1%}", color=right, transform=axes.transAxes, va="top",
        ha="right",
    )  # fmt: skip
    axes.set_title(f"{int(found.counts.sum()):,} influences{on}")
    axes.set_xlabel("influence")
    axes.set_ylabel("pairs of samples")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    tidied(axes)
    return figure
