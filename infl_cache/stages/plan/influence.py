"""What stage 3 would do and cost: the matrix, the rankings, and how often the gradients pass by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infl_cache.config import InfluenceOptions, Options
from infl_cache.disk.layout import array_layout
from infl_cache.disk.trial import try_matrix
from infl_cache.maths import scores
from infl_cache.maths.capture import Forms, capture
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import spread
from infl_cache.maths.task import targets_as_numbers
from infl_cache.stages.columns import classes_of
from infl_cache.stages.influence import TILE_COLUMNS, order_for, room_of
from infl_cache.stages.opening import Opened
from infl_cache.stages.plan.clock import clocked, line, once
from infl_cache.stages.plan.costs import FIXED
from infl_cache.stages.rankings import ROOM
from infl_cache.stages.solving import fitting_sides
from infl_cache.stages.standings import NO_CLASS, Standings, standing_bytes
from infl_cache.stages.stored import layouts

# Training samples of the trial product, numbers of its test rows, numbers of a tile that is written or ranked.
SAMPLES, NUMBERS, TILE = 512, 2**25, 2**19
HEADER = 128
# Names and headers of the arrays in `rankings.npz`.
ARCHIVE = 4700
# Test samples that classes are counted among.
TARGETS = 256


@dataclass(frozen=True)
class Scoring:
    """Seconds: `multiply` of a training sample in a product and `score` for each test sample in it; `load` of a row of
    s_test; `sync` of a tile and `write` of a byte; `rank` of a pair in the first columns, `rank_on` in later ones.
    """

    multiply: float = 0.0
    score: float = 0.0
    load: float = 0.0
    sync: float = 0.0
    write: float = 0.0
    rank: float = 0.0
    rank_on: float = 0.0


@dataclass(frozen=True)
class InfluencePlan:
    """Stage 3 on paper, of `columns` training samples a tile, `classes` with rankings of their own.

    `start` are the seconds before the first tile, `read` those of a training sample's gradient. With `slab_bytes` the
    tile stays in memory and both stores stream by.
    """

    n_train: int
    n_test: int
    tile_rows: int
    columns: int
    options: InfluenceOptions
    classes: int
    read: float
    scoring: Scoring
    start: float
    slab_bytes: int = 0
    memory: float = 0.0

    @property
    def matrix(self) -> bool:
        """Whether the matrix is kept."""
        return self.options.matrix

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
        """Size of `rankings.npz`: ids and values of both ends, of test and training samples, of classes and of all."""
        rankings = min(self.options.top_k, self.n_train) * (self.n_test + 1 + self.classes)
        of_trains = self.n_train * min(self.options.top_k_train, self.n_test)
        return 24 * (rankings + of_trains) + 4 * self.n_train + 8 * self.classes + ARCHIVE

    @property
    def state_bytes(self) -> int:
        """What the rankings are made of: in memory, and without a matrix in `influence.state` too."""
        options = self.options
        return standing_bytes(self.n_test, self.n_train, options.top_k, options.top_k_train, self.classes)

    @property
    def n_bytes(self) -> int:
        """Matrix and rankings, or these and their state (`--no-matrix`)."""
        return self.ranking_bytes + (self.matrix_bytes if self.matrix else self.state_bytes)

    @property
    def seconds(self) -> float:
        """Reading, multiplying, writing and ranking take turns; then the rankings are written."""
        pairs, each = float(self.n_test) * self.n_train, self.scoring
        passing = self.n_train * self.passes * (self.read + each.multiply) + pairs * each.score
        tiles = self.passes * -(-self.n_train // self.columns)
        kept = tiles * each.sync + 4 * pairs * each.write if self.matrix else self.state_bytes * each.write
        first = min(self.n_train, self.columns, TILE_COLUMNS)
        ranked = self.n_test * (first * each.rank + (self.n_train - first) * each.rank_on)
        loads = -(-self.n_train // self.columns) if self.slab_bytes else 1
        loaded = loads * self.n_test * each.load + self.ranking_bytes * each.write
        return self.start + passing + kept + ranked + loaded


def tile_of(
    options: Options, forms: Forms, budget: int, counts: tuple[int, int], dtype: str, block_rows: int
) -> tuple[int, int, int]:
    """Test and training samples of a tile, and bytes of a slab of s_test: the order of stage 3, chosen as it does.

    `counts` are n_train and n_test, `dtype` is that of the stored gradients.
    """
    n_train, n_test = counts
    stored = {each.path: each for each in layouts(forms, n_train, dtype, block_rows, options.grads.cache)}
    itemsize, asked = 8 if dtype == "float64" else 4, options.resources.tile_rows
    staying = not options.grads.cache or bool(asked)
    size = forms.parameters.size
    sides = options.resources.test_block_rows or fitting_sides(options.stest.solver, budget, size * itemsize)
    solutions = array_layout("s_test", n_test, (size,), f"float{8 * itemsize}", min(sides, n_test))
    room = room_of(budget, itemsize)
    order = order_for((n_test, n_train), forms, stored, solutions, room, block_rows, staying)
    return min(asked or order.rows, n_test), -(-order.columns // block_rows) * block_rows, order.slab_bytes


def temporaries(forms: Forms, tile_rows: int, rows: int, itemsize: int) -> float:
    """Bytes that the products of `rows` gradients with a tile's test rows would take at once, had they no budget."""
    found = 0
    for layer in forms.factored:
        to_build, to_contract = RULES[layer.rule].held(layer.input_shape, layer.grad_shape, layer.gradient_size)
        found = max(found, to_build, tile_rows * (to_contract or 0))
    return float(found * rows * itemsize)


