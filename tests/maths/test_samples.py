"""Samples by index."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset, default_collate

from infl_cache import BadInput
from infl_cache.maths.digest import sample_digest
from infl_cache.maths.samples import batches, digests_at, fetch, groups_of, size_in_bytes, to_device
from tests.driving import CPU
from tests.tasks import Samples, dicts, labels, normal


class Failing(Samples):
    """Sample 3 cannot be read."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("picture 3 is torn")
        return super().__getitem__(index)


def pairs(count):
    return [(torch.full((2,), float(i)), i) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 7))
def test_groups_hold_every_index_once_and_in_order(start, count, size):
    groups = groups_of(start, start + count, size)
    assert [index for group in groups for index in group] == list(range(start, start + count))
    assert all(len(group) == size for group in groups[:-1])
    assert all(0 < len(group) <= size for group in groups)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_samples_of_their_groups_in_order(workers):
    data, groups = Samples(pairs(7)), [range(0, 3), [6, 2], [4]]
    found = list(batches(data, "train", default_collate, groups, CPU, workers))
    assert [list(batch.indices) for batch in found] == [[0, 1, 2], [6, 2], [4]]
    for batch in found:
        assert batch.data[1].tolist() == list(batch.indices)
        assert batch.data[0][:, 0].tolist() == [float(index) for index in batch.indices]
        assert batch.digests.tolist() == [sample_digest(data[index]) for index in batch.indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named_with_its_traceback(workers):
    data = Failing(pairs(6))
    with pytest.raises(BadInput, match=r"train\[3\] raised OSError: picture 3 is torn") as caught:
        list(batches(data, "train", default_collate, groups_of(0, 6, 2), CPU, workers))
    assert "in __getitem__" in str(caught.value)


def test_fetch_names_the_data_set_and_keeps_the_cause():
    with pytest.raises(BadInput, match=r"test\[3\] raised OSError") as caught:
        fetch(Failing(pairs(6)), 3, "test")
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_do_not_fit_together_are_refused(workers):
    data = Samples([torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3)])
    with pytest.raises(
        BadInput, match=r"train: samples 2 to 3 could not be made into a batch: .*; give the task a col"
    ):
        list(batches(data, "train", default_collate, groups_of(0, 4, 2), CPU, workers))


def test_the_task_s_collate_is_used():
    data = Samples([[1, 2], [3]])
    padded = list(batches(data, "train", lambda rows: [row + [0] * (2 - len(row)) for row in rows], [[0, 1]], CPU))
    assert padded[0].data == [[1, 2], [3, 0]]


def test_size_in_bytes_counts_every_tensor_of_a_nested_batch():
    batch = {"x": torch.zeros(2, 3, dtype=torch.float64), "more": [torch.zeros(5, dtype=torch.uint8), "text", None]}
    assert size_in_bytes(batch) == 48 + 5


def test_to_device_keeps_the_structure_and_what_is_no_tensor():
    batch = dicts().collate([dicts().train[0]])
    moved = to_device(batch, CPU)
    assert list(moved) == list(batch)
    assert moved["id"] == ["sample 0"]
    assert torch.equal(moved["x"], batch["x"])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_torch_s_random_state_alone(workers):
    state = torch.get_rng_state()
    list(batches(Samples(pairs(6)), "train", default_collate, groups_of(0, 6, 2), CPU, workers))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("plain", [True, False])
def test_digests_of_some_samples_are_those_of_each(plain):
    data = TensorDataset(normal(9, 40), labels(9))
    found = digests_at(data if plain else Samples(list(data)), "train", [7, 0, 3])
    assert found.tolist() == [sample_digest(data[index]) for index in (7, 0, 3)]


def test_processes_end_with_the_last_batch_that_is_asked_for():
    loaded = batches(Samples(pairs(60)), "train", default_collate, groups_of(0, 60, 1), CPU, 2)
    next(loaded)
    assert len(multiprocessing.active_children()) == 2
    loaded.close()
    assert not multiprocessing.active_children()


class Reused:
    """It collates into the same tensor each time."""

    def __init__(self):
        self.room = torch.zeros(2, 2)

    def __call__(self, samples):
        for place, (numbers, _) in enumerate(samples):
            self.room[place] = numbers
        return self.room


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_that_fills_the_same_tensor_again_gives_each_batch_its_numbers(workers):
    found = []
    for batch in batches(Samples(pairs(12)), "train", Reused(), groups_of(0, 12, 2), CPU, workers):
        time.sleep(0.05)
        found += batch.data[:, 0].tolist()
    assert found == [float(number) for number in range(12)]


def test_conjugates_and_parts_of_large_tensors_are_handed_over_as_what_they_are():
    whole = torch.zeros(1000, 1000)
    data = Samples(
        [(torch.complex(torch.tensor([1.0]), torch.tensor([2.0])).conj(), whole[index]) for index in (0, 1, 2)]
    )
    found = list(batches(data, "train", lambda samples: samples[0], groups_of(0, 3, 1), CPU, 2))
    for batch in found:
        assert batch.data[0].tolist() == [1 - 2j]
        assert batch.data[1].untyped_storage().nbytes() == 4000
        assert batch.first[1].untyped_storage().nbytes() == 4000


ODD = {
    "sparse": lambda t: t.to_sparse(), "sparse rows": lambda t: t.to_sparse_csr(), "bool": lambda t: t > 1,
    "nothing": lambda t: t[:0], "requiring a gradient": lambda t: t.requires_grad_(), "array": lambda t: t.numpy(),
    "text": str,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("made", ODD.values(), ids=ODD)
def test_odd_kinds_of_samples_are_the_same_with_processes(made):
    def kept(batch):
        data = batch.data
        return (type(data), str(data), getattr(data, "requires_grad", None), batch.digests.tolist())

    data = Samples([made(torch.arange(4.0).reshape(2, 2)) for _ in range(4)])
    first, second = (
        [kept(batch) for batch in batches(data, "train", lambda rows: rows[0], groups_of(0, 4, 2), CPU, workers)]
        for workers in (0, 2)
    )
    assert first == second


@pytest.mark.parametrize("plain", [True, False])
def test_batches_of_conjugates_are_the_same_with_processes(plain):
    data = TensorDataset(torch.complex(normal(8, 3), normal(8, 3)).conj())
    given = data if plain else Samples(list(data))
    first, second = (
        [(batch.data[0].tolist(), batch.first[0].tolist(), batch.digests.tolist()) for batch in found]
        for found in (batches(given, "train", default_collate, groups_of(0, 8, 3), CPU, workers) for workers in (0, 2))
    )
    assert first == second
