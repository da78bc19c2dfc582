"""Means of a class of training samples on a class of test samples, made a few rows at a time."""

import numpy as np

from infl_cache.stages.between import Between, Grouped
from tests.stages.page.test_totals import matrix_of


def test_class_means_are_those_of_the_whole_matrix():
    matrix = matrix_of(30, 200)
    generator = np.random.default_rng(1)
    train, test = generator.integers(0, 4, 200) * 10.0, generator.integers(-1, 2, 30).astype(float)
    test[3] = np.nan
    between = Between(Grouped.of(train), Grouped.of(test))
    for start in range(0, 30, 7):
        between.add(np.arange(start, min(30, start + 7)), matrix[start : start + 7])
    found = between.as_json()
    assert (found["train"], found["test"]) == ([0, 10, 20, 30], [-1, 0, 1])
    for row, a in enumerate(found["train"]):
        for column, b in enumerate(found["test"]):
            part = matrix[test == b][:, train == a].astype(np.float64)
            part = part[np.isfinite(part)]
            assert np.isclose(found["mean"][row, column], part.mean(), rtol=1e-12)
            assert found["pairs"][row, column] == part.size


def test_of_very_many_classes_the_largest_are_kept():
    found = Grouped.of(np.array([5.0, 5, 5, 1, 7, 7, np.nan]), most=2)
    assert (found.labels, found.left_out, found.place.tolist()) == ([5, 7], 1, [0, 0, 0, -1, 1, 1, -1])
    assert Grouped.of(np.array([0.5, 1.0])) is None
