"""One file, or one tile of a matrix, beside what the ledger says of it, and the fault where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infl_cache.disk.inside import leads_out
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.sums import Bytes, size_of_file, sums_of_file
from infl_cache.stages.tiles import CommittedTile


@dataclass(frozen=True)
class Fault:
    """A file, or some rows of it, that is not what was committed; `block` is None where it is of no block alone."""

    stage: str
    block: int | None
    file: str
    rows: str | None
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}{f' ({self.rows})' if self.rows else ''}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class FileCheck:
    """A file of the folder and what it was; without a checksum (`tail` alone) it ends with that of the rest."""

    root: Path
    stage: str
    block: int | None
    file: str
    rows: str | None
    size: int
    crc: int | None
    tail: int = 0
    always: bool = False

    @property
    def n_bytes(self) -> int:
        """What there is to read."""
        return self.size

    def fault(self, read: bool, memory: Bytes) -> Fault | None:
        """What is wrong with it, if anything; a size that is right is all there is to say unless it is `read`."""
        crc = self.crc
        if leads_out(self.file):
            return Fault(self.stage, self.block, self.file[:200], self.rows, "a name inside the folder", "this one")
        try:
            size = size_of_file(self.root / self.file)
            if size != self.size:
                return self._fault(f"{size} bytes")
            if not read:
                return None
            sums = sums_of_file(self.root / self.file, memory, self.tail)
        except FileNotFoundError:
            return self._fault("no file")
        except (OSError, ValueError) as error:
            return self._fault(f"what cannot be read ({getattr(error, 'strerror', None) or error})")
        if self.tail and sums.crc != sums.tail:
            return self._fault(f"{sums.size} with {sums.crc:08x}, which ends with {sums.tail:08x}")
        return None if crc in (None, sums.crc) else self._fault(f"{sums.size} with {sums.crc:08x}")

    def _fault(self, found: str) -> Fault:
        words = f"{self.size} bytes with " + ("their checksum" if self.crc is None else f"checksum {self.crc:08x}")
        return Fault(self.stage, self.block, self.file, self.rows, words, found)


@dataclass(frozen=True)
class TileCheck:
    """Rows and columns of an open matrix."""

    matrix: MatrixFile
    stage: str
    tile: CommittedTile
    always: bool = False

    @property
    def file(self) -> str:
        """Its name."""
        return self.matrix.path.name

    @property
    def n_bytes(self) -> int:
        """What there is to read."""
        return self.tile.n_bytes

    def fault(self, read: bool, memory: Bytes) -> Fault | None:
        """What is wrong with it, if it is `read` and anything is."""
        tile = self.tile
        if not read:
            return None
        try:
            crc = self.matrix.checksum_of(tile.rows, tile.columns.start, tile.columns.stop - tile.columns.start, memory)
            found = None if crc == tile.crc else f"{crc:08x}"
        except OSError as error:
            found = f"what cannot be read ({error.strerror})"
        if found is None:
            return None
        return Fault(self.stage, tile.block, self.file, tile.words, f"checksum {tile.crc:08x}", found)
