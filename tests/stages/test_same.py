"""Samples that are not those that the stored rows were computed from: other data, or data that change."""

import random

import pytest
import torch

from infl_cache import BadInput, ForeignRun, Run
from infl_cache.stages import opening
from tests import tasks

QUIET = {"progress": False}


class Changed:
    """A data set with one sample that is changed by `change(sample)` each time it is fetched."""

    def __init__(self, dataset, index, change):
        self.dataset, self.index, self.change = dataset, index, change

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return (self.change(x) if index == self.index else x, y)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished stage 1; before the stored rows are compared, only the first and last sample are looked at."""
    monkeypatch.setattr(opening, "DATA_PROBES", 2)
    run = Run(tmp_path / "r", tasks.logistic(), **QUIET)
    run.grads()
    return run


def again(run, change):
    task = tasks.logistic()
    return Run(run.path, tasks.logistic(train=Changed(task.train, 4, change)), **QUIET)


def test_another_sample_makes_it_another_task(run):
    with pytest.raises(ForeignRun, match=r"train\[4\]: expected the sample that the stored rows .*, found another"):
        again(run, lambda x: x + 1).grads()


def test_a_sample_that_is_flipped_now_and_then_is_called_augmentation(run):
    toss = random.Random(0)

    def flipped(x):
        return torch.flip(x, (0,)) if toss.random() < 0.5 else x

    def resumed_often():
        # While it falls as it did when the rows were computed there is nothing to be seen.
        for _ in range(20):
            again(run, flipped).grads()

    message = r"train\[4\]: expected the same sample each time it is fetched, found two .*; switch off augmentation"
    with pytest.raises(BadInput, match=message):
        resumed_often()
