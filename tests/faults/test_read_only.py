"""A run on a disk that cannot be written: what computes says so before it begins, what reads works."""

import subprocess

import numpy as np
import pytest

from infl_cache import Run
from infl_cache.__main__ import main
from tests.faults import times
from tests.faults.data import contents, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False}
TASK = "tests/faults/data.py:small_task"
COMPUTING = ("grads", "run", "self-influence", "stest", "influence")[: times(3, 5)]


@pytest.fixture
def runs(small_disk):
    """A finished run and one after its first stage, on a disk that is then mounted anew to be read only."""
    Run(small_disk / "done", small_task(), **OPTIONS).all()
    Run(small_disk / "some", small_task(), **OPTIONS).grads()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


def never(*_):
    pytest.fail("it computes")


@pytest.mark.parametrize("command", COMPUTING)
def test_what_computes_says_so_before_it_begins(command, runs, capsys, monkeypatch):
    for place in ("grads", "stest", "influence", "self_influence"):
        monkeypatch.setattr(f"infl_cache.stages.{place}._compute", never, raising=False)
    for name in ("done", "some", "new", "new/in/new"):
        assert main([command, "--run", str(runs / name), "--task", TASK, "--damping", "0.1", "--solver", "exact"]) == 2
        said = capsys.readouterr().err
        assert "read-only" in said.lower()
        assert str(runs) in said
        assert len(said.strip().splitlines()) == 1


def test_what_reads_works(runs, tmp_path, capsys):
    path = runs / "done"
    for words in (["status"], ["verify"], ["report"], ["export", "--out", str(tmp_path / "influence.json")]):
        assert main([words[0], str(path), *words[1:]]) == 0, capsys.readouterr().err
    assert not (path / "report").exists()
    run = Run(path)
    calm = Run(tmp_path / "calm", small_task(), **OPTIONS)
    calm.all()
    assert np.array_equal(run.scores(), calm.scores())
    assert run.helpful(0, 3).ids.tolist() == calm.helpful(0, 3).ids.tolist()
    assert np.array_equal(run.grad_z([0, 5]), calm.grad_z([0, 5]))
    assert np.array_equal(run.s_test(1), calm.s_test(1))


@pytest.mark.parametrize("words", [["export"], ["report", "--task", TASK]])
def test_what_would_write_beside_the_stores_is_one_line(words, runs, capsys):
    assert main([words[0], str(runs / "done"), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert "read-only" in said.lower()
    assert len(said.strip().splitlines()) == 1


def test_files_that_a_killed_writer_left_go_with_the_next_one_and_not_before(tmp_path):
    run = Run(tmp_path / "run", small_task(), **OPTIONS)
    run.all()
    left = [run.path / name for name in ("rankings.npz.1234.partial", "grad_z.zarr/loss/c.0.99.partial")]
    for each in left:
        each.write_bytes(b"half of it")
    before = contents(run.path)
    Run(run.path).status()
    assert run.verify().sound
    assert contents(run.path) == before, "who only reads removes nothing"
    with run.folder.writing():
        pass
    assert not any(each.exists() for each in left)
    assert run.verify().sound
