"""Training samples chosen by what they did: as NumPy chooses them on the matrix, as subsets, and as files."""

import json

import numpy as np
import pytest

from infl_cache import BadInput, IncompleteStore, Run
from infl_cache.stages import chosen
from tests import tasks
from tests.test_reading import without_matrix

QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}


@pytest.fixture(scope="module", params=["loss", "margin"])
def run(request, tmp_path_factory):
    made = Run(tmp_path_factory.mktemp("run") / "r", tasks.mlp(n_train=20, n_test=6), measure=request.param, **QUIET)
    made.all()
    return made


def keys(run, row, effect):
    sign = -1 if run.options.selection.measure == "margin" else 1
    return {"helpful": sign * row, "harmful": -sign * row, "both": -np.abs(row)}[effect]


@pytest.mark.parametrize("effect", ["helpful", "harmful", "both"])
def test_the_most_influential_are_those_of_the_whole_matrix(run, effect):
    matrix, targets = np.array(run.scores(), np.float64), run.task.test.tensors[1].numpy()
    label = int(targets[0])
    for asked, row in (
        ({}, matrix.mean(0)),
        ({"test": 2}, matrix[2]),
        ({"test": np.int64(2)}, matrix[2]),
        ({"test": [5, 0, 3]}, matrix[[5, 0, 3]].mean(0)),
        ({"label": label}, matrix[targets == label].mean(0)),
    ):
        found, key = run.most_influential(7, effect, **asked), keys(run, row, effect)
        assert found.ids.tolist() == [i for i in np.argsort(key, kind="stable")[:7] if key[i] < 0]
        np.testing.assert_allclose(found.values, row[found.ids], rtol=1e-5)


def test_none_is_called_helpful_or_harmful_that_is_not(run):
    for asked in ({}, {"test": 2}, {"test": [5, 0]}, {"label": int(run.task.test.tensors[1][0])}):
        ends = [run.most_influential(1000, end, **asked) for end in ("helpful", "harmful")]
        assert np.intersect1d(*(end.ids for end in ends)).tolist() == []
        assert sum(len(end.ids) for end in ends) == 20
        for end, direction in zip(ends, (-1, 1) if run.options.selection.measure == "loss" else (1, -1), strict=True):
            assert (direction * end.values > 0).all()
        assert len(run.most_influential(1000, "both", **asked).ids) == 20


def test_without_a_matrix_the_rankings_answer_and_averages_do_not(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), top_k=4, **QUIET)
    run.all()
    asked = [{"test": 1}, {"label": 0}, {}]
    before = [run.most_influential(4, "both", **each).ids.tolist() for each in asked]
    without_matrix(run.path)
    assert [run.most_influential(4, "both", **each).ids.tolist() for each in asked] == before
    with pytest.raises(IncompleteStore, match="expected a matrix to average over chosen test samples"):
        run.most_influential(4, test=[0, 1])
    with pytest.raises(BadInput, match=r"k: expected at most 4, .*found 5"):
        run.most_influential(5, "both", test=1)


def test_what_cannot_be_meant_is_refused(run, tmp_path):
    for ask, words in (
        (lambda: run.most_influential(effect="bad"), "effect: expected one of helpful, harmful, both, found 'bad'"),
        (lambda: run.most_influential(test=0, label=1), "test, label: expected one of them, found both"),
        (lambda: run.most_influential(0), "k: expected at least 1, found 0"),
        (lambda: run.most_influential(test=6), "test sample: expected 0 to 5, found 6"),
        (lambda: run.most_influential(test=[0, 6]), "test sample: expected 0 to 5, found 6"),
        (lambda: run.most_influential(test=[]), "test: expected a test sample, or a list of them"),
        (lambda: run.most_influential(test=[0.5]), "test: expected a test sample, or a list of them"),
        (lambda: run.subset_of([20]), r"ids: expected numbers of training samples, 0 to 19, found \[20\]"),
        (lambda: run.subset_without([-1]), "ids: expected numbers of training samples"),
        (lambda: run.subset_of([0.5]), "ids: expected numbers of training samples"),
        (lambda: run.subset_of([[1], [2]]), "ids: expected numbers of training samples"),
        (lambda: run.subset_of([3, 3, 1]), "ids: expected each training sample once, found 1 twice"),
        (lambda: Run(run.path).subset_of([3]), "task: expected a Task"),
    ):
        with pytest.raises(BadInput, match=words):
            ask()
    some = Run(tmp_path / "some", tasks.mlp(), test="0:2", **QUIET)
    some.all()
    with pytest.raises(IncompleteStore, match=r"expected test samples that it was asked about .*found 3"):
        some.most_influential(test=[0, 3])


def test_subsets_are_these_samples_and_all_others(run):
    ranking = run.most_influential(5, "harmful")
    inputs = run.task.train.tensors[0]
    found, rest = run.subset_of(ranking), run.subset_without(ranking)
    assert [x.tolist() for x, _ in found] == inputs[ranking.ids].tolist()
    keep = np.setdiff1d(np.arange(20), ranking.ids)
    assert [x.tolist() for x, _ in rest] == inputs[keep].tolist()
    assert (len(run.subset_of([])), len(run.subset_without([]))) == (0, 20)


def test_rows_are_averaged_a_few_at_a_time_and_without_what_is_not_finite(run, monkeypatch):
    matrix = np.array(run.scores())
    monkeypatch.setattr(chosen, "ROWS_BYTES", 1)
    tests = np.array([4, 1, 2])
    np.testing.assert_allclose(chosen.mean_over(run.folder, tests), matrix[tests].mean(0), rtol=1e-5)
    matrix[1, 3], matrix[tests, 5] = np.nan, np.inf
    monkeypatch.setattr(chosen, "matrix_rows", lambda folder, tests, budget: (matrix[[j]] for j in tests))
    found = chosen.mean_over(run.folder, tests)
    np.testing.assert_allclose(found[3], matrix[[4, 2], 3].mean(), rtol=1e-5)
    assert np.flatnonzero(np.isnan(found)).tolist() == [5]


@pytest.mark.parametrize(
    ("name", "read"),
    [("a.txt", lambda path: np.loadtxt(path, dtype=int)), ("a.json", lambda path: json.loads(path.read_text())),
     ("a.npy", lambda path: np.load(path, allow_pickle=False))],
)  # fmt: skip
def test_a_file_of_ids_comes_back_as_it_was_written(run, name, read, tmp_path):
    ids, path = run.most_influential(4).ids, tmp_path / "new" / name
    chosen.write_ids(path, ids, chosen.require_file(path, None))
    assert list(read(path)) == ids.tolist()
    assert [x.tolist() for x, _ in run.subset_of(read(path))] == run.task.train.tensors[0][ids].tolist()
    assert [each.name for each in path.parent.iterdir()] == [name]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out, kind, words in (
        (tmp_path / "a.csv", None, r"out: expected a name that ends in .txt, .json, .npy, or --format, found 'a.csv'"),
        (tmp_path / "a", "xml", "found 'xml'"),
        (tmp_path / "file" / "a.txt", None, "expected a folder that can be written in"),
        (tmp_path / "file" / "b" / "a.txt", None, "expected a folder that can be written in|cannot be written"),
        (tmp_path, "txt", "expected a file that can be written"),
    ):
        with pytest.raises(BadInput, match=words):
            chosen.require_file(out, kind)
