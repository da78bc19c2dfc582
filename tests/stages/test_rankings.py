"""`rankings.npz` is the same from tiles that passed and from the finished matrix, and made when it has to be."""

import numpy as np
import pytest

from infl_cache import IncompleteStore, Run
from infl_cache.disk.run import RunFolder
from infl_cache.stages import rankings as stage
from infl_cache.stages.opening import opened
from tests import tasks
from tests.test_reading import WORDS, without_matrix

QUIET = {"progress": False}


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "r", tasks.mlp(), damping=0.1, top_k=4, top_k_train=3, memory=10**8, **QUIET)
    made.all()
    return made


def written(run, anew=False, standings=None):
    with opened(RunFolder(run.path), run.task, run.options) as now:
        stage.write_rankings(now, anew, standings(now) if standings else None)
    with np.load(run.path / "rankings.npz", allow_pickle=False) as found:
        return dict(found)


def streamed(run, matrix):
    def passed(now):
        found = stage.new_standings(now)
        for start in (6, 0):
            found.add(np.array([3, 1]), start, matrix[[3, 1], start : start + 6])
            found.add(np.array([0, 2]), start, matrix[[0, 2], start : start + 6])
        return found

    return written(run, True, passed)


def test_standings_and_the_matrix_give_the_same_file_with_and_without_a_matrix(run):
    matrix, of_matrix = np.array(run.scores()), written(run)
    assert {"train_helpful_ids", "class_harmful_values", "class_labels", "mean"} <= of_matrix.keys()
    assert of_matrix["train_harmful_ids"].shape == (10, 3)
    assert of_matrix["class_labels"].tolist() == np.unique(run.task.test.tensors[1]).tolist()
    found = streamed(run, matrix)
    without_matrix(run.path)
    again = streamed(run, matrix)
    for name, expected in of_matrix.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(again[name], found[name], err_msg=name)


def test_rankings_are_made_anew_when_their_lengths_change_and_only_then(run, monkeypatch):
    made = []
    original = stage.new_standings
    monkeypatch.setattr(stage, "new_standings", lambda now: (made.append(1), original(now))[1])
    written(run)
    assert made == []
    for options in ({"top_k": 2}, {"top_k_train": 1}):
        run = Run(run.path, run.task, **options, **QUIET)
        written(run), written(run)
    assert made == [1, 1]
    assert written(run)["train_helpful_ids"].shape == (10, 1)


def test_without_a_matrix_other_rankings_cannot_be_had(run):
    without_matrix(run.path)
    before = written(run)
    with pytest.raises(IncompleteStore, match=WORDS):
        written(Run(run.path, run.task, top_k=5, **QUIET))
    after = written(run)
    assert all(np.array_equal(after[name], before[name], equal_nan=True) for name in before)


def test_classes_are_integer_targets_and_left_out_with_a_note_where_there_is_no_room(tmp_path, run, caplog):
    regression = Run(tmp_path / "regression", tasks.regression(), damping=0.1, **QUIET)
    regression.all()
    assert written(regression)["class_labels"].tolist() == []
    assert caplog.text == ""
    small = Run(run.path, run.task, memory=100, top_k=2, **QUIET)
    assert written(small)["class_labels"].tolist() == []
    assert "no rankings by class: their sums do not fit in 12 B; give more --memory" in caplog.text
