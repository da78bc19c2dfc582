"""A run that is moved, copied or looked at from elsewhere, and a clock that jumps: it works as before."""

import random
import shutil
import time

import numpy as np
import pytest

from infl_cache import Run
from infl_cache.__main__ import main
from tests.faults.data import contents, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 8, "test_block_rows": 3}
NAMES = ["with space", "ünïcode", "percent %s {0}", "-dash", "x" * 200, "deep/er"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("places") / "run", small_task(), **OPTIONS)
    run.all()
    return run.path


@pytest.mark.parametrize("name", NAMES)
def test_a_run_works_wherever_it_is_moved_to(name, finished, tmp_path, monkeypatch):
    expected = np.array(Run(finished).scores())
    place = tmp_path / name
    shutil.copytree(finished, tmp_path / "copy")
    place.parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "copy", place)
    monkeypatch.chdir(place.parent)
    for path in (place, place.name, f"./{place.name}/"):
        np.testing.assert_array_equal(Run(path).scores(), expected)
        assert [result.computed for result in Run(path, small_task(), **OPTIONS).all()] == [0, 0, 0]
        assert main(["verify", "--json", "-", "--", str(path)]) == 0 or name == "-dash"
    monkeypatch.chdir(place)
    np.testing.assert_array_equal(Run(".").scores(), expected)


def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, monkeypatch):
    chance = random.Random(3)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(-1e10, 1e10))
    run = Run(tmp_path / "run", small_task(), **OPTIONS)
    run.all()
    assert str(run.status())
    assert run.verify().sound
    assert [result.computed for result in Run(run.path, small_task(), **OPTIONS).all()] == [0, 0, 0]
    numbers = {name: digest for name, digest in contents(finished).items() if ".zarr" in name or name.endswith("npy")}
    assert {name: contents(run.path)[name] for name in numbers} == numbers
