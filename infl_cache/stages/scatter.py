"""The picture of a validation: actual against predicted changes, and the line on which they would be equal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from infl_cache.disk.durable import write_atomically
from infl_cache.stages.opening import log
from infl_cache.stages.validation import WAY, Validation

# Test samples that have a colour and a line in the legend of their own.
COLOURED = 6
GREY, LINE = "0.55", "0.25"


def draw_scatter(path: Path, found: Validation) -> Path | None:
    """One PNG; None, and a note, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no picture: matplotlib is not installed; pip install 'infl_cache[figures]'")
        return None
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    axis = figure.subplots()
    predicted, actual = found.predicted, found.actual
    if found.kind == "lds":
        predicted, actual = (each - np.nanmean(each, axis=1, keepdims=True) for each in (predicted, actual))
    _points(axis, found, predicted, actual)
    _lines(axis, found, predicted, actual)
    less = " less its mean per test sample" if found.kind == "lds" else ""
    axis.set_xlabel(f"predicted change of the {found.measure} (minus influence){less}")
    axis.set_ylabel(f"actual change of the {found.measure}{less}")
    axis.set_title(found.headline, fontsize=11)
    figure.suptitle(_wrapped(found), fontsize=10, color=LINE)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    write_atomically(path, buffer.getvalue())
    return path


def _wrapped(found: Validation) -> str:
    tests = f"{len(found.tests)} test sample{'s' if len(found.tests) > 1 else ''}"
    return f"{found.title[0].upper()}{found.title[1:]}\n{tests}, {WAY[found.way]}"


def _points(axis: Any, found: Validation, predicted: Any, actual: Any) -> None:
    """A colour for each test sample, or one for all where they are many."""
    if len(found.tests) > COLOURED:
        size, alpha = (9, 0.25) if predicted.size > 500 else (18, 0.5)
        axis.scatter(predicted, actual, s=size, alpha=alpha, color="tab:blue", linewidths=0, rasterized=True)
        return
    for t, test in enumerate(found.tests):
        label = f"test sample {test}, Spearman {found.by_test[t].spearman:.3f}"
        axis.scatter(
            predicted[t], actual[t], s=30, alpha=0.75, label=label, edgecolors="white", linewidths=0.6, zorder=3
        )


def _lines(axis: Any, found: Validation, predicted: Any, actual: Any) -> None:
    """The axes, slope 1, and the line of least squares; both axes alike where the slope is not far from 1."""
    axis.axhline(0, color="0.88", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.88", linewidth=0.8, zorder=0)
    spans = [np.nanmin(each) for each in (predicted, actual)], [np.nanmax(each) for each in (predicted, actual)]
    if 1 / 3 < found.slope < 3:
        low, high = min(spans[0]), max(spans[1])
        edge = 0.06 * (high - low or 1.0)
        axis.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge))
        axis.set_aspect("equal")
    limits = axis.get_xlim(), axis.get_ylim()
    ends = np.array([min(limits[0][0], limits[1][0]), max(limits[0][1], limits[1][1])])
    axis.plot(ends, ends, color=LINE, linewidth=1.0, linestyle="--", label="slope 1", zorder=1)
    if np.isfinite(found.slope):
        finite = np.isfinite(predicted) & np.isfinite(actual)
        offset = actual[finite].mean() - found.slope * predicted[finite].mean()
        axis.plot(
            ends, found.slope * ends + offset, color=GREY, linewidth=1.0, label=f"slope {found.slope:.2f}", zorder=1
        )
    axis.set(xlim=limits[0], ylim=limits[1])
    axis.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
