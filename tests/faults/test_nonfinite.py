"""NaN or Inf in a loss, a gradient or an s_test: named, nothing half-done, and counted by status where skipped."""

import numpy as np
import pytest
import torch

from infl_cache import Run
from infl_cache.__main__ import main
from infl_cache.errors import BadInput, IncompleteStore
from tests.faults import times
from tests.faults.data import N_TRAIN, Listed, contents, loss, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 6, "test_block_rows": 2, "batch_size": 3}
VALUES = {"NaN": torch.nan, "Inf": torch.inf, "-Inf": -torch.inf}


def spoiled(place, value):
    """The small task with one training sample whose loss is `value`."""
    base = small_task()
    mark = base.train.inputs[place]

    def spoilt(outputs, batch):
        return loss(outputs, batch[1]) + torch.where((batch[0] == mark).all(1), value, 0.0)

    return small_task(targets=lambda batch: batch, loss=spoilt, measure=lambda out, batch: loss(out, batch[1]))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", [0, 11, N_TRAIN - 1, 6, 17][: times(3, 5)])
def test_a_loss_that_is_not_finite_is_named_and_only_whole_blocks_before_it_are_done(place, value, tmp_path, capsys):
    run = Run(tmp_path / "run", spoiled(place, VALUES[value]), **OPTIONS)
    with pytest.raises(BadInput, match=rf"NaN or Inf at train samples {place};") as found:
        run.grads()
    assert found.value.exit_code == 2
    assert len(run.folder.done("grads")) == place // OPTIONS["block_rows"]
    before = contents(run.path)
    with pytest.raises(BadInput, match=rf"train samples {place};"):
        Run(run.path, spoiled(place, VALUES[value]), **OPTIONS).grads()
    assert contents(run.path).keys() == before.keys()
    again = Run(run.path, spoiled(place, VALUES[value]), **OPTIONS, nonfinite="skip")
    again.all()
    assert np.flatnonzero(np.isnan(again.scores()).any(0)).tolist() == [place]
    assert place not in again.helpful(0, N_TRAIN).ids
    capsys.readouterr()
    assert main(["status", str(run.path)]) == 0
    assert f"1 rows: {place}" in capsys.readouterr().out


def test_a_measure_whose_gradient_is_not_finite_leaves_the_other_rows_done(tmp_path, capsys):
    base = small_task()
    inputs = base.test.inputs.clone()
    inputs[4] = torch.nan
    task = small_task(test=Listed(inputs, base.test.targets))
    run = Run(tmp_path / "run", task, **OPTIONS)
    run.grads()
    with pytest.raises(IncompleteStore, match="test samples 4; the other 5 are done"):
        run.stest()
    assert np.isnan(run.s_test(4)).all()
    assert np.isfinite(run.s_test([0, 1, 2, 3, 5])).all()
    with pytest.raises(IncompleteStore, match="NaN or Inf at 4"):
        run.influence()
    assert not (run.path / "influence.npy").exists()
    skipping = Run(run.path, task, **OPTIONS, nonfinite="skip")
    assert skipping.stest().computed == 0
    skipping.influence()
    assert np.flatnonzero(np.isnan(skipping.scores()).any(1)).tolist() == [4]
    main(["status", str(run.path)])
    assert "1 rows: 4" in capsys.readouterr().out
