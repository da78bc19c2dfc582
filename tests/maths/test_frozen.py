import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from infl_cache import Task
from infl_cache.errors import BadInput
from infl_cache.maths.frozen import Frozen, frozen, seeded
from infl_cache.maths.probe import check_data


class Augmenting:
    """Noise of all three global generators is added to each sample."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        noise = torch.rand(2) + torch.from_numpy(np.random.rand(2)).float() + random.random()  # noqa: NPY002
        return index + noise, index % 2


class Own(Augmenting):
    """It draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator()

    def __getitem__(self, index):
        return torch.rand(2, generator=self.generator), index % 2


def test_a_frozen_sample_is_the_same_each_time_and_another_than_the_others():
    held = Frozen(Augmenting(), "train")
    first, again = [held[index][0] for index in range(6)], [held[index][0] for index in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    noise = torch.stack([sample - index for index, sample in enumerate(first)])
    assert len(torch.unique(noise[:, 0])) == 6
    assert not torch.equal(Frozen(Augmenting(), "test")[0][0], first[0])
    check_data(held, "train", range(6))
    with pytest.raises(BadInput, match=r"train\[0\].*--freeze-augmentation"):
        check_data(Augmenting(), "train", range(6))


def test_worker_processes_draw_the_same():
    held = Frozen(Augmenting(), "train")
    loaded = [batch[0][0] for batch in DataLoader(held, batch_size=1, num_workers=2)]
    assert all(torch.equal(sample, held[index][0]) for index, sample in enumerate(loaded))


def test_the_generators_go_on_as_if_nothing_had_been_drawn():
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(7)
    expected = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(7)
    _ = Frozen(Augmenting(), "train")[3]
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected  # noqa: NPY002


def test_what_draws_by_itself_is_still_refused():
    with pytest.raises(BadInput, match=r"train\[0\].*generators of its own"):
        check_data(Frozen(Own(), "train"), "train", [0, 1])


def test_plain_tensors_draw_nothing_and_stay(monkeypatch):
    data = TensorDataset(torch.zeros(2, 1), torch.zeros(2))
    task = Task(model=torch.nn.Linear(1, 1), train=data, test=Augmenting(), loss=torch.nn.MSELoss(reduction="none"))
    held = frozen(frozen(task))
    assert held.train is data
    assert isinstance(held.test, Frozen)
    assert isinstance(held.test.dataset, Augmenting)
