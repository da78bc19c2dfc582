"""A stage that the disk has no room for says so before it writes anything, and exits with 5."""

import dataclasses
import shutil
from collections import namedtuple

import pytest

from infl_cache import Run
from infl_cache.__main__ import main
from infl_cache.errors import DiskFull
from infl_cache.stages.tiles import FINAL, PARTIAL
from tests import tasks

Usage = namedtuple("Usage", "total used free")
TASK = f"{tasks.__file__}:mlp"


@pytest.fixture
def disk(monkeypatch):
    """Sets the free bytes that the disk claims to have."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free, 0, free))


@pytest.fixture
def run(tmp_path):
    """A run that has its gradients."""
    run = Run(tmp_path / "run", tasks.mlp(), solver="identity", progress=False)
    run.grads()
    return run


def files(run):
    return sorted(str(path) for path in run.path.rglob("*") if "sqlite" not in path.name)


def test_stage_2_asks_for_room_for_every_row_that_is_not_done(run, disk):
    n_test, size = len(run.task.test), sum(each.numel() for each in run.task.model.parameters())
    row = 8 * size + 80
    before = files(run)
    disk(n_test * row - 1)
    with pytest.raises(DiskFull, match=rf"stest: expected .* free for s_test of {n_test} test samples, found .*; use"):
        run.stest()
    assert files(run) == before
    some = Run(run.path, run.task, solver="identity", test="0:2", progress=False)
    disk(2 * row)
    assert some.stest().rows == 2
    disk((n_test - 2) * row - 1)
    more = Run(run.path, run.task, solver="identity", test="all", progress=False)
    with pytest.raises(DiskFull, match=rf"s_test of {n_test - 2} test samples"):
        more.stest()
    disk((n_test - 2) * row)
    more.stest()
    disk(0)
    assert more.stest().computed == 0


def test_the_state_of_an_iteration_needs_room_too(run, disk):
    n_test, size = len(run.task.test), sum(each.numel() for each in run.task.model.parameters())
    disk(n_test * (8 * size + 80) + 5 * n_test * 8 * size - 1)
    solving = Run(run.path, run.task, solver="cg", damping=0.1, progress=False)
    with pytest.raises(DiskFull, match="stest: expected"):
        solving.stest()
    disk(n_test * (8 * size + 80) + 5 * n_test * 8 * size)
    solving.stest()


def test_starting_over_takes_the_place_of_what_is_there(run, disk):
    run.stest()
    there = sum(path.stat().st_size for path in (run.path / "s_test.zarr").rglob("c.*"))
    n_test, size = len(run.task.test), sum(each.numel() for each in run.task.model.parameters())
    disk(n_test * (8 * size + 80) - there)
    assert run.stest(force=True).computed == n_test


def test_stage_3_asks_for_room_for_its_matrix(run, disk):
    run.stest()
    n_bytes, before = 4 * len(run.task.test) * len(run.task.train), files(run)
    disk(n_bytes - 1)
    with pytest.raises(DiskFull, match=r"influence: expected .* free for the influences of .* or --no-matrix"):
        run.influence()
    assert files(run) == before
    disk(n_bytes)
    run.influence()
    disk(0)
    assert run.influence().computed == 0


def test_what_is_written_of_the_matrix_counts(run, disk):
    run.stest()
    task = dataclasses.replace(run.task)
    run.influence()
    (run.path / FINAL).rename(run.path / PARTIAL)
    disk(0)
    # All of it is on the disk, and is written over.
    assert Run(run.path, task, solver="identity", progress=False).influence(force=True).computed == len(task.test)


def test_rankings_alone_need_less(run, disk):
    run.stest()
    disk(100)
    alone = Run(run.path, run.task, solver="identity", matrix=False, progress=False)
    with pytest.raises(DiskFull, match=r"influence: expected .* for the rankings of .* or shorter rankings"):
        alone.influence()
    disk(100_000)
    assert alone.influence().computed == len(run.task.test)


def test_the_command_exits_with_5(tmp_path, disk, capsys):
    words = ["--task", TASK, "--run", str(tmp_path / "run"), "--solver", "identity", "--no-progress"]
    assert main(["grads", *words]) == 0
    disk(100)
    assert main(["stest", *words]) == 5
    disk(10**9)
    assert main(["stest", *words]) == 0
    disk(10)
    assert main(["influence", *words]) == 5
    assert "influence: expected" in capsys.readouterr().err
