"""How well one list of numbers predicts another: Pearson, Spearman, slope, and the error of a mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors; 0 where one of them is constant.

    >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 7.0])), 4)
    0.9934
    """
    if bool((a == a[0]).all() or (b == b[0]).all()):
        return 0.0
    left, right = (each.double() - each.double().mean() for each in (a, b))
    return max(-1.0, min(1.0, float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))))


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks of two vectors, as `scipy.stats.spearmanr`, but 0 where one of them is constant.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 5.0, 9.0]))
    1.0
    """
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """Places in ascending order from 0, float64; equal values share the mean of their places.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [2.5, 0.0, 2.5, 1.0]
    """
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    places: Tensor = (last - (count.double() - 1) / 2)[place]
    return places


def slope(predicted: Tensor, actual: Tensor) -> float:
    """Of the least-squares line `actual = slope * predicted + constant`; NaN where `predicted` is constant.

    >>> slope(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0]))
    2.0
    """
    if bool((predicted == predicted[0]).all()):
        return math.nan
    centred = predicted.double() - predicted.double().mean()
    return float(centred @ actual.double()) / float(centred @ centred)


def error_of_mean(values: Tensor, seed: int, rounds: int = 1000) -> float:
    """Standard error of the mean by the bootstrap: its spread when values are drawn anew with replacement."""
    if len(values) < 2:
        return math.nan
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (rounds, len(values)), generator=generator)
    return float(values.double().cpu()[drawn].mean(1).std())
