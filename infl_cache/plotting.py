"""The figures of a finished run for notebooks and papers: each function returns a matplotlib Figure.

Needs matplotlib (`pip install 'infl_cache[figures]'`). Nothing is shown or kept by pyplot: `figure.savefig("x.svg")`
writes one, and a notebook shows what a cell returns. Helpful is blue and harmful red everywhere, also for measures that
are better when higher. In the examples `run` is a finished `infl_cache.Run` of 20 training and 6 test samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.reading import Influences
from infl_cache.stages.figures import of_run
from infl_cache.stages.figures.scatter import draw_scatter
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.validation import Validation

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

__all__ = ["plot_classes", "plot_histogram", "plot_influence", "plot_layers", "plot_self_influence", "plot_validation"]


def plot_influence(run: Influences, j: int | Sequence[int], k: int = 5, figure: AnyFigure | None = None) -> AnyFigure:
    """Test sample j (or several, a row each) with the k training samples that help and that harm it most.

    As pictures, with label and influence over each, where the run has its task and the samples look like pictures:
    (H, W), (C, H, W) or flat squares; else as bars. `figure` is an empty figure or sub-figure to draw into. Raises what
    `run.helpful(j, k)` raises.

    >>> figure = plot_influence(run, 3, k=2)
    >>> figure.axes[0].get_title().startswith("test 3")
    True
    """
    tests = [j] if isinstance(j, (int, np.integer)) else list(j)
    if not tests:
        raise BadInput("j: expected a test sample, or a list of them, found none")
    for each in tests:
        run.helpful(each, k)
    return of_run.neighbours_figure(_sound(run), run.task, tests, k, figure)


def plot_self_influence(run: Influences, k: int = 16, figure: AnyFigure | None = None) -> AnyFigure:
    """The distribution of self-influence over all training samples, and the k largest: the suspects.

    Raises `IncompleteStore` before `run.self_influence()`.

    >>> plot_self_influence(run, k=4).axes[0].get_title()
    'Self-influence of 20 training samples'
    """
    if k < 1:
        raise BadInput(f"k: expected at least 1, found {k}")
    return of_run.suspects_figure(RunFolder(run.path), run.task, k, figure)


def plot_classes(run: Influences, axes: Axes | None = None) -> AnyFigure:
    """A heat map: the mean influence of the training samples of each class on the test samples of each class.

    `mean over j in b, i in a of influence[j, i]` in row b, column a. The matrix is read a few rows at a time. Raises
    `BadInput` where labels are no integers, `IncompleteStore` in a run without a matrix.

    >>> plot_classes(run).axes[0].get_xlabel()
    'class of the training samples'
    """
    return of_run.classes_figure(_sound(run), run.task, axes)


def plot_layers(run: Influences, k: int = 25, axes: Axes | None = None) -> AnyFigure:
    """Bars: the share of each layer in all influences (`run.layer_shares()`), the k largest in the model's order.

    Raises `IncompleteStore` unless stage 3 was run with `by_layer=True`.

    >>> plot_layers(run).axes[0].get_title()
    'Which layers (parameters) carry the effect'
    """
    if k < 1:
        raise BadInput(f"k: expected at least 1, found {k}")
    return of_run.layers_figure(RunFolder(run.path), k, axes)


def plot_histogram(run: Influences, test: int | None = None, axes: Axes | None = None) -> AnyFigure:
    """How many pairs have which influence, over a log axis: of the whole matrix, or on one test sample.

    The matrix is read a few rows at a time, twice. Raises `IncompleteStore` in a run without a matrix.

    >>> plot_histogram(run).axes[0].get_title(), plot_histogram(run, test=3).axes[0].get_title()
    ('120 influences', '20 influences on test sample 3')
    """
    if test is not None:
        run.helpful(test, 1)
    return of_run.histogram_figure(_sound(run), test, axes)


def plot_validation(validation: Validation | Influences, kind: str = "loo", axes: Axes | None = None) -> AnyFigure:
    """Actual against predicted changes when training samples are removed: Figure 2 of Koh & Liang (2017).

    Of what `run.validate()` returned, or of a run: its last validation of that kind ("loo", "group" or "lds"), if
    it is one of the run's matrix (`IncompleteStore`).

    >>> plot_validation(run, "loo").axes[0].get_ylabel()
    'actual change of the loss'
    """
    if isinstance(validation, Validation):
        return draw_scatter(validation, axes)
    return of_run.validation_figure(RunFolder(validation.path), kind, axes)


def _sound(run: Influences) -> RunFolder:
    """The run's folder, its matrix compared with its checksums, if it keeps one: the first time and when it changed."""
    folder = RunFolder(run.path)
    if has_matrix(folder):
        run.scores()
    return folder
