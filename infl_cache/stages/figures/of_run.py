"""The figures of a run folder: what each needs is read, block by block where it is the matrix, and drawn.

The matrix is taken to be sound: whoever calls has compared it with its checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infl_cache.disk.run import RunFolder
from infl_cache.maths.task import Task
from infl_cache.stages.columns import stored_column
from infl_cache.stages.figures.classes import class_means, draw_classes
from infl_cache.stages.figures.histogram import distribution, draw_histogram
from infl_cache.stages.figures.layers import MOST, draw_layers
from infl_cache.stages.figures.neighbours import draw_neighbours
from infl_cache.stages.figures.scatter import draw_scatter
from infl_cache.stages.figures.suspects import DRAWN, draw_suspects
from infl_cache.stages.layers import require_layers, stored_shares
from infl_cache.stages.opening import as_stored
from infl_cache.stages.rankings import require_matrix
from infl_cache.stages.suspects import column, descending
from infl_cache.stages.tiles import matrix_tests, sign_of
from infl_cache.stages.validated import stored_validation
from infl_cache.stages.worst import NEIGHBOURS, with_neighbours, worst_test_samples

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

WORST = 3


def neighbours_figure(
    folder: RunFolder, task: Task | None, tests: Sequence[int] | None = None, k: int = NEIGHBOURS,
    figure: AnyFigure | None = None,
) -> AnyFigure:  # fmt: skip
    """Test samples with their strongest training samples; those of largest loss where none are named."""
    asked = worst_test_samples(folder, WORST) if tests is None else with_neighbours(folder, tests, k)
    shown = None if task is None else as_stored(folder, task)
    return draw_neighbours(shown, asked, stored_column(folder, "grads", "target"), sign_of(folder), figure)


def suspects_figure(folder: RunFolder, task: Task | None, k: int = DRAWN, figure: AnyFigure | None = None) -> AnyFigure:
    """The distribution of self-influence, and the k training samples of largest."""
    values = column(folder, "self_influence")
    shown = None if task is None else as_stored(folder, task)
    return draw_suspects(shown, values, descending(values), stored_column(folder, "grads", "target"), k, figure)


def classes_figure(folder: RunFolder, task: Task | None, axes: Axes | None = None, show: bool = True) -> AnyFigure:
    """The mean influence of each class of training samples on each class of test samples."""
    require_matrix(folder, "to be averaged class by class")
    names = None if task is None else task.classes
    return draw_classes(class_means(folder, show), sign_of(folder), names, axes)


def layers_figure(folder: RunFolder, k: int = MOST, axes: Axes | None = None) -> AnyFigure:
    """The layers' shares of all influences."""
    require_layers(folder)
    return draw_layers(stored_shares(folder), k, axes)


def histogram_figure(
    folder: RunFolder, test: int | None = None, axes: Axes | None = None, show: bool = True
) -> AnyFigure:
    """The distribution of all influences, or of those on one test sample."""
    require_matrix(folder, "to count its influences")
    tests = matrix_tests(folder) if test is None else np.array([test])
    on = "" if test is None else f" on test sample {test}"
    return draw_histogram(distribution(folder, tests, show), sign_of(folder), on, axes)


def validation_figure(folder: RunFolder, kind: str, axes: Axes | None = None) -> AnyFigure:
    """Actual against predicted changes of the validation of that kind."""
    return draw_scatter(stored_validation(folder, kind), axes)
