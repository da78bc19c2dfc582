"""Samples by index: our own loader, never a shuffled one, with a digest of every sample it hands out."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset, default_collate

from infl_cache.errors import BadInput
from infl_cache.maths.digest import row_digests, sample_digest
from infl_cache.maths.workers import items_by_workers

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Batch:
    """Samples `indices` of a dataset, collated; `digests` holds 64 bits of each sample, `first` is the first one."""

    indices: Sequence[int]
    data: Any
    digests: NDArray[np.uint64]
    first: Any


def fetch(dataset: Any, index: int, name: str) -> Any:
    """Sample `index`; an exception of the dataset becomes `BadInput` with the index and its traceback."""
    try:
        return dataset[index]
    except Exception as error:
        raise BadInput(
            f"{name}[{index}] raised {type(error).__name__}: {error}\n{traceback.format_exc(limit=-3).rstrip()}"
        ) from error


def batches(
    dataset: Any, name: str, collate: Collate, groups: Iterable[Sequence[int]], device: torch.device, workers: int = 0
) -> Generator[Batch, None, None]:
    """The batches whose indices are `groups`, in that order, on `device`; loaded by `workers` processes if asked.

    Close it where it may be left before its end: the processes end then, else when Python collects what is left.
    """
    groups = list(groups)
    with_workers = workers > 0 and len(groups) > 1
    source = _Groups(dataset, name, collate, to_hand_over=with_workers)
    items = items_by_workers(source, groups, workers) if with_workers else (source[group] for group in groups)
    with closing(items) as loaded:
        for batch in loaded:
            if isinstance(batch, BadInput):
                raise batch
            yield replace(batch, data=to_device(batch.data, device))


def digests_at(dataset: Any, name: str, indices: Sequence[int]) -> NDArray[np.uint64]:
    """`sample_digest` of each of these samples; those of a plain `TensorDataset` all at once."""
    tensors = plain_tensors(dataset)
    if tensors is None:
        return np.array([sample_digest(fetch(dataset, index, name)) for index in indices], np.uint64)
    return row_digests([tensor[list(indices)] for tensor in tensors])


def plain_tensors(dataset: Any) -> Sequence[torch.Tensor] | None:
    """The tensors of a plain `TensorDataset`, whose samples are rows of them; None for any other data set."""
    if type(dataset) is not TensorDataset or any(tensor.layout != torch.strided for tensor in dataset.tensors):
        return None
    found: Sequence[torch.Tensor] = dataset.tensors
    return found


class _Groups:
    """Whole batches, indexed by groups of sample indices; `to_hand_over` makes their tensors their own."""

    def __init__(self, dataset: Any, name: str, collate: Collate, to_hand_over: bool = False) -> None:
        self.dataset, self.name, self.collate, self.to_hand_over = dataset, name, collate, to_hand_over

    def __getitem__(self, group: Sequence[int]) -> Any:
        batch = self._batch(group)
        if not self.to_hand_over or isinstance(batch, BadInput):
            return batch
        data = batch.data if self.collate is default_collate else _own(batch.data)  # whose tensors are new ones
        return replace(batch, data=data, first=_own(batch.first))

    def _batch(self, group: Sequence[int]) -> Any:
        tensors = self._tensors(group)
        if tensors is not None:
            # In-place writes of a model must not reach the data set: the rows are copied.
            data = [tensor.clone() for tensor in tensors]
            return Batch(group, data, row_digests(tensors), tuple(tensor[0] for tensor in tensors))
        try:
            samples = [fetch(self.dataset, index, self.name) for index in group]
            digests = np.array([sample_digest(sample) for sample in samples], np.uint64)
            return Batch(group, _collated(self.collate, samples, self.name, group), digests, samples[0])
        except BadInput as error:  # a worker process hands it over like any other item
            return BadInput(str(error))

    def _tensors(self, group: Sequence[int]) -> list[torch.Tensor] | None:
        """Consecutive rows of a plain `TensorDataset`, which need not be taken out and put together one by one."""
        tensors = plain_tensors(self.dataset)
        if tensors is None or self.collate is not default_collate:
            return None
        if not isinstance(group, range) or group.step != 1 or not group or group.stop > len(self.dataset):
            return None
        return [tensor[group.start : group.stop] for tensor in tensors]


def _collated(collate: Collate, samples: list[Any], name: str, group: Sequence[int]) -> Any:
    try:
        return collate(samples)
    except Exception as error:
        raise BadInput(
            f"{name}: samples {group[0]} to {group[-1]} could not be made into a batch:"
            f" {type(error).__name__}: {error}; give the task a collate="
        ) from error


def _own(data: Any) -> Any:
    """Copies of all tensors in `data`, dense ones as plain numbers.

    What another process is given moves to shared memory as it lies: a view with all that it is a view of, what a
    `collate` fills again and again so that it changes there as well, a conjugate without being one.
    """
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone().resolve_conj().resolve_neg().requires_grad_(t.requires_grad), data
    )


def to_device(data: Any, device: torch.device) -> Any:
    """Every tensor in `data` on `device`, the rest as it is."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), data)


def size_in_bytes(data: Any) -> int:
    """Bytes of all tensors in `data`."""
    return sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(data) if isinstance(leaf, torch.Tensor))


def groups_of(start: int, stop: int, size: int) -> list[range]:
    """Indices `start` to `stop - 1` in consecutive groups of at most `size`.

    >>> groups_of(0, 5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(i, min(i + size, stop)) for i in range(start, stop, size)]


def groups_among(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """The given indices in groups of at most `size`; consecutive ones as a range, which is loaded faster.

    >>> groups_among([3, 4, 5, 9], 2)
    [range(3, 5), [5, 9]]
    """
    groups = [indices[i : i + size] for i in range(0, len(indices), size)]
    return [
        range(each[0], each[-1] + 1) if list(each) == list(range(each[0], each[-1] + 1)) else each for each in groups
    ]


def spread(n: int, count: int) -> list[int]:
    """At most `count` different indices below `n`, evenly spread, first and last included.

    >>> spread(100, 4), spread(3, 8)
    ([0, 33, 66, 99], [0, 1, 2])
    """
    if n <= count:
        return list(range(n))
    return [i * (n - 1) // (count - 1) for i in range(count)] if count > 1 else [0]
