"""A run without a matrix has the rankings of one with it, also when it is stopped, carried on, extended or changed."""

import numpy as np
import pytest

from infl_cache import Run
from infl_cache.disk.run import RunFolder
from infl_cache.disk.state import read_header, write_state
from infl_cache.errors import IncompleteStore
from infl_cache.stages import influence as stage
from infl_cache.stages import tally
from tests import tasks

OPTIONS = {"damping": 0.1, "progress": False, "block_rows": 5, "tile_rows": 3, "solver": "exact"}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(stage, "TILE_COLUMNS", 5)


def rankings(run):
    with np.load(run.path / "rankings.npz") as file:
        return {name: file[name] for name in file.files}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture
def with_matrix(tmp_path, small_tiles):
    run = Run(tmp_path / "with", tasks.mlp(), **OPTIONS)
    run.all()
    return rankings(run)


def test_the_rankings_are_those_of_the_matrix(tmp_path, with_matrix):
    run = Run(tmp_path / "r", tasks.mlp(), matrix=False, **OPTIONS)
    run.all()
    assert not list(run.path.glob("influence*.npy"))
    same(rankings(run), with_matrix)
    assert Run(run.path, tasks.mlp(), progress=False).influence().computed == 0
    with pytest.raises(IncompleteStore, match="--no-matrix"):
        run.scores()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_stopped_run_goes_on_from_its_state(tmp_path, with_matrix, monkeypatch, after):
    run = Run(tmp_path / "r", tasks.mlp(), matrix=False, **OPTIONS)
    run.grads(), run.stest()
    plain, seen = stage.tile_values, []

    def failing(*given):
        for item in plain(*given):
            if len(seen) == after:
                raise RuntimeError("stopped")
            seen.append(item[0].index)
            yield item

    monkeypatch.setattr(stage, "tile_values", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        run.influence()
    assert read_header(run.path / tally.STATE).facts["tiles"] == seen
    monkeypatch.setattr(stage, "tile_values", lambda *a: (seen.append(each[0].index) or each for each in plain(*a)))
    again = Run(run.path, tasks.mlp(), progress=False)
    again.influence()
    assert len(seen) == len(set(seen)), "no tile is computed twice"
    same(rankings(again), with_matrix)


def test_a_state_is_older_than_the_tiles_only_by_the_time_it_says(tmp_path, small_tiles, monkeypatch):
    monkeypatch.setattr(tally, "KEEP_SECONDS", 0.0)
    written = []
    monkeypatch.setattr(tally, "write_state", lambda *a: (written.append(a[2]["tiles"]), write_state(*a)))
    Run(tmp_path / "r", tasks.mlp(), matrix=False, **OPTIONS).all()
    assert [len(tiles) for tiles in written] == list(range(1, len(written) + 1))
    assert len(written) > 3


def test_a_kill_between_state_and_ledger_leaves_a_run_that_can_be_finished(tmp_path, with_matrix, monkeypatch):
    run = Run(tmp_path / "r", tasks.mlp(), matrix=False, **OPTIONS)
    run.grads(), run.stest()
    plain = RunFolder.commit

    def killed(self, stage, *args, **more):
        if stage == "influence":
            raise RuntimeError("killed")
        return plain(self, stage, *args, **more)

    monkeypatch.setattr(RunFolder, "commit", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run.influence()
    monkeypatch.undo()
    again = Run(run.path, tasks.mlp(), progress=False)
    assert again.influence().computed == 0, "all tiles are in the state"
    assert len(again.folder.require_complete("influence")) == len(read_header(run.path / tally.STATE).facts["tiles"])
    same(rankings(again), with_matrix)


@pytest.mark.parametrize("damage", ["flip", "gone", "head"])
def test_without_a_sound_state_the_rankings_start_at_their_beginning(tmp_path, with_matrix, damage):
    run = Run(tmp_path / "r", tasks.mlp(), matrix=False, **OPTIONS)
    run.all()
    file = run.path / tally.STATE
    content = bytearray(file.read_bytes())
    content[{"flip": -9, "gone": 0, "head": 3}[damage]] ^= 1
    file.write_bytes(bytes(content)) if damage != "gone" else file.unlink()
    result = Run(run.path, tasks.mlp(), progress=False).influence()
    assert result.computed == result.rows
    same(rankings(run), with_matrix)


def test_more_test_samples_come_to_the_same_rankings(tmp_path, with_matrix):
    run = Run(tmp_path / "r", tasks.mlp(), matrix=False, test="0:2", **OPTIONS)
    run.all()
    more = Run(run.path, tasks.mlp(), test="all", progress=False)
    more.all()
    found = rankings(more)
    for name in ("helpful_ids", "harmful_ids", "helpful_values", "train_harmful_ids", "mean_harmful_ids"):
        np.testing.assert_array_equal(found[name], with_matrix[name], err_msg=name)


def test_other_lengths_and_a_matrix_are_made_when_they_are_asked_for(tmp_path, with_matrix):
    run = Run(tmp_path / "r", tasks.mlp(), matrix=False, top_k=2, **OPTIONS)
    run.all()
    Run(run.path, tasks.mlp(), top_k=100, progress=False).influence()
    same(rankings(run), with_matrix)
    full = Run(run.path, tasks.mlp(), matrix=True, progress=False)
    full.influence()
    assert np.isfinite(full.scores()).all()
    assert not (run.path / tally.STATE).exists()
    same(rankings(full), with_matrix)
    before = (run.path / "influence.npy").stat().st_mtime_ns
    Run(run.path, tasks.mlp(), matrix=False, progress=False).influence()
    assert (run.path / "influence.npy").stat().st_mtime_ns == before, "a finished matrix stays"
