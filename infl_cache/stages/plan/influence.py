"""What stage 3 would do and cost: the matrix, the rankings, and how often the gradients pass by."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from infl_cache.maths import scores
from infl_cache.maths.capture import Forms, capture
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import spread
from infl_cache.stages import rank
from infl_cache.stages.influence import TILE_COLUMNS
from infl_cache.stages.opening import Opened

# Samples and test rows of the trial product.
SAMPLES, ROWS = 256, 32
HEADER = 128
# Names and headers of the arrays in `rankings.npz`.
ARCHIVE = 4700


@dataclass(frozen=True)
class InfluencePlan:
    """Stage 3 on paper: `multiply` and `score` are seconds of a training sample, and for each test sample besides."""

    n_train: int
    n_test: int
    tile_rows: int
    top_k: int
    read: float
    multiply: float
    score: float
    write: float
    ranking: float
    memory: float
    matrix: bool = True

    @property
    def passes(self) -> int:
        """How often all training gradients are read."""
        return -(-self.n_test // self.tile_rows)

    @property
    def matrix_bytes(self) -> int:
        """Size of `influence.npy`."""
        return 4 * self.n_test * self.n_train + HEADER

    @property
    def ranking_bytes(self) -> int:
        """Size of `rankings.npz`: ids and values of both ends, of test and of training samples, without classes."""
        tests = min(self.top_k, self.n_train) * (self.n_test + 1)
        return 24 * (tests + self.n_train * min(self.top_k, self.n_test)) + 4 * self.n_train + ARCHIVE

    @property
    def n_bytes(self) -> int:
        """Both, or the rankings alone (`--no-matrix`)."""
        return (self.matrix_bytes if self.matrix else 0) + self.ranking_bytes

    @property
    def seconds(self) -> float:
        """Reading, multiplying and writing take turns; then the rows of the matrix are ranked."""
        pairs = float(self.n_test) * self.n_train
        passing = self.n_train * self.passes * (self.read + self.multiply)
        return passing + pairs * (self.score + 4 * self.write + self.ranking)


def rows_of_a_tile(asked: int | None, budget: int, size: int, itemsize: int, n_test: int) -> int:
    """Test samples of a tile: the rule of stage 3, and nowhere else in the plan."""
    return min(asked or max(1, budget // 4 // (size * itemsize)), n_test)


def held(budget: int, tile_rows: int, size: int, block_bytes: float, n_train: int) -> float:
    """Bytes that stage 3 holds: a tile of s_test and its pieces, a block decoded and as read, and the products."""
    return 2.0 * tile_rows * size * 4 + 3 * block_bytes + budget / 8 + 8.0 * tile_rows * min(TILE_COLUMNS, n_train)


def multiplying(run: Opened, forms: Forms, tile_rows: int) -> tuple[float, float]:
    """Seconds of a training sample in the product, and for each test sample: one test row, and several."""
    fitting = max(1, min(SAMPLES, run.budget // 16 // (4 * max(1, forms.row_size)), len(run.task.train)))
    count = forms.at_once(fitting)
    captured = capture(run.task, forms, probe_batch(run.task, spread(len(run.task.train), count), run.device))
    few = max(1, min(tile_rows, ROWS, run.budget // 16 // (4 * run.parameters.size)))
    asked = torch.ones(few, run.parameters.size, dtype=captured.dense.dtype, device=run.device)
    seconds = []
    for rows in (asked[:1], asked):
        cut = scores.queries(forms, rows)
        scores.scores(forms, cut, captured.factors, captured.dense, run.budget // 8)
        started = time.perf_counter()
        float(scores.scores(forms, cut, captured.factors, captured.dense, run.budget // 8)[0, 0])
        seconds.append((time.perf_counter() - started) / len(captured.loss))
    if few == 1:
        return 0.0, seconds[0]
    each = max(0.0, seconds[1] - seconds[0]) / (few - 1)
    return max(0.0, seconds[0] - each), each


def ranking_rate(top_k: int, n_train: int) -> float:
    """Seconds of a pair in the rankings."""
    row = np.random.default_rng(0).standard_normal(min(n_train, 100_000), np.float32)
    started = time.perf_counter()
    for ranked in (rank.helpful, rank.harmful):
        ranked(row, top_k)
    return (time.perf_counter() - started) / len(row)
