"""Which rows go into which format, and a file that is the old one or the whole new one."""

import csv
import json
import shutil

import numpy as np
import pytest

from infl_cache import BadInput, DamagedStore, Run
from infl_cache.disk.run import RunFolder
from infl_cache.selecting import Choice, select
from infl_cache.stages.export import export, writing
from tests import tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(tmp_path_factory.mktemp("run") / "r", tasks.mlp(), damping=0.1, solver="exact", progress=False)
    made.all()
    return made


def test_json_and_csv_hold_the_matrix_and_its_ends(run, tmp_path):
    matrix = np.array(run.scores())
    found = json.loads(export(run.folder, "json", tmp_path / "a.json", show=False).read_text())
    assert found == json.loads(export(run.folder, "json", tmp_path / "b.json", "all", show=False).read_text())
    assert list(found) == ["0", "1", "2", "3"]
    for j, row in enumerate(matrix):
        entry = found[str(j)]
        assert np.float32(entry["influence"]).tolist() == row.tolist()
        assert entry["helpful"] == np.argsort(row, kind="stable").tolist()
        assert entry["harmful"] == np.argsort(-row, kind="stable").tolist()
        assert entry["label"] == int(run.task.test.tensors[1][j])
    with open(export(run.folder, "csv", tmp_path / "a.csv", 2, show=False), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(min(2, count) for row in matrix for count in ((row < 0).sum(), (row > 0).sum()))
    assert [int(row["train_id"]) for row in rows[:4]] == [*np.argsort(matrix[0])[:2], *np.argsort(-matrix[0])[:2]]
    assert [row["effect"] for row in rows[:4]] == ["helpful"] * 2 + ["harmful"] * 2
    assert all(float(row["loss_change_if_removed"]) == -float(row["influence"]) for row in rows)
    with open(export(run.folder, "csv", tmp_path / "b.csv", 1000, show=False), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == matrix.size  # each pair once, under what it does
    assert all((row["effect"] == "helpful") == (float(row["influence"]) < 0) for row in rows)


@pytest.mark.parametrize(
    ("kind", "top_k", "words"),
    [
        ("xml", None, "format: expected one of json, csv, parquet, found 'xml'"),
        ("csv", 0, "top-k: expected at least 1, found 0"),
        ("json", -1, "top-k: expected at least 1, found -1"),
        ("csv", "all", "top-k: expected a number for csv, found all; --format parquet has every pair"),
        ("parquet", "some", "top-k: expected at least 1, found some; or all"),
    ],
)
def test_what_cannot_be_meant_is_refused(run, kind, top_k, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        export(run.folder, kind, tmp_path / "x", top_k, show=False)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "stored_column", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "file" / "x.csv", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match=r"cannot be written .*; choose another --out"):
            export(run.folder, "csv", out, show=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_an_export_that_fails_leaves_the_one_before(run, kind, tmp_path, monkeypatch):
    path = export(run.folder, kind, tmp_path / f"x.{kind}", 3, show=False)
    before = path.read_bytes()

    def failing(*given):
        yield next(original(*given))
        assert path.read_bytes() == before
        raise RuntimeError("the lights went out")

    name = "_rows" if kind == "json" else "_ends"
    original = getattr(writing, name)
    monkeypatch.setattr(writing, name, failing)
    with pytest.raises(RuntimeError, match="lights"):
        export(run.folder, kind, path, 4, show=False)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("place", ["export", "export/influence.json", "export/influence.json.partial"])
def test_a_link_in_the_run_is_not_followed(run, place, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    outside, link = tmp_path / "outside", tmp_path / "r" / place
    outside.mkdir()
    (outside / "theirs").write_text("precious")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if place == "export" else outside / "theirs")
    with pytest.raises(DamagedStore, match="expected a file or folder of the run itself, found a link"):
        export(RunFolder(tmp_path / "r"), "json", show=False)
    assert {each.name: each.read_text() for each in outside.iterdir()} == {"theirs": "precious"}


def test_what_lies_beside_the_file_is_not_written_through(run, tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "a.json.partial").symlink_to(tmp_path / "theirs")
    assert export(run.folder, "json", tmp_path / "a.json", show=False).stat().st_size > 100
    assert (tmp_path / "theirs").read_text() == "precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "theirs"]


@pytest.mark.parametrize("name", ["influence.npy", "manifest.json", "grad_z.zarr/zarr.json", "ledger.sqlite"])
def test_no_file_of_the_run_itself_is_written_over(run, name):
    before = (run.path / name).read_bytes()
    with pytest.raises(BadInput, match=r"out: expected a file of your own, found .* which is the run's"):
        export(run.folder, "json", run.path / "export" / ".." / name, show=False)
    with pytest.raises(BadInput, match=r"out: expected a file of your own, found .* which is the run's"):
        select(run.path, Choice(k=2), run.path / name, "npy")
    assert (run.path / name).read_bytes() == before
    assert not (run.path / f"{name}.partial").exists()
