"""The door to matplotlib: files that are whole and the same, axes of others, and a kind word where it is missing."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest

from infl_cache import BadInput
from infl_cache.stages.figures import canvas
from infl_cache.stages.figures.classes import ClassMeans, draw_classes
from infl_cache.stages.figures.histogram import Distribution, draw_histogram
from infl_cache.stages.figures.layers import draw_layers
from infl_cache.stages.figures.neighbours import draw_bars, draw_pictures
from infl_cache.stages.figures.suspects import draw_suspects
from infl_cache.stages.layers import LayerShares
from infl_cache.stages.rank import Ranking
from infl_cache.stages.worst import Asked
from tests import tasks

pytest.importorskip("matplotlib")
FOUND = Distribution(np.array([-1.0, 0.0, 1.0]), np.array([3, 4]), 3, 4, 0)


@pytest.mark.parametrize(("kind", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_equal_figures_are_equal_files(kind, head, tmp_path):
    paths = [canvas.save(draw_histogram(FOUND), tmp_path / "new" / f"{name}.{kind}") for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes().startswith(head)
    assert sorted(each.name for each in paths[0].parent.iterdir()) == [f"a.{kind}", f"b.{kind}"]


@pytest.mark.parametrize("kind", canvas.FORMATS)
def test_names_are_drawn_as_they_are_and_never_as_formulas_or_commands(kind, tmp_path):
    evil = [r"$\frac{a$", "a\x1b[2J\nb\0", "costs $5, not $6", "\ud800"]
    ranking = Ranking(np.array([0, 1, 2, 3]), np.array([-4, -3, -2, -1], np.float32))
    asked, labels = [Asked(0, 0.0, 1.0, 0.5, ranking, ranking)], np.arange(4.0)
    task = dataclasses.replace(tasks.convnet(), classes=evil)
    shares = LayerShares(tuple(evil), np.ones(4, np.int64), np.ones((4, 1)), np.ones(4))
    means = ClassMeans(np.arange(4), np.arange(4), np.ones((4, 4)))
    for name, figure in {
        "pictures": draw_pictures(task, asked, labels), "bars": draw_bars(asked, labels, evil),
        "classes": draw_classes(means, names=evil), "layers": draw_layers(shares),
        "suspects": draw_suspects(task, np.ones(10), np.arange(10), np.arange(10) % 4.0, 4),
    }.items():  # fmt: skip
        path = canvas.save(figure, tmp_path / f"{name}.{kind}")
        if kind == "svg":
            minidom.parse(str(path))
            assert name == "layers" or "costs $5" in path.read_text()


def test_a_figure_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    path = canvas.save(draw_histogram(FOUND), tmp_path / "a.png")
    before, figure = path.read_bytes(), draw_histogram(FOUND)

    def failing(buffer, **given):
        buffer.write(b"half")
        raise RuntimeError("the lights went out")

    monkeypatch.setattr(figure, "savefig", failing)
    with pytest.raises(RuntimeError, match="lights"):
        canvas.save(figure, path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_axes_of_another_figure_are_drawn_into(tmp_path):
    figure = canvas.new_figure(8, 4)
    left, right = figure.subplots(1, 2)
    assert draw_histogram(FOUND, axes=right) is figure
    assert (len(left.patches), len(right.patches)) == (0, 2)
    part = canvas.new_figure(8, 4).subfigures(1, 2)[0]
    assert draw_histogram(FOUND, axes=part.subplots()) is part
    canvas.save(part, tmp_path / "whole.png")
    right.remove()
    with pytest.raises(BadInput, match="axes: expected axes of a figure"):
        draw_histogram(FOUND, axes=right)


def test_pyplot_is_never_imported():
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import infl_cache.plotting, infl_cache.__main__
assert "matplotlib" not in sys.modules
import numpy as np
from infl_cache.stages.figures.histogram import *
draw_histogram(Distribution(np.array([-1.0, 0.0, 1.0]), np.array([3, 4]), 3, 4, 0)).canvas.draw()
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kind_word_where_matplotlib_is_missing(tmp_path, uninstalled, caplog):
    uninstalled("matplotlib")
    with pytest.raises(
        BadInput, match=r"figures: expected matplotlib, found none; pip install 'infl_cache\[figures\]'"
    ):
        draw_histogram(FOUND)
    assert canvas.picture(tmp_path / "x.png", lambda: draw_histogram(FOUND)) is None
    assert "no picture: matplotlib is not installed" in caplog.text
    assert list(tmp_path.iterdir()) == []
