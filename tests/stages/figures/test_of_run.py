"""Every figure of a run shows the numbers that NumPy finds on the whole matrix, read a few rows at a time."""

import dataclasses
import tracemalloc
import types

import numpy as np
import pytest
import torch
from torch import nn

from infl_cache import BadInput, IncompleteStore, Run
from infl_cache.stages.figures import classes, histogram, of_run
from infl_cache.stages.figures.canvas import HARMFUL, HELPFUL
from infl_cache.stages.figures.layers import draw_layers
from infl_cache.stages.layers import LayerShares
from infl_cache.stages.rank import Ranking
from infl_cache.stages.worst import Asked
from tests import tasks
from tests.test_reading import without_matrix

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgba  # noqa: E402

QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}


def pictures(**changes):
    model = tasks.built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.float64)
    return tasks.classified(model, tasks.normal(26, 1, 8, 8), 20, **changes)


@pytest.fixture(scope="module", params=["loss", "margin"])
def run(request, tmp_path_factory):
    task = pictures(classes=["cat", "automobile", "dog"])
    made = Run(tmp_path_factory.mktemp("run") / "r", task, measure=request.param, by_layer=True, **QUIET)
    made.all()
    made.self_influence()
    return made


def sign(run):
    return -1 if run.options.selection.measure == "margin" else 1


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def drawn(figure):
    """The figure, laid out: nothing in it raises or warns."""
    figure.canvas.draw()
    return figure


def test_neighbours_are_the_strongest_with_label_and_value_over_each(run):
    matrix, labels = np.array(run.scores()), run.task.train.tensors[1].tolist()
    figure = drawn(of_run.neighbours_figure(run.folder, run.task, [4, 1], k=3))
    expected = []
    for j in (4, 1):
        label, said = int(run.task.test.tensors[1][j]), int(run.task.model(run.task.test[j][0][None]).argmax())
        expected.append(f"test {j}\n{run.task.classes[label]}\nsaid {run.task.classes[said]}")
    for direction in (sign(run), -sign(run)):
        for j in (4, 1):
            for i in np.argsort(direction * matrix[j], kind="stable")[:3]:
                expected.append(f"train {i}\n{run.task.classes[labels[i]]}\n{matrix[j, i]:+.1e}")
    assert titles(figure) == expected
    frames = {axes.title.get_color() for axes in figure.axes}
    assert frames == {"black", HELPFUL, HARMFUL}
    shown = [axes for axes in figure.axes if axes.get_title().startswith("train")]
    index = int(shown[0].get_title().split()[1])
    picture = run.task.train[index][0][0].numpy()
    np.testing.assert_allclose(
        shown[0].images[0].get_array(), (picture - picture.min()) / (picture.max() - picture.min()), atol=1e-6
    )


def test_the_worst_test_samples_are_shown_if_none_are_named(run):
    figure = of_run.neighbours_figure(run.folder, run.task)
    with torch.no_grad():
        losses = [float(run.task.loss(run.task.model(x[None]), y[None])) for x, y in run.task.test]
    shown = [int(title.split()[1]) for title in titles(figure) if title.startswith("test")]
    assert shown == np.argsort(losses)[::-1][:3].tolist()


def test_what_is_no_picture_or_has_no_task_is_drawn_as_bars(run):
    matrix = np.array(run.scores())
    figure = drawn(of_run.neighbours_figure(run.folder, None, [2], k=4))
    (axes,) = figure.axes
    direction = sign(run)
    ids = [
        *np.argsort(direction * matrix[2], kind="stable")[:4],
        *np.argsort(-direction * matrix[2], kind="stable")[3::-1],
    ]
    assert [bar.get_width() for bar in axes.patches] == [float(matrix[2, i]) for i in ids]
    assert [text.get_text().split()[1] for text in axes.get_yticklabels()] == [str(i) for i in ids]
    for bar in axes.patches:
        helps = direction * bar.get_width() < 0
        assert bar.get_facecolor() == to_rgba(HELPFUL if helps else HARMFUL)


