"""Rows of the s_test store for a tile of the matrix: those of its test samples, the columns that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.codecs import planned_codec
from infl_cache.disk.layout import ArrayLayout, Block, consecutive
from infl_cache.disk.pieces import Piece
from infl_cache.disk.reader import BlockReader
from infl_cache.maths.parts import Part
from infl_cache.stages.opening import Opened

# Of a tile the test samples `start` to `stop - 1`, and of these the columns of a part: (stop - start, part.size).
ReadSolutions = Callable[[Block, int, int, Part], Tensor]
Pieces = Callable[[Block, slice], list[Piece]]


def solution_layout(run: Opened) -> ArrayLayout:
    """How the rows of s_test lie in their store."""
    return next(layout for layout in run.folder.array_layouts("stest") if layout.path == "s_test")


@contextmanager
def solution_reader(run: Opened) -> Iterator[ReadSolutions]:
    """A function that reads rows of s_test, whatever blocks they were stored in, onto the device."""
    layout, samples = solution_layout(run), run.folder.samples("stest")
    stored = run.folder.stage_blocks("stest")
    with _pieces(run) as pieces:

        def read(tile: Block, start: int, stop: int, part: Part) -> Tensor:
            found = np.empty((stop - start, part.size), layout.dtype)
            # Rows of the store between two spans belong to no test sample.
            places = np.flatnonzero(samples[tile.start : tile.stop] >= 0)[start:stop] + tile.start
            for block in stored:
                into = np.flatnonzero((places >= block.start) & (places < block.stop))
                if len(into):
                    rows = slice(int(places[into[0]]) - block.start, int(places[into[-1]]) + 1 - block.start)
                    _fill(found[into[0] : into[-1] + 1], rows, part.columns, layout, lambda at: pieces(block, at))  # noqa: B023
            return torch.from_numpy(found).to(run.device)

        yield read


def _fill(
    target: np.ndarray, rows: slice, columns: list[slice], layout: ArrayLayout, pieces: Callable[[slice], list[Piece]]
) -> None:
    """Copy some rows of a block, the given columns one after the other; each chunk is read once."""
    width = layout.chunk_row_shape[0]
    chunks = sorted({chunk for at in columns for chunk in range(at.start // width, -(-at.stop // width))})
    for first, run in consecutive(chunks):
        count = run.stop - run.start
        for piece in pieces(slice(first * width, min((first + count) * width, layout.row_shape[0]))):
            _copy(target, rows, columns, piece)


def _copy(target: np.ndarray, rows: slice, columns: list[slice], piece: Piece) -> None:
    top, end = max(rows.start, piece.rows.start), min(rows.stop, piece.rows.stop)
    place = 0
    for at in columns:
        start, stop = max(at.start, piece.columns.start), min(at.stop, piece.columns.stop)
        if top < end and start < stop:
            into = target[top - rows.start : end - rows.start, place + start - at.start : place + stop - at.start]
            here = (piece.rows.start, piece.columns.start)
            into[:] = piece.values[top - here[0] : end - here[0], start - here[1] : stop - here[1]]
        place += at.stop - at.start


@contextmanager
def _pieces(run: Opened) -> Iterator[Pieces]:
    """A function from a stored block and columns to their pieces."""
    store, records = run.folder.store("stest"), run.folder.records("stest")
    codec = planned_codec(run.folder.plan("stest"), False, run.folder.path, "stest")
    if codec is None:  # versions before the codec was written down

        def slowly(block: Block, at: slice) -> list[Piece]:
            run.folder.check_block(records[block.index])
            values = store.read_block(block, ["s_test"])["s_test"][:, at]
            return [Piece(slice(0, block.rows), at, values)]

        yield slowly
        return
    reader = BlockReader(store, codec, records)
    try:
        yield lambda block, at: reader.read(block, ["s_test"], {"s_test": at})["s_test"]
    finally:
        reader.close()
