"""A validation as a scatter plot: actual against predicted changes, and the line on which they would be equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infl_cache.stages.figures.canvas import GREY, HELPFUL, LINE, PALE, one_axes, tidied
from infl_cache.stages.validation import WAY, Validation

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

# Test samples that have a colour, a sign and a line in the legend of their own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIGNS = ("o", "s", "^", "D", "v", "P")

Doubles = NDArray[np.float64]


def draw_scatter(found: Validation, axes: Axes | None = None) -> AnyFigure:
    """Every pair of a predicted and an actual change; those of `lds` less the mean of their test sample."""
    figure, axes = one_axes(axes, 6.4, 6.6)
    predicted, actual = found.predicted, found.actual
    if found.kind == "lds":
        predicted, actual = (each - np.nanmean(each, axis=1, keepdims=True) for each in (predicted, actual))
    _points(axes, found, predicted, actual)
    _lines(axes, found, predicted, actual)
    less = "\nless its mean per test sample" if found.kind == "lds" else ""
    axes.set_xlabel(f"predicted change of the {found.measure} (minus influence){less}")
    axes.set_ylabel(f"actual change of the {found.measure}{less}")
    axes.set_title(f"{_described(found)}\n{found.headline}", fontsize=10, color=LINE)
    return figure


def _described(found: Validation) -> str:
    tests = f"{len(found.tests)} test sample{'s' if len(found.tests) > 1 else ''}"
    return f"{found.title[0].upper()}{found.title[1:]}\n{tests}, {WAY[found.way]}"


def _points(axes: Axes, found: Validation, predicted: Doubles, actual: Doubles) -> None:
    """A colour and a sign for each test sample, or one for all where they are many."""
    if len(found.tests) > len(COLOURS):
        size, alpha = (9, 0.25) if predicted.size > 500 else (18, 0.5)
        axes.scatter(predicted, actual, s=size, alpha=alpha, color=HELPFUL, linewidths=0, rasterized=True)
        return
    for t, test in enumerate(found.tests):
        label = f"test sample {test}, Spearman {found.by_test[t].spearman:.3f}"
        axes.scatter(
            predicted[t], actual[t], s=30, alpha=0.75, label=label, color=COLOURS[t], marker=SIGNS[t],
            edgecolors="white", linewidths=0.6, zorder=3,
        )  # fmt: skip


def _lines(axes: Axes, found: Validation, predicted: Doubles, actual: Doubles) -> None:
    """The axes, slope 1, and the line of least squares; both axes alike where the slope is not far from 1."""
    axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)
    axes.axvline(0, color=PALE, linewidth=0.8, zorder=0)
    spans = [np.nanmin(each) for each in (predicted, actual)], [np.nanmax(each) for each in (predicted, actual)]
    if 1 / 3 < found.slope < 3:
        low, high = min(spans[0]), max(spans[1])
        edge = 0.06 * (high - low or 1.0)
        axes.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge))
        axes.set_aspect("equal")
    limits = axes.get_xlim(), axes.get_ylim()
    ends = np.array([min(limits[0][0], limits[1][0]), max(limits[0][1], limits[1][1])])
    axes.plot(ends, ends, color=LINE, linewidth=1.0, linestyle="--", label="slope 1", zorder=1)
    if np.isfinite(found.slope):
        finite = np.isfinite(predicted) & np.isfinite(actual)
        offset = actual[finite].mean() - found.slope * predicted[finite].mean()
        axes.plot(
            ends, found.slope * ends + offset, color=GREY, linewidth=1.0, label=f"slope {found.slope:.2f}", zorder=1
        )
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    axes.legend(frameon=False, fontsize=9, loc="best")
    tidied(axes)