def test_few_neighbours_and_none_leave_their_places_empty(run):
    empty = Ranking(np.empty(0, np.int64), np.empty(0, np.float32))
    one = Asked(0, float("nan"), float("nan"), 0.0, empty, Ranking(np.array([3]), np.array([1.0], np.float32)))
    from infl_cache.stages.figures.neighbours import draw_neighbours

    labels = np.full(20, np.nan)
    assert titles(drawn(draw_neighbours(run.task, [one], labels))) == ["test 0\n-", "train 3\n-\n+1.0e+00"]
    assert len(drawn(draw_neighbours(None, [one], labels)).axes[0].patches) == 1
    none = dataclasses.replace(one, harmful=empty)
    drawn(draw_neighbours(run.task, [none], labels))
    drawn(draw_neighbours(None, [none], labels))


def test_class_by_class_means_are_those_of_the_whole_matrix(run, monkeypatch):
    matrix = np.array(run.scores(), np.float64)
    test, train = (data.tensors[1].numpy() for data in (run.task.test, run.task.train))
    expected = [[matrix[np.ix_(test == b, train == a)].mean() for a in np.unique(train)] for b in np.unique(test)]
    monkeypatch.setattr(classes, "ROWS_BYTES", 1)
    found = classes.class_means(run.folder, show=False)
    np.testing.assert_allclose(found.means, expected, rtol=1e-5)
    assert (found.test.tolist(), found.train.tolist()) == (np.unique(test).tolist(), np.unique(train).tolist())
    figure = drawn(of_run.classes_figure(run.folder, run.task, show=False))
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-5)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == run.task.classes
    low, high = image.get_clim()
    assert low == -high == -np.abs(found.means).max()
    blue = image.cmap(image.norm(-sign(run) * high))
    assert blue[2] > blue[0], "what helps is blue"


def test_class_means_leave_out_what_is_not_finite_and_unknown(monkeypatch):
    matrix = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    matrix[0, 1] = np.nan
    columns = {"stest": np.array([1.0, np.nan, 1.0]), "grads": np.array([0.0, 0.0, 2.0, np.nan])}
    monkeypatch.setattr(classes, "matrix_tests", lambda folder: np.arange(3))
    monkeypatch.setattr(classes, "stored_column", lambda folder, stage, name: columns[stage])
    monkeypatch.setattr(classes, "matrix_rows", lambda folder, tests, budget: iter([matrix[:2], matrix[2:]]))
    found = classes.class_means(types.SimpleNamespace(), show=False)
    assert (found.test.tolist(), found.train.tolist()) == ([1], [0, 2])
    np.testing.assert_allclose(found.means, [[(0 + 8 + 9) / 3, (2 + 10) / 2]])
    matrix[:] = np.nan
    assert np.isnan(classes.class_means(types.SimpleNamespace(), show=False).means).all()
    drawn(classes.draw_classes(classes.class_means(types.SimpleNamespace(), show=False)))


def test_many_classes_are_drawn_without_numbers_and_too_many_are_refused(monkeypatch, tmp_path):
    many = classes.ClassMeans(np.arange(50), np.arange(90), np.random.default_rng(0).standard_normal((50, 90)))
    figure = drawn(classes.draw_classes(many))
    assert len(figure.axes[0].texts) == 0
    assert len(figure.axes[0].get_xticklabels()) <= classes.NAMED
    run = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    run.all()
    monkeypatch.setattr(classes, "MOST_CLASSES", 2)
    with pytest.raises(BadInput, match="classes: expected at most 2, found 3"):
        classes.class_means(run.folder, show=False)
    regression = Run(tmp_path / "g", tasks.regression(), **QUIET)
    regression.all()
    with pytest.raises(BadInput, match="classes: expected integer labels"):
        classes.class_means(regression.folder, show=False)


