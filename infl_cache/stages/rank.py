"""Rankings: the most helpful (most negative) and most harmful (most positive) training samples, ties by lower id.

Of a quantity that is better when higher, such as a margin, the most positive are the helpful ones: `sign` is -1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranking(NamedTuple):
    """Training ids (of a training sample: test ids) and the influence values, (k,) both, the strongest first.

    >>> ids, values = Ranking(np.array([7, 2]), np.array([-0.5, -0.25], np.float32))
    >>> ids.tolist(), values.tolist()
    ([7, 2], [-0.5, -0.25])
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


def helpful(row: NDArray[np.float32], k: int, sign: int = 1) -> Ranking:
    """The k lowest values of a row of influences: removing these samples raises the test loss most.

    >>> helpful(np.array([0.5, -2.0, np.nan, -2.0], np.float32), 2).ids.tolist()
    [1, 3]
    """
    return _lowest(sign * row, row, k)


def harmful(row: NDArray[np.float32], k: int, sign: int = 1) -> Ranking:
    """The k highest values of a row of influences: removing these samples lowers the test loss most.

    >>> harmful(np.array([0.5, -2.0, np.nan, 0.1], np.float32), 2).ids.tolist()
    [0, 3]
    """
    return _lowest(-sign * row, row, k)


ENDS = {"helpful": helpful, "harmful": harmful}
"""Both ends of a row by their names."""


def only(ranking: Ranking, effect: str, sign: int = 1) -> Ranking:
    """Of a ranking those that do have the effect: one that is longer than these goes on with the others.

    >>> only(Ranking(np.array([7, 2, 5]), np.array([-0.5, 0.0, 0.25], np.float32)), "helpful").ids.tolist()
    [7]
    """
    there = (sign if effect == "harmful" else -sign) * ranking.values > 0
    return Ranking(ranking.ids[there], ranking.values[there])


def _lowest(keys: NDArray[np.float32], row: NDArray[np.float32], k: int) -> Ranking:
    """Ids of the k lowest keys, NaN left out."""
    candidates = np.flatnonzero(~np.isnan(keys))
    if len(candidates) > k:
        # Everything up to the k-th lowest key, so that ties at the border are settled by id and not by chance.
        border = np.partition(keys[candidates], k - 1)[k - 1]
        candidates = candidates[keys[candidates] <= border]
    order = np.lexsort((candidates, keys[candidates]))[:k]
    ids = candidates[order].astype(np.int64)
    return Ranking(ids, row[ids].astype(np.float32))
