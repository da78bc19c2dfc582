"""A validation that is read back is the one that was found, or is refused."""

import json

import numpy as np
import pytest

from infl_cache import BadInput, DamagedStore, IncompleteStore, Run
from infl_cache.disk.run import RunFolder
from infl_cache.stages.validated import stored_validation
from tests import tasks

QUIET = {"progress": False, "solver": "exact"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(tmp_path_factory.mktemp("run") / "r", tasks.logistic(n_train=20), damping=0.1, **QUIET)
    made.all()
    return made


@pytest.mark.parametrize(
    "options", [{"kind": "loo", "points": 4}, {"kind": "group", "points": 3}, {"kind": "lds", "subsets": 4, "seed": 3}]
)
def test_it_is_what_was_found(run, options):
    found, again = run.validate(**options), stored_validation(RunFolder(run.path), options["kind"])
    for name in ("predicted", "actual"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert [each.tolist() for each in again.removed] == [each.tolist() for each in found.removed]
    for name in ("kind", "way", "measure", "tests", "losses", "n_train", "figures", "by_test", "notes", "title"):
        assert getattr(again, name) == getattr(found, name), name
    assert again.headline == found.headline


def test_none_another_matrixs_and_damaged_ones_are_refused(run, tmp_path):
    folder = RunFolder(run.path)
    run.validate(points=3)
    path = run.path / "validate" / "loo.json"
    kept = path.read_text()
    with pytest.raises(BadInput, match="kind: expected one of loo, group, lds, found 'all'"):
        stored_validation(folder, "all")
    content = json.loads(kept)
    for change in ({"influence": "another"},):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(IncompleteStore, match=r"expected a validation of this matrix.*validate --kind loo"):
            stored_validation(folder, "loo")
    damaged = [
        {"kind": "lds"}, {"retrained_by": "magic"}, {"tests": []}, {"tests": [{"test": 1}]}, {"removed": [[1]]},
        {"pearson": "x"}, {"notes": 3}, {"removed": None, "options": {}}, {"tests": [[1]]}, {"n_train": None},
    ]  # fmt: skip
    for text in ("", "[]", "null", "[" * 100_000, *(json.dumps({**content, **each}) for each in damaged)):
        path.write_text(text)
        with pytest.raises(DamagedStore, match=r"loo\.json: expected figures of a validation.*validate --kind loo"):
            stored_validation(folder, "loo")
    path.unlink()
    (tmp_path / "theirs.json").write_text(kept)
    path.symlink_to(tmp_path / "theirs.json")
    with pytest.raises(DamagedStore, match="found a link, which is not followed"):
        stored_validation(folder, "loo")
    path.unlink()
    with pytest.raises(IncompleteStore, match="expected a validation, found none"):
        stored_validation(folder, "loo")
