"""Runs that an older version began: read where that is possible, else refused in words that say what to do."""

import pytest

from infl_cache import Run
from infl_cache.disk.run import RunFolder
from infl_cache.errors import DamagedStore
from tests import tasks

QUIET = {"progress": False, "damping": 0.1}


def aged(path):
    """Take out of a run's manifest what older versions did not write: codecs, `cache`, ways without a rule."""
    folder = RunFolder(path)
    with folder.writing():
        grads = folder.manifest.stages["grads"]
        del grads["identity"]["cache"], grads["identity"]["layer_forms"]
        del grads["plan"]["forms"]["spread"], grads["plan"]["forms"]["alone"]
        for stage in ("grads", "stest"):
            del folder.manifest.stages[stage]["plan"]["codec"]
        folder._write_manifest()


def test_the_status_of_an_older_run_is_shown(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.all()
    expected = str(run.status())
    aged(run.path)
    assert "layers factored" in expected
    assert str(Run(tmp_path / "run").status()) == expected


def test_a_store_without_its_codec_is_read_and_not_written(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), block_rows=4, **QUIET)
    run.grads()
    run.stest()
    expected = run.s_test(0)
    aged(run.path)
    folder = RunFolder(run.path)
    assert (Run(run.path).s_test(0) == expected).all()
    words = r"expected the codec of grads in manifest.json, found none.* another version; .*infl-cache grads --force"
    with pytest.raises(DamagedStore, match=words):
        folder.store("grads", "r+")


def test_an_older_run_is_started_over_with_force(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.all()
    aged(run.path)
    Run(run.path, tasks.mlp(), **QUIET).all(force=True)
    assert RunFolder(run.path).store("grads", "r+")
