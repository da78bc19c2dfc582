"""All index arithmetic, on plain integers: rows into blocks, blocks into chunk files, budgets into sizes.

Contracts: the blocks of `n_rows` index every row exactly once; a chunk file never holds rows of two blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 16 * 2**20
BLOCK_BYTES = 256 * 2**20
# Plain rows are not cut into fewer columns than these.
CHUNK_COLUMNS = 8192
MAX_BLOCK_ROWS = 16384


@dataclass(frozen=True)
class Block:
    """Rows `start <= row < stop`: the unit of work, of write and of commit."""

    index: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a store: `n_rows` rows of `row_shape`, cut into chunks of `chunk_rows` rows."""

    path: str
    n_rows: int
    row_shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    chunk_row_shape: tuple[int, ...]
    # The element type whose bits are stored, where zarr has no name for it.
    stands_for: str = ""
    # What a row that was never written reads as, where the type has no NaN.
    fill: int = 0
    # The names of the axes in the array's metadata; stores of older versions were laid out without.
    axes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return (self.n_rows, *self.row_shape)

    @property
    def plain(self) -> bool:
        """Whether the array holds plain rows: one axis besides that of the samples."""
        return len(self.row_shape) == 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return (self.chunk_rows, *self.chunk_row_shape)

    @classmethod
    def from_json(cls, each: Mapping[str, Any]) -> ArrayLayout:
        """The layout that was written down as plain data."""
        return cls(
            str(each["path"]), int(each["n_rows"]), tuple(map(int, each["row_shape"])), str(each["dtype"]),
            int(each["chunk_rows"]), tuple(map(int, each["chunk_row_shape"])), str(each.get("stands_for", "")),
            int(each.get("fill", 0)), tuple(map(str, each.get("axes", ()))),
        )  # fmt: skip


def blocks(n_rows: int, block_rows: int) -> tuple[Block, ...]:
    """`n_rows` rows cut into blocks of `block_rows`, the last one shorter.

    >>> [(b.start, b.stop) for b in blocks(10, 4)]
    [(0, 4), (4, 8), (8, 10)]
    """
    if block_rows < 1:
        raise ValueError(f"expected at least one row a block, found {block_rows}")
    return tuple(
        Block(index, start, min(start + block_rows, n_rows)) for index, start in enumerate(range(0, n_rows, block_rows))
    )


def span_blocks(spans: Iterable[Sequence[int]], block_rows: int) -> tuple[Block, ...]:
    """Spans of rows `[start, stop]`, each from a multiple of `block_rows` on, cut into blocks numbered throughout.

    >>> [(b.index, b.start, b.stop) for b in span_blocks([[0, 6], [8, 11]], 4)]
    [(0, 0, 4), (1, 4, 6), (2, 8, 11)]
    """
    found: list[Block] = []
    for start, stop in spans:
        if start % block_rows:
            raise ValueError(f"expected a span from a multiple of {block_rows} on, found row {start}")
        for each in blocks(stop - start, block_rows):
            found.append(Block(len(found), start + each.start, start + each.stop))
    return tuple(found)


