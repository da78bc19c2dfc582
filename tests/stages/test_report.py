"""The table and the picture that a report begins with."""

import pytest

from infl_cache import DamagedStore, Run
from infl_cache.disk.run import RunFolder
from infl_cache.stages.report import report
from tests import tasks

QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "r", tasks.convnet(), **QUIET)
    made.all()
    return made


@pytest.mark.parametrize("name", ["influence.png", "influence.png.partial"])
def test_a_link_is_not_written_through(run, name, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "theirs").write_text("precious")
    (run.path / "report").mkdir(exist_ok=True)
    (run.path / "report" / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(DamagedStore, match="expected a file or folder of the run itself, found a link"):
        report(RunFolder(run.path), run.task)
    assert (tmp_path / "theirs").read_text() == "precious"
