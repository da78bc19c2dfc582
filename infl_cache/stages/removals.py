"""What a validation retrains without: single training samples, groups of them, or the complement of random subsets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
# One of so many points or groups is chosen at random, so that weak influences are seen too.
RANDOM_POINTS, RANDOM_GROUPS = 5, 2


def single_points(rows: Sequence[NDArray[np.float64]], usable: Ids, count: int, seed: int) -> list[Ids]:
    """`count` training samples: the most helpful and harmful of each test sample in turn, a fifth at random.

    >>> [int(each[0]) for each in single_points([np.array([-3.0, 0.0, 1.0, 5.0])], np.arange(4), 3, seed=0)[:2]]
    [0, 3]
    """
    chosen: dict[int, None] = {}
    orders = [usable[np.argsort(row[usable], kind="stable")] for row in rows]
    for k in range(len(usable)):
        for order in orders:
            for each in (int(order[k]), int(order[-1 - k])):
                if len(chosen) < count - count // RANDOM_POINTS:
                    chosen[each] = None
    rest = np.setdiff1d(usable, np.fromiter(chosen, np.int64))
    drawn = np.random.default_rng(seed).permutation(rest)[: count - len(chosen)]
    return [np.array([each]) for each in (*chosen, *drawn.tolist())]


def groups(rows: Sequence[NDArray[np.float64]], usable: Ids, count: int, size: int, seed: int) -> list[Ids]:
    """`count` groups of `size`: the most helpful and the most harmful of each test sample, the next ones, ..., then
    as many at random.
    """
    orders = [usable[np.argsort(row[usable], kind="stable")] for row in rows]
    chosen: list[Ids] = []
    for start in range(0, len(usable) // 2 - size + 1, size):
        for order in orders:
            chosen += [order[start : start + size], order[::-1][start : start + size]]
    chosen = chosen[: count - count // RANDOM_GROUPS]
    generator = np.random.default_rng(seed)
    chosen += [generator.choice(usable, size, replace=False) for _ in range(count - len(chosen))]
    return [np.sort(each) for each in chosen]


def complements(usable: Ids, count: int, fraction: float, seed: int) -> list[Ids]:
    """What is missing in `count` random subsets that keep `fraction` of the training samples."""
    generator = np.random.default_rng(seed)
    missing = len(usable) - round(fraction * len(usable))
    return [np.sort(generator.choice(usable, missing, replace=False)) for _ in range(count)]
