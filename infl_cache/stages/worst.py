"""Test samples with their strongest training samples: those of largest loss, or those that are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infl_cache.disk.run import RunFolder
from infl_cache.stages import rank
from infl_cache.stages.columns import shown_predictions, stored_column
from infl_cache.stages.rankings import stored_length, strongest
from infl_cache.stages.tiles import matrix_tests, sign_of

NEIGHBOURS = 5


@dataclass(frozen=True)
class Asked:
    """A test sample with what the stores know of it, and its strongest training samples."""

    index: int
    label: float
    prediction: float
    loss: float
    helpful: rank.Ranking
    harmful: rank.Ranking


def worst_test_samples(folder: RunFolder, count: int) -> list[Asked]:
    """Of the test samples asked about, those of largest loss: the predictions people ask about first."""
    losses, tests = stored_column(folder, "stest", "loss"), matrix_tests(folder)
    worst = tests[np.argsort(-np.nan_to_num(losses[tests]), kind="stable")[:count]]
    return with_neighbours(folder, worst.tolist(), stored_length(folder, None, NEIGHBOURS))


def with_neighbours(folder: RunFolder, tests: Sequence[int], k: int) -> list[Asked]:
    """These test samples, which the run was asked about, and the k training samples that help and harm most."""
    losses, labels = (stored_column(folder, "stest", name) for name in ("loss", "target"))
    predictions, sign = shown_predictions(folder), sign_of(folder)
    with strongest(folder) as ranking:
        return [
            Asked(index, labels[index], predictions[index], losses[index],
                  *(rank.only(ranking(end, index, k), end, sign) for end in ("helpful", "harmful")))
            for index in tests
        ]  # fmt: skip
