"""`influence.npy` and its like: plain float32 NumPy files, written tile by tile without ever being mapped.

Mapped pages would count as memory of this process; `pwrite` leaves them to the kernel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import sync_file
from infl_cache.disk.layout import consecutive
from infl_cache.disk.sums import Bytes, extended
from infl_cache.errors import DamagedStore

Floats = NDArray[np.float32]
Rows = Sequence[int] | NDArray[np.int64]
# Numbers that are written at a time where there is nothing to say.
PIECE = 1 << 20


def checksum(values: Floats) -> int:
    """CRC-32C of the numbers in C order, without a copy of them.

    >>> from infl_cache.disk.durable import crc32c
    >>> checksum(np.ones((2, 3), np.float32)) == crc32c(np.ones(6, np.float32).tobytes())
    True
    """
    return int(google_crc32c.value(cast(bytes, np.ascontiguousarray(values).reshape(-1).view(np.uint8))))


class MatrixFile:
    """An open `.npy` file of float32 `shape`, rows by columns in C order.

    With axes of the sizes `leading` before these two, its rows are counted through all of them.
    """

    def __init__(self, path: Path, writable: bool = False, leading: tuple[int, ...] = ()) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                reader = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = reader(file)
                self._offset = file.tell()
        except Exception as error:  # NumPy parses the header as Python text and fails in many ways
            raise DamagedStore(f"{path}: expected a NumPy file, found something else ({error})") from error
        if dtype != np.float32 or fortran or len(shape) != len(leading) + 2 or shape[: len(leading)] != leading:
            words = "two axes" if not leading else f"axes of {', '.join(map(str, leading))} and two more"
            raise DamagedStore(f"{path}: expected float32 rows in {words}, found {dtype} of shape {shape}")
        expected = self._offset + 4 * math.prod(shape)
        if path.stat().st_size != expected:
            raise DamagedStore(f"{path}: expected {expected} bytes, found {path.stat().st_size}")
        self.shape: tuple[int, int] = (math.prod(shape[:-1]), int(shape[-1]))
        self._descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)

    def write(self, start: int, column: int, values: Floats) -> None:
        """Put `values` at row `start`, column `column`."""
        for row, line in enumerate(np.ascontiguousarray(values, np.float32)):
            data, place = memoryview(line.tobytes()), self._place(start + row, column)
            while data:  # the system may take less than it was given
                written = os.pwrite(self._descriptor, data, place)
                data, place = data[written:], place + written

    def read(self, start: int, stop: int, column: int = 0, columns: int | None = None) -> Floats:
        """Rows `start` to `stop - 1`, `columns` of them from `column` on."""
        columns = self.shape[1] - column if columns is None else columns
        values = np.empty((stop - start, columns), np.float32)
        for row in range(stop - start):
            data = os.pread(self._descriptor, 4 * columns, self._place(start + row, column))
            if len(data) != 4 * columns:
                raise DamagedStore(f"{self.path}: row {start + row} ends early")
            values[row] = np.frombuffer(data, np.float32)
        return values

    def write_rows(self, rows: Rows, column: int, values: Floats) -> None:
        """Put each row of `values` at the row that `rows` names, from `column` on."""
        for first, part in consecutive(rows):
            self.write(first, column, values[part])

    def read_rows(self, rows: Rows, column: int = 0, columns: int | None = None) -> Floats:
        """The rows that `rows` names, in that order."""
        columns = self.shape[1] - column if columns is None else columns
        values = np.empty((len(rows), columns), np.float32)
        for first, part in consecutive(rows):
            values[part] = self.read(first, first + part.stop - part.start, column, columns)
        return values

    def checksum_of(self, rows: Rows, column: int, columns: int, memory: Bytes) -> int:
        """`checksum(read_rows(...))` through `memory`; `OSError` if it cannot be read."""
        crc = 0
        for first, part in consecutive(rows):
            count = part.stop - part.start
            # Whole rows lie one after the other.
            lines, width = (1, count * columns) if columns == self.shape[1] else (count, columns)
            for line in range(lines):
                crc = extended(crc, self._descriptor, self._place(first + line, column), 4 * width, memory)
        return crc

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _place(self, row: int, column: int) -> int:
        return self._offset + 4 * (row * self.shape[1] + column)


def create_matrix(path: Path, shape: tuple[int, ...], empty: Rows = ()) -> None:
    """An empty float32 matrix of `shape` on the disk; its tiles are worth nothing until the ledger names them.

    The rows `empty`, counted through all axes but the last, belong to no tile and are NaN: a hole of the file would
    read as an influence of zero.
    """
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + 4 * math.prod(shape))
        nothing = np.full(PIECE, np.nan, "<f4").tobytes()
        for first, part in consecutive(empty):
            file.seek(offset + 4 * first * shape[-1])
            left = 4 * (part.stop - part.start) * shape[-1]
            while left:
                left -= file.write(nothing[:left])
    sync_file(path)
    sync_file(path.parent)
