"""The page of a run: numbers that are the matrix's, samples that are the task's, a size that is kept to."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from infl_cache import BadInput, DamagedStore, Run
from infl_cache.stages.page import writing as stage
from infl_cache.stages.page.content import of_tests
from tests import tasks
from tests.test_reading import without_matrix

QUIET = {"progress": False}


def data_of(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def made(path, task, **options):
    run = Run(path, task, damping=0.1, **{"solver": "exact", **options}, **QUIET)
    run.all()
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    task = dataclasses.replace(tasks.mlp(n_train=30, n_test=12), classes=["a", "b", "<script>c"])
    run = made(tmp_path_factory.mktemp("full") / "r", task, by_layer=True, top_k=9)
    run.self_influence()
    return run


@pytest.fixture
def copy(full, tmp_path):
    shutil.copytree(full.path, tmp_path / "r", ignore=shutil.ignore_patterns("report"))
    return Run(tmp_path / "r", full.task, **QUIET)


def as_pairs(ranking, end):
    """Of a ranking what really helps, or harms."""
    both = zip(ranking.ids, ranking.values, strict=True)
    return [[int(i), np.float32(value)] for i, value in both if (value < 0) == end.startswith("help")]


def test_numbers_are_those_of_the_run(full):
    data, matrix = data_of(full.report(neighbours=4)), np.array(full.scores())
    assert [test["id"] for test in data["tests"]] == list(range(12))
    assert data["classes"] == ["a", "b", "<script>c"]
    assert data["notes"] == []
    for test in data["tests"]:
        row = matrix[test["id"]]
        for end in ("helpful", "harmful"):
            found = [[i, np.float32(value)] for i, value in test[end]]
            assert found == as_pairs(getattr(full, end)(test["id"], 4), end)
            assert all(value == row[i] for i, value in found)
        assert test["label"] == int(full.task.test[test["id"]][1])
        assert test["layers"] == full.layer_shares().share[:, test["id"]].tolist()
    assert data["layers"]["share"] == full.layer_shares().share_of_all.tolist()
    assert data["suspects"] == {"by": "self", "ids": full.suspects(30).ids.tolist()}
    for train in range(30):
        found = data["trains"][str(train)]
        assert found["label"] == int(full.task.train[train][1])
        assert np.isclose(found["mean"], matrix[:, train].mean(), rtol=1e-5)
        for name in ("helps", "harms"):
            assert [[i, np.float32(value)] for i, value in found[name]] == as_pairs(getattr(full, name)(train, 8), name)
    sizes = data["totals"]["sizes"]
    assert sum(sizes["negative"]) + sum(sizes["positive"]) + sizes["small"] == matrix.size
    assert sum(sizes["negative"]) >= (matrix < 0).sum() - sizes["small"] > 0
    between = data["totals"]["between"]
    labels = [np.array([int(y) for _, y in each]) for each in (full.task.train, full.task.test)]
    for row, a in enumerate(between["train"]):
        for column, b in enumerate(between["test"]):
            expected = matrix[labels[1] == b][:, labels[0] == a].astype(np.float64).mean()
            assert np.isclose(between["mean"][row][column], expected, rtol=1e-9)


def test_samples_are_shown_as_they_look_or_as_the_task_renders_them(full):
    data = data_of(full.report())
    assert list(data["samples"]["test"]["3"]) == ["cells"]
    run = Run(full.path, dataclasses.replace(full.task, render=lambda sample: f"label {int(sample[1])}"), **QUIET)
    data = data_of(run.report())
    assert data["samples"]["train"]["3"] == {"text": f"label {int(full.task.train[3][1])}"}
    assert run.influence().computed == 0  # another render is not another run


def test_a_render_that_gives_no_sample_is_named(full):
    for render, words in (
        (lambda sample: 3 + sample[7], r"render, on test\[\d+\], raised IndexError"),
        (lambda sample: object(), r"render, on test\[\d+\]: expected a picture \(H, W\).*found object"),
    ):
        with pytest.raises(BadInput, match=words):
            Run(full.path, dataclasses.replace(full.task, render=render), **QUIET).report()


def test_without_a_task_samples_are_left_out_and_it_says_so(full):
    data = data_of(Run(full.path, **QUIET).report())
    assert data["samples"] is None
    assert data["notes"][0] == "No samples are shown: Run(path, task).report() shows them."
    assert len(data["tests"]) == 12


def test_a_selection_says_what_it_is(full):
    data, losses = data_of(full.report(most_tests=4)), {}
    assert data["notes"][0] == (
        "4 of 12 test samples are shown: the 2 of largest loss and 2 spread over the others. --tests 3,17 shows others."
    )
    losses = {test["id"]: test["loss"] for test in data_of(full.report())["tests"]}
    worst = sorted(losses, key=losses.get)[-2:]
    assert set(worst) <= {test["id"] for test in data["tests"]}
    assert [test["id"] for test in data_of(full.report(tests=[7, 2]))["tests"]] == [2, 7]


def test_a_run_without_a_matrix_shows_its_rankings_and_says_what_it_does_not_know(full, copy):
    whole = data_of(full.report(neighbours=5))
    without_matrix(copy.path)
    bare = data_of(Run(copy.path, full.task, **QUIET).report(neighbours=5))
    assert bare["tests"] == whole["tests"]
    assert bare["trains"] == whole["trains"]
    assert "totals" not in bare
    assert any("--no-matrix" in note and "cannot be known" in note for note in bare["notes"])
    assert len(data_of(Run(copy.path, **QUIET).report())["tests"][0]["helpful"]) == 8
    with pytest.raises(BadInput, match="at most 9, the length of the stored rankings"):
        Run(copy.path, **QUIET).report(neighbours=10)


def test_without_self_influence_and_layers_the_most_harmful_are_named_as_such(tmp_path):
    run = made(tmp_path / "r", tasks.regression(n_train=20, n_test=4))
    data = data_of(run.report())
    mean = np.array(run.scores(), np.float64).mean(0)
    harmful = [i for i in np.argsort(-mean, kind="stable").tolist() if mean[i] > 0]
    assert data["suspects"] == {"by": "mean", "ids": harmful}
    assert 0 < len(harmful) < 20
    assert data["totals"]["between"] is None
    assert (data["layers"], "self" in next(iter(data["trains"].values()))) == (None, False)
    assert ["harmful on average" in data["notes"][1], "--by-layer" in data["notes"][2]] == [True, True]


def test_a_measure_that_is_better_when_higher_turns_the_words_round(tmp_path):
    run = made(tmp_path / "r", tasks.mlp(n_train=20, n_test=4), measure="margin")
    data = data_of(run.report())
    assert data["lower_helps"] is False
    assert data["sign"].startswith("Positive = helpful")
    assert data["tests"][0]["helpful"][0][1] == max(
        value for end in ("helpful", "harmful") for _, value in data["tests"][0][end]
    )


class Pictures:
    """Noise, which cannot be compressed."""

    def __init__(self, count, side):
        self.count, self.side = count, side

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, self.side, self.side, generator=generator), index % 3


def test_a_page_is_kept_under_its_limit_by_smaller_pictures_then_by_fewer_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("infl_cache.stages.page.content.SUSPECTS", 3)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    task = dataclasses.replace(tasks.mlp(), model=model, train=Pictures(40, 64), test=Pictures(8, 64))
    run = made(tmp_path / "r", task, solver="exact")
    path = run.report(neighbours=3)
    whole, size = data_of(path), path.stat().st_size
    assert whole["samples"]["test"]["0"]["size"] == [64, 64]
    assert not any("shrunk" in note for note in whole["notes"])
    pictures = sum(len(each["png"]) for group in whole["samples"].values() for each in group.values())
    for part, words, tests in ((0.7, "shrunk to at most 48 pixels a side, from up to 64", 8), (0.15, "do not fit", 4)):
        limit = int(size - pictures + part * pictures)
        monkeypatch.setattr(stage, "LIMIT", limit)
        run.report(neighbours=3)
        assert path.stat().st_size <= limit
        assert any(words in note for note in data_of(path)["notes"])
        assert len(data_of(path)["tests"]) <= tests
    run.report(neighbours=3, tests="all", most_tests=1)
    assert any("More do not fit" in note for note in data_of(path)["notes"])  # not only where none were named
    monkeypatch.setattr(stage, "LIMIT", 40_000)
    before, tried = path.read_bytes(), []
    monkeypatch.setattr(stage, "of_tests", lambda *given: tried.append(len(given[2])) or of_tests(*given))
    with pytest.raises(BadInput, match=r"expected a page under 40\.0 kB, found a larger one even for one test sample"):
        run.report()
    assert path.read_bytes() == before
    assert tried == [8, 4, 2, 1]  # smaller pictures do not help where none at all have room


def test_no_page_is_made_of_a_damaged_store(copy):
    content = bytearray((copy.path / "influence.npy").read_bytes())
    content[-3] ^= 1
    (copy.path / "influence.npy").write_bytes(content)
    with pytest.raises(DamagedStore, match="not what was committed"):
        copy.report()
    assert not (copy.path / stage.PAGE).exists()


@pytest.mark.parametrize("name", ["rankings.npz", "by_layer.npz", "s_test.zarr/residual", "grad_z.zarr/target"])
def test_nor_of_another_file_that_is_damaged(copy, name):
    place = copy.path / name
    place = place if place.is_file() else max(place.rglob("c*0"), key=lambda path: path.is_file())
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    with pytest.raises(DamagedStore):
        Run(copy.path, **QUIET).report()
    assert not (copy.path / stage.PAGE).exists()


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(copy, monkeypatch):
    monkeypatch.setattr("infl_cache.pipeline.report", lambda *_: pytest.fail("read"))
    (copy.path / stage.PAGE).mkdir(parents=True)
    with pytest.raises(BadInput, match=r"index\.html: expected a file that can be written"):
        copy.report()
