"""`--check-data full`: one changed sample among many is always found, and looking for it can be stopped."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from infl_cache import BadInput, Run
from infl_cache.__main__ import main
from infl_cache.errors import ForeignRun, Interrupted
from infl_cache.maths.samples import digests_at
from infl_cache.stages import same
from tests.faults import times
from tests.faults.data import Listed, changed, contents, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 6, "batch_size": 3}
MANY = 50_000


class Counted:
    """Samples that are quickly fetched: their own numbers, but for one that is changed."""

    def __init__(self, other=None):
        self.other = other

    def __len__(self):
        return MANY

    def __getitem__(self, index):
        return -1 if index == self.other else index


@pytest.fixture(scope="module")
def stored():
    """Digests of all samples as they were."""
    return digests_at(Counted(), "train", range(MANY))


@pytest.mark.parametrize("number", range(times(3, 30)))
def test_one_changed_sample_of_50000_is_always_found(number, stored, monkeypatch):
    monkeypatch.setattr(same, "CHECK_SECONDS", 0.0)
    index = [0, MANY - 1, *np.random.default_rng(number).integers(MANY, size=30).tolist()][number]
    with pytest.raises(ForeignRun, match=rf"train\[{index}\]: expected the sample"):
        same.check_digests(Counted(index), "train", range(MANY), stored, full=True)


def test_all_are_compared_however_long_it_takes(stored, monkeypatch):
    monkeypatch.setattr(same, "CHECK_SECONDS", 0.0)
    counts = []
    assert same.check_digests(Counted(), "train", range(MANY), stored, True, counts.append) == sum(counts) == MANY
    assert same.check_digests(Counted(), "train", range(MANY), stored) == 1


@pytest.mark.parametrize("stage", ["stest", "influence", "self_influence"])
def test_every_later_stage_looks_at_the_training_samples(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("infl_cache.stages.opening.DATA_PROBES", 2)  # the task's digest sees the first and last alone
    run = Run(tmp_path / "run", small_task(), **OPTIONS)
    run.grads()
    if stage == "influence":
        run.stest()
    base, before = small_task(), contents(run.path)
    inputs = base.train.inputs.clone()
    inputs[9, 0] += 1e-9
    other = small_task(train=Listed(inputs, base.train.targets))
    with pytest.raises(ForeignRun, match=r"train\[9\]"):
        getattr(Run(run.path, other, **OPTIONS, check_data="full"), stage)()
    assert contents(run.path) == before


def test_a_signal_stops_a_full_check_between_two_samples(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", small_task(), **OPTIONS)
    run.grads()
    before, looked = contents(run.path), []
    real = same.digests_at

    def interrupted(dataset, name, indices):
        looked.append(indices)
        if len(looked) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(dataset, name, indices)

    monkeypatch.setattr(same, "digests_at", interrupted)
    with pytest.raises(Interrupted):
        Run(run.path, small_task(), **OPTIONS, check_data="full").grads()
    assert len(looked) == 5
    assert contents(run.path) == before


def killed():
    """SIGKILL to the worker process that fetches this."""
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("place", [0, 13, 23][: times(1, 3)])
def test_a_killed_worker_is_one_message_and_the_run_goes_on(place, tmp_path):
    task = small_task(train=changed(small_task().train, at={place: killed}))
    run = Run(tmp_path / "run", task, **OPTIONS, workers=2)
    with pytest.raises(BadInput, match=r"died.*--workers 0") as found:
        run.grads()
    assert found.value.exit_code == 2
    done = len(run.folder.done("grads"))
    assert Run(run.path, task, **OPTIONS).grads().computed == 24 - 6 * done
    assert main(["verify", str(run.path)]) == 0


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_name_of_the_same_device_is_no_identity(device, tmp_path):
    run = Run(tmp_path / "run", small_task(), **OPTIONS, device="auto")
    run.all()
    assert [each.computed for each in Run(run.path, small_task(), **OPTIONS, device=device).all()] == [0, 0, 0]
