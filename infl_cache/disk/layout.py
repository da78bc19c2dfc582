"""All index arithmetic, on plain integers: rows into blocks, blocks into chunk files, budgets into sizes.

Contracts: the blocks of `n_rows` index every row exactly once; a chunk file never holds rows of two blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK_BYTES = 16 * 2**20
BLOCK_BYTES = 256 * 2**20
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return (self.n_rows, *self.row_shape)

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
    path: str, n_rows: int, row_shape: tuple[int, ...], dtype: str, block_rows: int, stands_for: str = ""
) -> ArrayLayout:
    """Chunks of at most `CHUNK_BYTES`: as many rows of the block as fit, else one row cut along its first axis.

    >>> array_layout("dense", 1000, (500_000,), "float32", 64).chunks
    (8, 500000)
    >>> array_layout("loss", 1000, (), "float32", 64).chunks
    (64,)
    """
    itemsize = np.dtype(dtype).itemsize
    row_bytes = itemsize * math.prod(row_shape)
    divisors = [d for d in range(1, block_rows + 1) if block_rows % d == 0]
    rows = max((d for d in divisors if d * row_bytes <= CHUNK_BYTES), default=1)
    chunk_row = list(row_shape)
    for axis in range(len(chunk_row)):
        while math.prod(chunk_row) * itemsize * rows > CHUNK_BYTES and chunk_row[axis] > 1:
            chunk_row[axis] = -(-chunk_row[axis] // 2)
    stands_for = "" if stands_for == dtype else stands_for
    return ArrayLayout(path, n_rows, tuple(row_shape), dtype, rows, tuple(chunk_row), stands_for)


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
