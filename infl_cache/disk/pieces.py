"""Pieces of a block: which rows and columns some numbers that were read stand for."""

from __future__ import annotations

from typing import NamedTuple

from infl_cache.disk.layout import ArrayLayout
from infl_cache.disk.store import Array


class Piece(NamedTuple):
    """Some rows of a block and, of plain rows, some columns: `values` has these axes first."""

    rows: slice
    columns: slice
    values: Array


def all_columns(layout: ArrayLayout) -> slice:
    """The whole first axis of a row."""
    return slice(0, layout.row_shape[0] if layout.row_shape else 1)


def piece_of(part: tuple[slice, ...], chunk: Array) -> Piece:
    """A chunk without the padding at its end."""
    within = tuple(slice(0, each.stop - each.start) for each in part)
    return Piece(part[0], part[1] if len(part) > 1 else slice(0, 1), chunk[within])


def overlaps(part: tuple[slice, ...], columns: slice | None) -> bool:
    """Whether that part of a block holds some of the columns; all of them are None."""
    return columns is None or (part[1].start < columns.stop and columns.start < part[1].stop)


def cut_to(piece: Piece, columns: slice) -> Piece:
    """The piece without the columns outside of `columns`."""
    start, stop = max(piece.columns.start, columns.start), min(piece.columns.stop, columns.stop)
    at = piece.columns.start
    return Piece(piece.rows, slice(start, stop), piece.values[:, start - at : stop - at])
