"""Augmentation frozen: every fetch of a sample draws the same random numbers, so that it is the same sample."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from infl_cache.maths.task import Task

SEED = 42


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A data set whose sample i is always drawn with the same seed, in whatever process and order.

    What it draws from generators of its own, or on a GPU, stays as it is.
    """

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with drawing(seed_of(self.name, index)):
            return self.dataset[index]


def frozen(task: Task) -> Task:
    """The task with both data sets frozen; one that is already stays as it is."""
    train = task.train if isinstance(task.train, Frozen) else Frozen(task.train, "train")
    test = task.test if isinstance(task.test, Frozen) else Frozen(task.test, "test")
    return dataclasses.replace(task, train=train, test=test)


def seed_of(name: str, index: int) -> int:
    """The seed that sample `index` of the data set `name` is drawn with: 64 bits of all that it depends on.

    >>> seed_of("train", 3) == seed_of("train", 3), seed_of("train", 3) == seed_of("test", 3)
    (True, False)
    """
    text = f"{SEED}/{name}/{int(index)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """The global generators of torch (CPU), numpy and random begin at `seed` inside, and are put back."""
    held = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        # not torch.manual_seed: that would set the generators of all GPUs, which nobody puts back
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(held[0])
        np.random.set_state(held[1])  # noqa: NPY002
        random.setstate(held[2])
