"""`--figures`: a file for each figure that the run has the numbers for, and a word for each other."""

import numpy as np
import pytest

from infl_cache import BadInput, DamagedStore, ForeignRun, Run
from infl_cache.disk.run import RunFolder
from infl_cache.stages.figures import writing
from infl_cache.stages.figures.canvas import FORMATS
from tests import tasks

pytest.importorskip("matplotlib")
QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "r", tasks.logistic(), **QUIET)
    made.all()
    return made


def names(written):
    return [path.name for path in written.paths]


def test_all_that_there_is_is_drawn_and_the_rest_is_said(run):
    kind = FORMATS[1]
    found = writing.write_figures(RunFolder(run.path), run.task, kind, show=False)
    assert kind == "svg"
    assert names(found) == [f"{name}.{kind}" for name in ("neighbours", "classes", "histogram")]
    assert all(path.parent == run.path / "report" / "figures" for path in found.paths)
    assert list(found.left_out) == ["layers", "self_influence", "validation_loo"]
    assert "not drawn: layers: " in str(found)
    assert "run infl-cache influence --by-layer" in found.left_out["layers"]
    Run(run.path, run.task, by_layer=True, progress=False).influence()
    run.self_influence()
    run.validate(points=4)
    run.validate(kind="lds", subsets=3, test=2)
    found = writing.write_figures(RunFolder(run.path), None, kind, show=False)
    assert names(found)[3:] == [
        f"{name}.{kind}" for name in ("layers", "self_influence", "validation_loo", "validation_lds")
    ]
    assert found.left_out == {}
    assert sorted(p.name for p in (run.path / "report" / "figures").iterdir()) == sorted(names(found))


def test_a_figure_that_cannot_be_drawn_any_more_is_removed(run, monkeypatch):
    two, every = ("histogram", "self_influence"), writing._figures
    monkeypatch.setattr(writing, "_figures", lambda *given: {name: every(*given)[name] for name in two})
    run.self_influence()
    assert "self_influence.png" in names(writing.write_figures(RunFolder(run.path), None, "png", show=False))
    Run(run.path, run.task, dtype="float32", **QUIET).all(force=True)
    found = writing.write_figures(RunFolder(run.path), None, "png", show=False)
    assert "self_influence" in found.left_out
    assert sorted(p.name for p in (run.path / "report" / "figures").iterdir()) == sorted(names(found))


def test_labels_that_are_no_classes_leave_the_map_out(tmp_path):
    run = Run(tmp_path / "r", tasks.regression(), **QUIET)
    run.all()
    found = writing.write_figures(RunFolder(run.path), run.task, "png", show=False)
    assert names(found) == ["neighbours.png", "histogram.png"]
    assert "expected integer labels" in found.left_out["classes"]


def test_refusals_come_before_any_work(run):
    folder = RunFolder(run.path)
    with pytest.raises(BadInput, match="figures: expected one of png, svg, found 'gif'"):
        writing.write_figures(folder, None, "gif")
    other = tasks.logistic()
    other.train.tensors[0].add_(1)
    with pytest.raises(ForeignRun, match="train"):
        writing.write_figures(folder, other, "png")
    (run.path / "report").mkdir(exist_ok=True)
    (run.path / "report" / "figures").write_text("mine")
    with pytest.raises(BadInput, match="expected a folder that can be written in"):
        writing.require_figures(run.path, "png")
    assert (run.path / "report" / "figures").read_text() == "mine"


@pytest.mark.parametrize("place", ["report/figures", "report/figures/classes.png"])
def test_links_are_not_followed(run, place, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run.path / place).parent.mkdir(parents=True)
    (run.path / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedStore, match=r"found a link, which is not followed"):
        writing.write_figures(RunFolder(run.path), None, "png", show=False)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_damaged_matrix_is_not_drawn(run):
    with open(run.path / "influence.npy", "r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(1e3).tobytes())
    with pytest.raises(DamagedStore, match="are not what was committed"):
        writing.write_figures(RunFolder(run.path), None, "png", show=False)
    assert not (run.path / "report" / "figures").exists()