def as_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers in their order, as few `[start, stop, step]` of Python's ranges.

    >>> as_ranges([0, 1, 2, 7, 10, 12, 14])
    [[0, 3, 1], [7, 8, 1], [10, 15, 2]]
    """
    left, found = [int(number) for number in numbers], []
    place = 0
    while place < len(left):
        step = left[place + 1] - left[place] if place + 1 < len(left) else 1
        end = place + 1
        while end < len(left) and left[end] - left[end - 1] == step:
            end += 1
        if end - place < 3 and step != 1:
            end, step = place + 1, 1
        found.append([left[place], left[end - 1] + (1 if step > 0 else -1), step])
        place = end
    return found


def from_ranges(ranges: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """The inverse of `as_ranges`."""
    return np.array([number for each in ranges for number in range(*each)], np.int64)


def samples_of(plan: Mapping[str, Any]) -> NDArray[np.int64]:
    """Which sample each row of a store belongs to, by its plan; -1 for rows between two spans, which hold none.

    >>> samples_of({"spans": [[0, 2], [4, 5]], "samples": [[7, 9, 1], [3, 4, 1]]}).tolist()
    [7, 8, -1, -1, 3]
    """
    if "samples" not in plan:
        return np.arange(plan["n_rows"])
    found = np.full(plan["spans"][-1][1], -1, np.int64)
    found[np.concatenate([np.arange(start, stop) for start, stop in plan["spans"]])] = from_ranges(plan["samples"])
    return found


def consecutive(numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
    """Runs of numbers that count up by one: the first of each and where it lies.

    >>> list(consecutive([4, 5, 6, 2, 3]))
    [(4, slice(0, 3, None)), (2, slice(3, 5, None))]
    """
    values = np.asarray(numbers, np.int64)
    ends = [*(np.flatnonzero(np.diff(values) != 1) + 1).tolist(), len(values)]
    start = 0
    for end in ends:
        if start < end:
            yield int(values[start]), slice(start, end)
        start = end


def choose_block_rows(n_rows: int, row_bytes: int, budget: int) -> int:
    """Rows a block: a power of two near `BLOCK_BYTES`, within `budget` bytes, at most `MAX_BLOCK_ROWS`.

    >>> choose_block_rows(n_rows=60_000, row_bytes=10_000, budget=2**30)
    16384
    >>> choose_block_rows(n_rows=60_000, row_bytes=2_000_000, budget=2**30)
    128
    """
    fitting = max(1, min(BLOCK_BYTES, budget) // max(1, row_bytes))
    return min(1 << (fitting.bit_length() - 1), MAX_BLOCK_ROWS, max(1, n_rows))


def array_layout(
    path: str, n_rows: int, row_shape: tuple[int, ...], dtype: str, block_rows: int, stands_for: str = "",
    fill: int = 0, rows: str = "sample", columns: str = "",
) -> ArrayLayout:  # fmt: skip
    """Chunks of at most `CHUNK_BYTES`; `rows` is the name of the first axis, `columns` that of plain rows' other one.

    Plain rows are cut into columns and stay together, so that some columns of all samples can be read alone; of other
    rows a chunk holds as many of the block's as fit, else one, cut along its first axis.

    >>> array_layout("dense", 1000, (500_000,), "float32", 64).chunks
    (64, 62500)
    >>> array_layout("layer/input", 1000, (500, 1000), "float32", 64).chunks
    (8, 500, 1000)
    >>> array_layout("loss", 1000, (), "float32", 64).chunks
    (64,)
    """
    itemsize = np.dtype(dtype).itemsize
    plain = len(row_shape) == 1
    least = itemsize * (min(*row_shape, CHUNK_COLUMNS) if plain else math.prod(row_shape))
    divisors = [d for d in range(1, block_rows + 1) if block_rows % d == 0]
    chunk_rows = max((d for d in divisors if d * least <= CHUNK_BYTES), default=1)
    chunk_row = list(row_shape)
    if plain:
        widest = max(1, CHUNK_BYTES // (chunk_rows * itemsize))
        chunk_row = [-(-row_shape[0] // max(1, -(-row_shape[0] // widest)))]
    for axis in range(len(chunk_row)):
        while math.prod(chunk_row) * itemsize * chunk_rows > CHUNK_BYTES and chunk_row[axis] > 1:
            chunk_row[axis] = -(-chunk_row[axis] // 2)
    stands_for = "" if stands_for == dtype else stands_for
    axes = axis_names(path, len(row_shape), rows, columns)
    return ArrayLayout(path, n_rows, tuple(row_shape), dtype, chunk_rows, tuple(chunk_row), stands_for, fill, axes)


def axis_names(path: str, beside: int, rows: str, columns: str = "") -> tuple[str, ...]:
    """Names for the axis of the rows and the `beside` others: no two arrays of a group share one but for the rows.

    >>> axis_names("0/input", 2, "train"), axis_names("s_test", 1, "row", "parameter")
    (('train', 'input_1', 'input_2'), ('row', 'parameter'))
    """
    if columns and beside == 1:
        return (rows, columns)
    own = path.rpartition("/")[2]
    return (rows, *(f"{own}_{axis}" for axis in range(1, beside + 1)))


def chunk_keys(layout: ArrayLayout, block: Block) -> list[str]:
    """The names of exactly the chunk files that hold the rows of `block`.

    >>> chunk_keys(array_layout("x", 10, (3,), "float32", 4), Block(1, 4, 8))
    ['c.1.0']
    """
    return list(chunk_parts(layout, block))


def chunk_parts(layout: ArrayLayout, block: Block) -> dict[str, tuple[slice, ...]]:
    """Of each chunk file of `block`, by name: which part of the block's rows and columns it holds.

    >>> chunk_parts(array_layout("x", 10, (3,), "float32", 4), Block(1, 4, 8))
    {'c.1.0': (slice(0, 4, None), slice(0, 3, None))}
    """
    rows = range(block.start // layout.chunk_rows, -(-block.stop // layout.chunk_rows))
    columns = [range(-(-size // chunk)) for size, chunk in zip(layout.row_shape, layout.chunk_row_shape, strict=True)]
    parts = {}
    for index in itertools.product(rows, *columns):
        starts = [number * length for number, length in zip(index, layout.chunks, strict=True)]
        stops = [min(s + length, end) for s, length, end in zip(starts, layout.chunks, layout.shape, strict=True)]
        within = slice(max(0, starts[0] - block.start), min(stops[0], block.stop) - block.start)
        parts["c." + ".".join(map(str, index))] = (within, *map(slice, starts[1:], stops[1:]))
    return parts


def rows_by_block(rows: list[int], block_rows: int) -> dict[int, list[int]]:
    """Positions in `rows` grouped by the block that holds the row.

    >>> rows_by_block([5, 0, 6], 4)
    {1: [0, 2], 0: [1]}
    """
    groups: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(row // block_rows, []).append(position)
    return groups
