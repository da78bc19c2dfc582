"""The plotting API draws the same figures as the commands, into what it is given, and keeps nothing."""

import pytest

from infl_cache import BadInput, IncompleteStore, Run, plotting
from tests import tasks

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    task = tasks.logistic(n_train=20, n_test=6)
    made = Run(
        tmp_path_factory.mktemp("run") / "r", task, damping=0.1, solver="exact", by_layer=True, test="0:5",
        progress=False,
    )  # fmt: skip
    made.all()
    made.self_influence()
    made.found = made.validate(points=4)
    return made


def test_every_function_is_exported_and_returns_a_figure(run):
    asked = {"plot_influence": (3,), "plot_validation": ("loo",)}
    for name in plotting.__all__:
        figure = getattr(plotting, name)(run, *asked.get(name, ()))
        assert isinstance(figure, figures.Figure), name
        figure.canvas.draw()
    assert len(plotting.__all__) == 6


def test_axes_and_figures_that_are_given_are_drawn_into(run):
    figure = figures.Figure(layout="constrained")
    axes = figure.subplots(2, 2)
    assert plotting.plot_classes(run, axes=axes[0, 0]) is figure
    assert plotting.plot_layers(run, axes=axes[0, 1]) is figure
    assert plotting.plot_histogram(run, axes=axes[1, 0]) is figure
    assert plotting.plot_validation(run, axes=axes[1, 1]) is figure
    top, bottom = figures.Figure(layout="constrained").subfigures(2, 1)
    assert plotting.plot_influence(run, [0, 2], figure=top) is top
    assert plotting.plot_self_influence(run, figure=bottom) is bottom
    assert top.axes
    assert bottom.axes


def test_a_validation_is_drawn_as_it_was_returned_and_as_it_was_kept(run):
    offsets = [
        [each.get_offsets().tolist() for each in plotting.plot_validation(found).axes[0].collections]
        for found in (run.found, run)
    ]
    assert offsets[0] == offsets[1]
    assert len(offsets[0]) == 3


def test_refusals(run, tmp_path):
    for ask, words in (
        (lambda: plotting.plot_influence(run, 6), "test sample: expected 0 to 5, found 6"),
        (lambda: plotting.plot_influence(run, []), "j: expected a test sample, or a list of them, found none"),
        (lambda: plotting.plot_influence(run, 0, k=0), "k: expected at least 1, found 0"),
        (lambda: plotting.plot_self_influence(run, 0), "k: expected at least 1, found 0"),
        (lambda: plotting.plot_layers(run, 0), "k: expected at least 1, found 0"),
        (lambda: plotting.plot_validation(run, "all"), "kind: expected one of loo, group, lds, found 'all'"),
    ):
        with pytest.raises(BadInput, match=words):
            ask()
    for ask in (lambda: plotting.plot_influence(run, 5), lambda: plotting.plot_histogram(run, 5)):
        with pytest.raises(IncompleteStore, match="expected test samples that it was asked about"):
            ask()
    new = Run(tmp_path / "new", run.task)
    for name in plotting.__all__:
        with pytest.raises(IncompleteStore):
            getattr(plotting, name)(new, *{"plot_influence": (3,)}.get(name, ()))
