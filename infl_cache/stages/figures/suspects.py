"""The distribution of self-influence, its largest values marked, and these training samples where they are pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infl_cache.maths.task import Task
from infl_cache.stages.figures.canvas import HARMFUL, HELPFUL, new_figure, tidied
from infl_cache.stages.figures.neighbours import show
from infl_cache.stages.rendering import label_text, picture_at

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

DRAWN, ACROSS = 16, 8


def draw_suspects(
    task: Task | None, values: NDArray[np.float64], ids: NDArray[np.int64], labels: NDArray[np.float64],
    k: int = DRAWN, figure: AnyFigure | None = None,
) -> AnyFigure:  # fmt: skip
    """All values (n_train,) as a histogram; of `ids`, sorted from the largest, the first k marked and shown."""
    top = ids[:k].tolist()
    pictures = [picture_at(task, "train", index) for index in top] if task is not None else [None]
    rows = -(-len(top) // ACROSS) if all(each is not None for each in pictures) else 0
    if figure is None:
        figure = new_figure(9.6, 3.2 + 1.75 * rows)
    grid = figure.add_gridspec(1 + rows, ACROSS, height_ratios=[2.2, *[1] * rows])
    _histogram(figure.add_subplot(grid[0, :]), values, ids, len(top))
    classes = task.classes if task is not None else None
    for place, index in enumerate(top if rows else ()):
        title = f"train {index}\n{label_text(labels[index], classes)}\n{values[index]:.1e}"
        show(figure.add_subplot(grid[1 + place // ACROSS, place % ACROSS]), pictures[place], title, HARMFUL)
    return figure


def _histogram(axes: Axes, values: NDArray[np.float64], ids: NDArray[np.int64], marked: int) -> None:
    """All positive values over a log axis, the largest as strokes."""
    positive = values[values > 0]
    if len(positive):
        low, high = np.log10(positive.min()), np.log10(positive.max())
        axes.hist(positive, bins=np.logspace(low - 0.02, high + 0.02, 60).tolist(), color=HELPFUL)
        axes.set_xscale("log")
    for value in values[ids[:marked]]:
        if value > 0:
            axes.axvline(value, ymax=0.25, color=HARMFUL, linewidth=1.2)
    rest = len(ids) - len(positive)
    axes.set_title(f"Self-influence of {len(ids):,} training samples" + (f"; {rest:,} not above zero" if rest else ""))
    axes.set_xlabel(f"self-influence (strokes: the {marked} largest)")
    axes.set_ylabel("training samples")
    tidied(axes)