def test_the_histogram_counts_every_influence_once(run, monkeypatch):
    matrix = np.array(run.scores())
    monkeypatch.setattr(histogram, "ROWS_BYTES", 1)
    found = histogram.distribution(run.folder, np.arange(6), show=False)
    assert found.counts.sum() == matrix.size
    np.testing.assert_array_equal(found.counts, np.histogram(matrix, found.edges)[0])
    assert (found.negative, found.positive, found.zero) == ((matrix < 0).sum(), (matrix > 0).sum(), (matrix == 0).sum())
    assert 0.0 in found.edges
    figure = drawn(of_run.histogram_figure(run.folder, 3, show=False))
    assert titles(figure) == ["20 influences on test sample 3"]
    for bar in figure.axes[0].patches:
        helps = sign(run) * (bar.get_x() + bar.get_width() / 2) < 0
        assert bar.get_facecolor() == to_rgba(HELPFUL if helps else HARMFUL)


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, np.nan], [1e-30, -1e30], [5.0, 5.0]])
def test_odd_distributions_are_drawn(values, monkeypatch):
    row = np.array([values], np.float32)
    monkeypatch.setattr(histogram, "matrix_rows", lambda folder, tests, budget: iter([row]))
    found = histogram.distribution(None, np.array([0]), show=False)
    assert found.counts.sum() == np.isfinite(row).sum()
    drawn(histogram.draw_histogram(found))


def test_layers_stand_in_the_models_order_the_largest_of_many():
    share = np.array([0.1, -0.3, 0.0, 0.7, 0.5])
    shares = LayerShares(("", "a" * 60, "b", "c", "d"), np.arange(5), share[:, None] + np.zeros((5, 4)), share)
    axes = drawn(draw_layers(shares, 3)).axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [-30, 70, 50])
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["…" + "a" * 39 + " (1)", "c (3)", "d (4)"]
    assert axes.patches[0].get_facecolor() == to_rgba(HARMFUL)
    assert axes.get_title().endswith(": 3 of 5")
    nothing = dataclasses.replace(shares, share=np.full((5, 4), np.nan), share_of_all=np.full(5, np.nan))
    drawn(draw_layers(nothing))


def test_layers_and_self_influence_of_a_run(run):
    shares = run.layer_shares()
    axes = drawn(of_run.layers_figure(run.folder)).axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], 100 * shares.share_of_all)
    figure = drawn(of_run.suspects_figure(run.folder, run.task, k=5))
    suspects = run.suspects(5)
    assert [int(title.split()[1]) for title in titles(figure)[1:]] == suspects.ids.tolist()
    assert len(figure.axes[0].lines) == 5
    assert len(drawn(of_run.suspects_figure(run.folder, None)).axes) == 1


def test_what_is_not_there_is_said(run, tmp_path):
    bare = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    bare.all()
    without_matrix(bare.path)
    folder = Run(bare.path).folder
    for draw, words in (
        (lambda: of_run.classes_figure(folder, None), "expected a matrix to be averaged class by class"),
        (lambda: of_run.histogram_figure(folder), "expected a matrix to count its influences"),
        (lambda: of_run.layers_figure(folder), "expected influences by layer, found none"),
        (lambda: of_run.suspects_figure(folder, None), "run infl-cache self-influence"),
        (lambda: of_run.validation_figure(folder, "loo"), "loo.json: expected a validation, found none"),
    ):
        with pytest.raises(IncompleteStore, match=words):
            draw()
    drawn(of_run.neighbours_figure(folder, None, k=3))


def test_memory_does_not_grow_with_the_test_samples(monkeypatch):
    n_train = 20_000
    labels = {"grads": np.arange(n_train) % 10.0}

    def peak(n_test):
        def rows(*given):
            return (np.random.default_rng(j).standard_normal((1, n_train), np.float32) for j in range(n_test))

        for module in (classes, histogram):
            monkeypatch.setattr(module, "matrix_rows", rows)
        monkeypatch.setattr(classes, "matrix_tests", lambda folder: np.arange(n_test))
        monkeypatch.setattr(
            classes, "stored_column", lambda f, stage, name: labels.get(stage, np.arange(n_test) % 10.0)
        )
        tracemalloc.start()
        classes.class_means(None, show=False)
        histogram.distribution(None, np.arange(n_test), show=False)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(40) < peak(4) + 500_000