def held(made: InfluencePlan, room: float, row_bytes: int, block_bytes: float) -> float:
    """Bytes that stage 3 holds: rows of s_test and their pieces, a block decoded and as read, products, rankings."""
    s_test = 3.0 * min(made.tile_rows * row_bytes, made.slab_bytes or made.tile_rows * row_bytes)
    sums = 8.0 * made.tile_rows * min(made.columns, made.n_train)
    return s_test + 3 * block_bytes + room + sums + 3 * made.state_bytes + FIXED


def classes_among(run: Opened, tests: Sequence[int], n_train: int) -> int:
    """Classes of the test samples that get rankings of their own, counted among a few."""
    few = [tests[place] for place in spread(len(tests), TARGETS)]
    targets = targets_as_numbers(run.task, probe_batch(run.task, few, run.device, "test").data, len(few))
    found = classes_of(targets.cpu().double().numpy())
    labels = 0 if found is None else len(np.unique(found[found != NO_CLASS]))
    return labels if 12 * (labels + 1) * n_train <= run.budget // ROOM else 0


def scoring(run: Opened, forms: Forms, tile_rows: int, columns: int) -> Scoring:
    """Time a product, a tile on the disk and one in the rankings; `load` is not known here."""
    multiply, score = _multiplied(run, forms, tile_rows)
    rows = max(1, min(tile_rows, TILE // columns))
    sync, write = _written(run.folder.path, rows, min(columns, TILE))
    options = run.options.influence
    rank, rank_on = ranked(options.top_k, options.top_k_train, min(tile_rows, 64), min(columns, TILE_COLUMNS))
    return Scoring(multiply, score, 0.0, sync, write, rank, rank_on)


def _multiplied(run: Opened, forms: Forms, tile_rows: int) -> tuple[float, float]:
    """Seconds of a training sample in the product, and for each test sample: of a part of a tile's rows and of all."""
    fitting = max(1, min(SAMPLES, run.budget // 16 // (4 * max(1, forms.row_size)), len(run.task.train)))
    count = forms.at_once(fitting)
    captured = capture(run.task, forms, probe_batch(run.task, spread(len(run.task.train), count), run.device))
    rows = max(1, min(tile_rows, NUMBERS // run.parameters.size))
    dtype = torch.bfloat16 if run.options.influence.product_dtype == "bfloat16" else captured.dense.dtype
    found = []
    for few in (max(1, rows // 4), rows):
        asked = torch.ones(few, run.parameters.size, dtype=dtype, device=run.device)
        cut = scores.queries(forms, asked)

        def multiplied(cut: scores.Queries = cut) -> None:
            scores.scores(forms, cut, captured.factors, captured.dense, run.budget // 8)

        found.append((few, clocked(multiplied, run.device) / len(captured.loss)))
    return line(found[0], found[1])


def _written(near: Path, rows: int, columns: int) -> tuple[float, float]:
    """Seconds of a tile of the matrix, and of a byte in it."""
    small, large = try_matrix(near, 1, 1), try_matrix(near, rows, columns)
    return line((4, small), (max(5, 4 * rows * columns), large))


def ranked(k: int, k_train: int, rows: int, columns: int) -> tuple[float, float]:
    """Seconds of a pair in the rankings: in the first columns of a row of tiles, and in later ones."""
    values = np.random.default_rng(0).standard_normal((rows, 2 * columns), np.float32)
    standings = Standings(rows, 2 * columns, k, k_train, 1, None, 0)
    tests, cpu = np.arange(rows), torch.device("cpu")

    def added(start: int) -> float:
        # Once: what was added is there.
        return once(lambda: standings.add(tests, start, values[:, start : start + columns]), cpu) / (rows * columns)

    return added(0), added(columns)
