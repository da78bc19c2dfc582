"""Index arithmetic against its contracts, with sizes that do not divide each other."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.disk import layout as layout_module
from infl_cache.disk.layout import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_COLUMNS,
    MAX_BLOCK_ROWS,
    Block,
    array_layout,
    as_ranges,
    blocks,
    choose_block_rows,
    chunk_keys,
    consecutive,
    from_ranges,
    rows_by_block,
    span_blocks,
)

PRIMES = (1, 2, 3, 7, 13, 31, 61, 97)
n_rows = st.integers(1, 150) | st.sampled_from(PRIMES)
block_rows = st.integers(1, 130) | st.sampled_from(PRIMES)
row_shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 400) | st.sampled_from(PRIMES)),
    st.tuples(*[st.integers(1, 13)] * 2),
    st.tuples(*[st.integers(1, 5)] * 3),
)
dtypes = st.sampled_from(["float32", "float64", "int64", "uint64", "bool"])


@st.composite
def laid_out(draw):
    """An array with its block size, cut by a small limit so that a few rows make many chunk files."""
    block, limit = draw(block_rows), draw(st.integers(16, 5000))
    with mock.patch.object(layout_module, "CHUNK_BYTES", limit):
        return array_layout("x", draw(n_rows), draw(row_shapes), draw(dtypes), block), block, limit


@given(n_rows, block_rows)
@settings(deadline=None)
def test_the_blocks_index_every_row_exactly_once_and_in_order(n, size):
    cut = blocks(n, size)
    assert [row for block in cut for row in range(block.start, block.stop)] == list(range(n))
    assert [block.index for block in cut] == list(range(len(cut)))
    assert all(block.rows == size for block in cut[:-1])
    assert 1 <= cut[-1].rows <= size


def test_no_rows_make_no_blocks():
    assert blocks(0, 4) == ()


@given(laid_out())
@settings(deadline=None)
def test_the_chunk_files_of_the_blocks_are_disjoint_and_together_the_whole_grid(made):
    layout, size, _ = made
    keys = [key for block in blocks(layout.n_rows, size) for key in chunk_keys(layout, block)]
    counts = [math.ceil(whole / chunk) for whole, chunk in zip(layout.shape, layout.chunks, strict=True)]
    grid = {"c." + ".".join(map(str, index)) for index in itertools.product(*map(range, counts))}
    assert len(keys) == len(set(keys))
    assert set(keys) == grid


@given(laid_out())
@settings(deadline=None)
def test_a_row_lies_in_the_chunk_files_of_its_own_block(made):
    layout, size, _ = made
    for block in blocks(layout.n_rows, size):
        written = {int(key.split(".")[1]) for key in chunk_keys(layout, block)}
        assert written == {row // layout.chunk_rows for row in range(block.start, block.stop)}


@given(laid_out())
@settings(deadline=None)
def test_a_chunk_keeps_to_the_limit_and_is_not_cut_further_than_that(made):
    layout, size, limit = made
    itemsize = np.dtype(layout.dtype).itemsize
    assert math.prod(layout.chunks) * itemsize <= limit
    assert size % layout.chunk_rows == 0
    row_bytes = math.prod(layout.row_shape) * itemsize
    if len(layout.row_shape) == 1:  # as few columns' cuts as fit, all rows of the block together where that is possible
        few = -(-layout.row_shape[0] // layout.chunk_row_shape[0])
        assert few == 1 or layout.chunk_rows * -(-layout.row_shape[0] // (few - 1)) * itemsize > limit
        larger = [rows for rows in range(layout.chunk_rows + 1, size + 1) if size % rows == 0]
        assert all(rows * min(layout.row_shape[0], CHUNK_COLUMNS) * itemsize > limit for rows in larger)
    elif layout.chunk_row_shape == layout.row_shape:
        larger = [rows for rows in range(layout.chunk_rows + 1, size + 1) if size % rows == 0]
        assert all(rows * row_bytes > limit for rows in larger)
    else:
        assert row_bytes > limit
        assert layout.chunk_rows == 1
        assert all(1 <= chunk <= whole for chunk, whole in zip(layout.chunk_row_shape, layout.row_shape, strict=True))


@pytest.mark.parametrize(
    ("row_shape", "dtype", "size", "chunks"),
    [
        ((1_000_003,), "float32", 61, (61, 66_667)),
        ((136_874,), "float32", 64, (64, 45_625)),
        ((5_000_011,), "float32", 13, (13, 312_501)),
        ((100_000,), "float32", 16_384, (512, 7693)),
        ((49, 65_537), "float64", 4, (1, 25, 65_537)),
        ((), "uint64", 4096, (4096,)),
    ],
)
def test_chunks_of_real_sizes(row_shape, dtype, size, chunks):
    layout = array_layout("x", 10_007, row_shape, dtype, size)
    assert layout.chunks == chunks
    assert layout.shape == (10_007, *row_shape)
    assert math.prod(chunks) * np.dtype(dtype).itemsize <= CHUNK_BYTES


@given(st.integers(0, 10**7), st.integers(0, 10**10), st.integers(1, 2**40))
@settings(deadline=None)
def test_a_block_keeps_to_the_budget_or_is_a_single_row(n, row_bytes, budget):
    rows = choose_block_rows(n, row_bytes, budget)
    assert 1 <= rows <= min(MAX_BLOCK_ROWS, max(1, n))
    assert rows == 1 or rows * row_bytes <= min(BLOCK_BYTES, budget)
    assert rows == n or rows & (rows - 1) == 0


@given(st.lists(st.integers(0, 500), max_size=60), block_rows)
@settings(deadline=None)
def test_rows_grouped_by_block_are_each_in_their_block_once_and_in_order(rows, size):
    groups = rows_by_block(rows, size)
    assert sorted(position for group in groups.values() for position in group) == list(range(len(rows)))
    for index, positions in groups.items():
        assert all(index * size <= rows[position] < (index + 1) * size for position in positions)
        assert positions == sorted(positions)


def test_block_knows_its_rows():
    assert Block(2, 14, 21).rows == 7


@given(st.lists(st.integers(0, 60), unique=True, max_size=40))
def test_ranges_hold_the_same_numbers_in_the_same_order(numbers):
    ranges = as_ranges(numbers)
    assert from_ranges(ranges).tolist() == numbers
    assert len(ranges) <= max(1, len(numbers))
    runs = list(consecutive(numbers))
    assert [first + i for first, part in runs for i in range(part.stop - part.start)] == numbers
    assert [part.start for _, part in runs] == [0, *(part.stop for _, part in runs)][: len(runs)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 8))
def test_the_blocks_of_spans_hold_their_rows_once_and_share_no_multiple_of_block_rows(lengths, block_rows):
    spans, start = [], 0
    for length in lengths:
        spans.append([start, start + length])
        start += -(-length // block_rows) * block_rows
    found = span_blocks(spans, block_rows)
    assert [block.index for block in found] == [block.start // block_rows for block in found] == list(range(len(found)))
    assert [row for block in found for row in range(block.start, block.stop)] == [
        row for first, stop in spans for row in range(first, stop)
    ]
    assert all((block.stop - 1) // block_rows == block.index for block in found)


def test_a_span_from_within_a_block_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        span_blocks([[0, 3], [3, 5]], 4)
