"""What rounding does to influences is measured on influences, kept and shown."""

import numpy as np
import pytest
import torch

from infl_cache import Run
from tests import tasks
from tests.tasks import built, classified, normal

QUIET = {"progress": False}


def task():
    model = lambda: torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))  # noqa: E731
    return classified(built(model, torch.float32), normal(68, 20).float(), 60)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_error_in_the_manifest_is_the_error_of_the_matrix(tmp_path, dtype):
    exact, rounded = (
        Run(tmp_path / "a", task(), solver="exact", **QUIET),
        Run(tmp_path / "b", task(), solver="exact", dtype=dtype, **QUIET),
    )
    exact.all(), rounded.all()
    found = rounded.folder.manifest.stages["influence"]["plan"]["rounding"]
    moved = np.linalg.norm(exact.scores() - rounded.scores()) / np.linalg.norm(exact.scores())
    assert (found["train"], found["test"]) == (60, 8)
    assert found["relative"] == pytest.approx(moved, rel=0.05)
    assert 0.9 < found["spearman"] <= 1
    shown = str(rounded.status())
    assert f"influences change by {found['relative']:.1e}" in shown
    assert "with gradients in place of s_test" in shown


def test_float16_is_the_finer_of_the_two(tmp_path):
    errors = []
    for dtype in ("bfloat16", "float16"):
        run = Run(tmp_path / dtype, task(), dtype=dtype, **QUIET)
        run.grads()
        errors.append(run.folder.plan("grads")["rounding"]["relative"])
    assert errors[1] < errors[0] / 4


def test_lossless_types_have_no_rounding(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.all()
    assert "rounding" not in run.folder.plan("grads")
    assert "rounding" not in str(run.status())


def test_samples_without_a_finite_gradient_are_left_out_of_the_measurement(tmp_path):
    broken = task()
    broken.train.tensors[0][7] = torch.nan
    run = Run(tmp_path / "run", broken, dtype="float16", nonfinite="skip", solver="exact", **QUIET)
    run.all()
    for stage in ("grads", "influence"):
        found = run.folder.manifest.stages[stage]["plan"]["rounding"]
        assert found["train"] == 59
        assert 0 < found["relative"] < 0.01
