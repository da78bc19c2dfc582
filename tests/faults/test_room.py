"""No room on the disk, in the middle of anything, and places that cannot be written: said, and nothing is lost."""

import contextlib
import shutil

import numpy as np
import pytest

from infl_cache import Run
from infl_cache.__main__ import main
from infl_cache.errors import DiskFull
from infl_cache.stages.verify import verify
from tests.faults import times
from tests.faults.data import small_task
from tests.faults.test_kills import data_files

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 4, "test_block_rows": 2, "tile_rows": 2,
           "by_layer": True}  # fmt: skip
TASK = "tests/faults/data.py:small_task"


def whole(path):
    run = Run(path, small_task(), **OPTIONS)
    run.all()
    run.self_influence()
    return run


def test_a_full_disk_at_any_block_loses_nothing_and_is_gone_on_with(small_disk, tmp_path, monkeypatch):
    expected = data_files(whole(tmp_path / "calm").path)
    # What is free is asked beforehand: here the room goes while the stage runs.
    monkeypatch.setattr("infl_cache.stages.grads.free_bytes", lambda path: 10**12)
    monkeypatch.setattr("infl_cache.stages.room.free_bytes", lambda path: 10**12)
    full = 0
    for pages in (*range(2, 60, times(13, 1)), *np.linspace(60, 190, times(3, 40)).astype(int).tolist()):
        ballast, path = small_disk / "ballast", small_disk / "run"
        ballast.write_bytes(bytes(2**20 - 4096 * pages))
        with contextlib.suppress(DiskFull):
            whole(path)
            full -= 1
        full += 1
        if (path / "manifest.json").exists():
            assert verify(Run(path).folder, show=False).faults == (), f"{pages} pages"
        ballast.unlink()
        found = data_files(whole(path).path)
        assert found == expected, f"{pages} pages"
        shutil.rmtree(path)
    assert full >= 2


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(small_disk):
    (small_disk / "ballast").write_bytes(bytes(2**20 - 4096 * 4))
    with pytest.raises(DiskFull):
        Run(small_disk / "run", small_task(), **OPTIONS).grads()
    assert not list((small_disk / "run").glob("*.zarr"))


@pytest.mark.parametrize("command", ["report", "self-influence"])
def test_a_report_that_cannot_be_written_is_one_line(command, tmp_path, capsys, monkeypatch):
    run = Run(tmp_path / "run", small_task(), **OPTIONS)
    run.all()
    (run.path / "report").write_text("in the way")
    words = {"report": [str(run.path), "--task", TASK], "self-influence": ["--run", str(run.path), "--task", TASK]}
    assert main([command, *words[command]]) == 2
    assert "expected a folder that can be written in" in capsys.readouterr().err
    assert command == "report" or not (run.path / "self_influence.zarr").exists()
    assert (run.path / "report").read_text() == "in the way"
