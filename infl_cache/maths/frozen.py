"""Data that are drawn anew each time they are fetched, held fast: sample i is always drawn by the same seed.

A data set that augments (random crops, flips, noise) has no gradient of its own sample i. Frozen, torch's, NumPy's and
Python's global generators are set to a seed made of the data set's name and i before each fetch and put back after it,
in worker processes too: the numbers then speak of that one draw. A data set that has generators of its own is not
held by this, and is still refused by whoever fetches a sample twice (`probe.check_data`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from infl_cache.maths.samples import plain_tensors
from infl_cache.maths.task import Task

SEED_BYTES = 4


class Frozen:
    """A map-style data set whose sample i is drawn as its seed says.

    >>> noise = Frozen([torch.rand], "train")
    >>> noise.seed(0) == Frozen([torch.rand], "train").seed(0), noise.seed(0) == noise.seed(1)
    (True, False)
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed(index)):
            return self.dataset[index]

    def seed(self, index: int) -> int:
        """Of sample `index`: the same in every process and on every machine."""
        return int.from_bytes(blake2b(f"{self.name} {index}".encode(), digest_size=SEED_BYTES).digest(), "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of torch (on the CPU), NumPy and Python start at `seed`; afterwards they are as before."""
    ours, numpys, pythons = torch.default_generator.get_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        torch.default_generator.set_state(ours)
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


def frozen(task: Task) -> Task:
    """The task over frozen data; a plain `TensorDataset` draws nothing and stays as it is."""
    return replace(task, train=_held(task.train, "train"), test=_held(task.test, "test"))


def _held(dataset: Any, name: str) -> Any:
    drawn = not isinstance(dataset, Frozen) and plain_tensors(dataset) is None
    return Frozen(dataset, name) if drawn else dataset
