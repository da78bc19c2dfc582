"""Test samples with the training samples that help and harm them most: as pictures, or as bars where they are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.maths.task import Task
from infl_cache.stages.figures.canvas import HARMFUL, HELPFUL, PALE, new_figure, plain, tidied
from infl_cache.stages.rank import Ranking
from infl_cache.stages.rendering import label_text, picture_at
from infl_cache.stages.worst import Asked

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

# Characters of a title that fit over a picture.
WIDTH = 18
CELL, TITLE, HEAD = 1.2, 0.56, 0.4


def draw_neighbours(
    task: Task | None, asked: Sequence[Asked], labels: NDArray[np.float64], sign: int = 1,
    figure: AnyFigure | None = None,
) -> AnyFigure:  # fmt: skip
    """Pictures of each test sample and its neighbours; bars of their influences where the samples are no pictures."""
    if task is not None and asked and are_pictures(task, asked):
        return draw_pictures(task, asked, labels, figure)
    return draw_bars(asked, labels, None if task is None else task.classes, sign, figure)


def are_pictures(task: Task, asked: Sequence[Asked]) -> bool:
    """Whether the test samples look like pictures."""
    return all(picture_at(task, "test", each.index) is not None for each in asked)


def draw_pictures(
    task: Task, asked: Sequence[Asked], labels: NDArray[np.float64], figure: AnyFigure | None = None
) -> AnyFigure:
    """A row for each test sample: itself, its most helpful and its most harmful training samples, values over them."""
    ends = {"helpful": HELPFUL, "harmful": HARMFUL}
    widths = [max(1, *(len(getattr(each, end).ids) for each in asked)) for end in ends]
    if figure is None:
        figure = new_figure(CELL * (1 + sum(widths)) + 0.3, (CELL + TITLE) * len(asked) + HEAD)
    parts: Any = figure.subfigures(1, 3, width_ratios=[1, *widths])
    parts[0].suptitle("test sample", fontsize=10)
    for (row,), each in zip(parts[0].subplots(len(asked), 1, squeeze=False), asked, strict=True):
        said = f"\nsaid {label_text(each.prediction, task.classes)}" if np.isfinite(each.prediction) else ""
        title = f"test {each.index}\n{label_text(each.label, task.classes)}{said}"
        show(row, picture_at(task, "test", each.index), title, "black")
    for part, (end, colour), width in zip(parts[1:], ends.items(), widths, strict=True):
        part.suptitle(f"most {end}: label and influence", fontsize=10, color=colour)
        for row, each in zip(part.subplots(len(asked), width, squeeze=False), asked, strict=True):
            _row_of_pictures(row, task, getattr(each, end), labels, colour)
    return figure


def _row_of_pictures(
    row: Sequence[Axes], task: Task, ranking: Ranking, labels: NDArray[np.float64], colour: str
) -> None:
    for axes in row[len(ranking.ids) :]:
        axes.axis("off")
    for axes, index, value in zip(row, ranking.ids.tolist(), ranking.values.tolist(), strict=False):
        title = f"train {index}\n{label_text(labels[index], task.classes)}\n{value:+.1e}"
        show(axes, picture_at(task, "train", index), title, colour)


def show(axes: Axes, picture: Any, title: str, colour: str) -> None:
    """A picture with a title and a frame of that colour; an empty frame for what is no picture."""
    if picture is not None:
        axes.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None)
    axes.set_title("\n".join(plain(cut(line, WIDTH)) for line in title.split("\n")), fontsize=8)
    axes.title.set_color(colour)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.5)


def cut(text: str, width: int) -> str:
    """At most `width` characters, the rest as three dots.

    >>> cut("automobile", 10), cut("automobiles", 10)
    ('automobile', 'automobil…')
    """
    return text if len(text) <= width else text[: width - 1] + "…"


def draw_bars(
    asked: Sequence[Asked], labels: NDArray[np.float64], classes: Any = None, sign: int = 1,
    figure: AnyFigure | None = None,
) -> AnyFigure:  # fmt: skip
    """For each test sample a bar for each neighbour: the helpful ones from the strongest down, then the harmful."""
    most = max([1, *(len(each.helpful.ids) + len(each.harmful.ids) for each in asked)])
    if figure is None:
        figure = new_figure(3.4 * max(1, len(asked)) + 0.4, 0.9 + 0.24 * most)
    for axes, each in zip(np.ravel(figure.subplots(1, max(1, len(asked)), squeeze=False)), asked, strict=False):
        ids = [*each.helpful.ids.tolist(), *each.harmful.ids.tolist()[::-1]]
        values = [*each.helpful.values.tolist(), *each.harmful.values.tolist()[::-1]]
        colours = [HELPFUL if sign * value < 0 else HARMFUL for value in values]
        axes.barh(range(len(ids)), values, color=colours)
        axes.axvline(0, color=PALE, linewidth=0.8, zorder=0)
        names = [f"train {index} ({label_text(labels[index], classes)})" for index in ids]
        axes.set_yticks(range(len(ids)), [plain(cut(name, 28)) for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
        said = f", said {label_text(each.prediction, classes)}" if np.isfinite(each.prediction) else ""
        axes.set_title(plain(f"test {each.index}: {label_text(each.label, classes)}{said}"), fontsize=10)
        axes.set_xlabel("influence")
        axes.locator_params(axis="x", nbins=5)
        tidied(axes)
    return figure
