"""Histogram and class means of a pass over the matrix equal those of the whole matrix, and it is never held whole."""

from itertools import pairwise

import numpy as np
import pytest

from infl_cache import Run
from infl_cache.disk.matrix import MatrixFile
from infl_cache.stages.page import totals as stage
from infl_cache.stages.page.totals import Sizes, totals
from tests import tasks


def matrix_of(rows, columns, seed=0):
    generator = np.random.default_rng(seed)
    found = generator.normal(size=(rows, columns)) * np.exp(generator.normal(0, 3, (rows, columns)))
    found = found.astype(np.float32)
    found[0, :3] = 0, np.nan, np.inf
    return found


def test_sizes_are_counted_exactly():
    matrix, sizes = matrix_of(40, 300), Sizes()
    for row in matrix:
        sizes.add(row[None])
    found = sizes.as_json()
    finite = matrix[np.isfinite(matrix)].astype(np.float64)
    edges = np.array(found["edges"])
    assert np.allclose(np.diff(np.log2(edges)), 1)
    assert found["negative"] == [int(((-finite >= a) & (-finite < b)).sum()) for a, b in pairwise(edges)]
    assert found["positive"] == [int(((finite >= a) & (finite < b)).sum()) for a, b in pairwise(edges)]
    assert found["small"] == int((np.abs(finite) < edges[0]).sum())
    assert found["not_finite"] == 2
    assert sum(found["negative"]) + sum(found["positive"]) + found["small"] == finite.size


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-126, 1.0, 3.4e38])
def test_the_smallest_and_the_largest_numbers_have_a_place(value):
    sizes = Sizes()
    sizes.add(np.array([[value, -value]], np.float32))
    found = sizes.as_json()
    assert (sum(found["negative"]), sum(found["positive"])) == (1, 1)
    assert found["edges"][-2] <= float(np.float32(value)) < found["edges"][-1]


def test_a_matrix_of_50_000_by_1_000_passes_in_parts(monkeypatch):
    largest, part = [], matrix_of(50, 50_000)

    def rows(folder, tests, budget):
        for start in range(0, len(tests), 50):
            largest.append(budget >= 4 * 50 * 50_000)
            yield part[: len(tests[start : start + 50])]

    monkeypatch.setattr(stage, "matrix_rows", rows)
    labels = np.arange(50_000) % 10 * 1.0, np.arange(1_000) % 10 * 1.0
    found = totals(None, np.arange(1_000), *labels, show=False)
    assert all(largest)
    assert len(largest) == 20
    assert found["rows"] == 1_000
    sizes = found["sizes"]
    assert sum(sizes["negative"]) + sum(sizes["positive"]) + sizes["small"] + sizes["not_finite"] == 50_000_000
    assert found["between"]["pairs"].sum() == 50_000_000 - sizes["not_finite"]
    monkeypatch.setattr(stage, "MOST_BYTES", 4 * 50_000 * 100)
    assert totals(None, np.arange(1_000), *labels, show=False)["rows"] == 100


def test_a_real_matrix_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    run = Run(tmp_path / "r", tasks.mlp(n_test=12), damping=0.1, solver="exact", progress=False)
    run.all()
    matrix, read, original = np.array(run.scores()), [], MatrixFile.read_rows
    monkeypatch.setattr(MatrixFile, "read_rows", lambda self, rows: (read.append(len(rows)), original(self, rows))[1])
    monkeypatch.setattr(stage, "BUDGET", 16 * matrix.shape[1] * 5)
    labels = [np.array([float(y) for _, y in data]) for data in (run.task.train, run.task.test)]
    found = totals(run.folder, np.arange(12), *labels, show=False)
    assert read == [5, 5, 2]
    first = matrix[labels[1] == found["between"]["test"][0]][:, labels[0] == found["between"]["train"][0]]
    assert np.isclose(found["between"]["mean"][0, 0], first.mean(), rtol=1e-6)
