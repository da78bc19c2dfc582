"""Tiles of a large matrix, each a file of its own that says itself whether it is what was written.

A tile is float64 numbers and the CRC-32C of its name and of these. It is written past the page cache, synced, and only
then given its name: a file that has its name is whole, and one that was damaged, or has another one's name, is noticed
when it is read. Nothing here is a result: what is missing is computed again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.direct import write_durably
from infl_cache.disk.durable import crc32c, make_folders, remove, sync_file
from infl_cache.errors import DamagedStore, DiskFull

FOLDER = "fisher.tiles"
SUFFIX = ".tile"
CRC_BYTES = 4

Doubles = NDArray[np.float64]


class TileFolder:
    """Tiles of `side` rows by kind, row and column, under the identity of what they were computed from.

    Tiles of another identity are removed. Where there are some of this one, `side` is theirs. A tile of a later kind
    in `kinds` takes the place of one of an earlier kind.
    """

    def __init__(self, folder: Path, identity: str, side: int, kinds: tuple[str, ...]) -> None:
        found = sorted(folder.iterdir()) if folder.exists() else []
        ours = next((each.name for each in found if each.name.rpartition("-")[0] == identity), f"{identity}-{side}")
        self.side = int(ours.rpartition("-")[2])
        self._folder, self._kinds = folder / ours, kinds
        remove(each for each in found if each.name != ours)
        make_folders(self._folder)
        self._there = {path.name for path in self._folder.iterdir() if path.suffix == SUFFIX}

    def has(self, kind: str, i: int, j: int) -> bool:
        """Whether that tile is there."""
        return _name(kind, i, j) in self._there

    def get(self, kind: str, i: int, j: int) -> Doubles:
        """The numbers of that tile, in one row; `DamagedStore` if they are not those that were written."""
        path = self._folder / _name(kind, i, j)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedStore(f"{path}: cannot be read ({error.strerror}); {self._remedy}") from error
        body, expected = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if expected != _crc(path.name, body) or len(body) % 8:
            raise DamagedStore(
                f"{path}: expected the tile that was written there, found {len(data):,} bytes with another checksum;"
                f" {self._remedy}"
            )
        return np.frombuffer(body, "<f8").astype(np.float64)

    def put(self, kind: str, i: int, j: int, values: Doubles) -> None:
        """Write a tile; it survives a power cut when this returns."""
        path = self._folder / _name(kind, i, j)
        body = np.ascontiguousarray(values, "<f8").tobytes()
        write_durably(path, body, _crc(path.name, body))
        sync_file(self._folder)
        self._there.add(path.name)
        for earlier in self._kinds[: self._kinds.index(kind)]:
            if self.has(earlier, i, j):
                (self._folder / _name(earlier, i, j)).unlink()
                self._there.discard(_name(earlier, i, j))

    def require_room(self, n_bytes: int) -> None:
        """`DiskFull` unless tiles of `n_bytes` in all can be had, counting those that are there."""
        there = bytes_of_tiles(self._folder)
        free = shutil.disk_usage(self._folder).free
        if n_bytes - there > free:
            raise DiskFull(
                f"{self._folder}: expected room for {n_bytes - there:,} bytes of the Gram matrix, found {free:,} free;"
                " make room, give more --memory so that it needs no disk, or use --curvature-samples"
            )

    @property
    def _remedy(self) -> str:
        return f"remove {self._folder} and run the same command again"


def bytes_of_tiles(folder: Path) -> int:
    """Bytes of all tiles in a folder, at any depth; zero if there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob(f"*{SUFFIX}"))


def _name(kind: str, i: int, j: int) -> str:
    return f"{kind}-{i}-{j}{SUFFIX}"


def _crc(name: str, body: bytes) -> bytes:
    return crc32c(body, crc32c(name.encode())).to_bytes(CRC_BYTES, "little")
