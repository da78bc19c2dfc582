"""Class by class: the mean influence of the training samples of one class on the test samples of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.progress import progress
from infl_cache.stages.between import Between, Grouped
from infl_cache.stages.columns import stored_column
from infl_cache.stages.figures.canvas import DIVERGING, LINE, one_axes, plain
from infl_cache.stages.rankings import matrix_rows
from infl_cache.stages.rendering import label_text
from infl_cache.stages.tiles import matrix_tests

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

# Bytes of rows of the matrix that are held at a time, and classes at most.
ROWS_BYTES, MOST_CLASSES = 1 << 26, 2000
# So many classes have their numbers written into the map, and their names beside it.
WRITTEN, NAMED = 12, 40


class NoClasses(BadInput):
    """The samples of a run have no classes that could be shown."""


@dataclass(frozen=True)
class ClassMeans:
    """`means[b, a]`: the mean influence of training class `train[a]` on test class `test[b]`, NaN where none is."""

    test: NDArray[np.int64]
    train: NDArray[np.int64]
    means: NDArray[np.float64]


def class_means(folder: RunFolder, show: bool = True) -> ClassMeans:
    """From the finished matrix, a few rows at a time; what is not finite is left out.

    Raises `NoClasses`, a `BadInput`, where the labels are no integers, or too many different ones to be shown.
    """
    tests = matrix_tests(folder)
    test, train = (
        Grouped.of(stored_column(folder, stage, "target"), among, MOST_CLASSES)
        for stage, among in (("stest", tests), ("grads", None))
    )
    if test is None or train is None:
        raise NoClasses("classes: expected integer labels of training and test samples, found others")
    if test.left_out or train.left_out:
        found = max(len(each.labels) + each.left_out for each in (test, train))
        raise NoClasses(f"classes: expected at most {MOST_CLASSES:,}, found {found:,}")
    between, place = Between(train, test), 0
    with progress("classes", len(tests), unit="test sample", show=show) as bar:
        for rows in matrix_rows(folder, tests, ROWS_BYTES):
            between.add(tests[place : place + len(rows)], rows)
            place += len(rows)
            bar.advance(len(rows))
    return ClassMeans(np.array(test.labels), np.array(train.labels), between.means.T)


def draw_classes(found: ClassMeans, sign: int = 1, names: Any = None, axes: Axes | None = None) -> AnyFigure:
    """A heat map: blue where a class helps, red where it harms, white at zero."""
    rows, columns = found.means.shape
    cell = min(0.42, 8.4 / max(rows, columns))
    figure, axes = one_axes(axes, max(2.5, cell * columns) + 2.6, max(2.5, cell * rows) + 1.6)
    most = float(np.nanmax(np.abs(found.means), initial=0.0, where=np.isfinite(found.means))) or 1.0
    image = axes.imshow(found.means, cmap=DIVERGING[sign], vmin=-most, vmax=most, interpolation="nearest")
    axes.set_facecolor("0.8")  # no pair of these classes
    _ticks(axes, found, names)
    axes.set_xlabel("class of the training samples")
    axes.set_ylabel("class of the test samples")
    axes.set_title("Mean influence of a class on another")
    helps, harms = ("negative", "positive") if sign > 0 else ("positive", "negative")
    bar = figure.colorbar(image, ax=axes, label=f"influence ({helps} helps, {harms} harms)", shrink=0.85)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]
    if max(rows, columns) <= WRITTEN:
        _numbers(axes, found.means, most)
    return figure


def _ticks(axes: Axes, found: ClassMeans, names: Any) -> None:
    for labels, axis in ((found.train, axes.xaxis), (found.test, axes.yaxis)):
        step = -(-len(labels) // NAMED)
        texts = [plain(label_text(float(label), names)) for label in labels[::step]]
        small = len(texts) > 20
        axis.set_ticks(range(0, len(labels), step), texts, fontsize=7 if small else 9)
        if axis is axes.xaxis and (small or max(map(len, texts), default=0) > 3):
            axes.tick_params(axis="x", rotation=90)


def _numbers(axes: Axes, means: NDArray[np.float64], most: float) -> None:
    """The numbers in units of the power of ten of the largest, which the title names."""
    power = int(np.floor(np.log10(most)))
    for (row, column), value in np.ndenumerate(means):
        if np.isfinite(value):
            text, colour = f"{value / 10.0**power:.1f}", "white" if abs(value) > 0.6 * most else LINE
            text = "0" if float(text) == 0 else text
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(f"Mean influence of a class on another, in units of $10^{{{power}}}$")
