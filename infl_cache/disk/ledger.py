"""What is done: an SQLite table that is written only after the files it speaks of are on the disk.

WAL with `synchronous=FULL`: a committed row survives a power cut. Done means a row here
whose files have that size and checksum; a chunk file that merely exists proves nothing.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infl_cache.errors import DamagedStore, DiskFull

# What SQLite takes to begin: with less, its errors speak of anything.
ROOM = 2**20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (
    stage TEXT NOT NULL, block INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    digest TEXT NOT NULL, nonfinite INTEGER NOT NULL, bad_rows TEXT NOT NULL,
    seconds REAL NOT NULL, committed REAL NOT NULL, PRIMARY KEY (stage, block));
CREATE TABLE IF NOT EXISTS files (
    stage TEXT NOT NULL, block INTEGER NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY (stage, block, path));
"""


@dataclass(frozen=True)
class FileRecord:
    """A file of the run folder as it was when it was committed."""

    path: str
    size: int
    crc: int


@dataclass(frozen=True)
class BlockRecord:
    """One committed block of one stage.

    `digest` is over the input samples, `nonfinite` counts values, `bad_rows` are the rows that hold them,
    `seconds` is the time the block took, `committed` the wall-clock time of the commit.
    """

    stage: str
    index: int
    start: int
    stop: int
    digest: str
    nonfinite: int
    bad_rows: tuple[int, ...]
    seconds: float
    committed: float
    files: tuple[FileRecord, ...]


class Ledger:
    """The table of committed blocks in `path`."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self._path = path
        self._connection = _connect(path, read_only)

    def commit(self, record: BlockRecord) -> None:
        """Add `record` (replacing an older one of that block); durable when this returns."""
        key = (record.stage, record.index)
        with self._connection:
            self._connection.execute("DELETE FROM files WHERE stage = ? AND block = ?", key)
            self._connection.execute(
                "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*key, record.start, record.stop, record.digest, record.nonfinite, json.dumps(record.bad_rows),
                 record.seconds, record.committed),
            )  # fmt: skip
            self._connection.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?)", [(*key, f.path, f.size, f.crc) for f in record.files]
            )

    def clear(self, stage: str) -> None:
        """Forget everything `stage` has done."""
        with self._connection:
            self._connection.execute("DELETE FROM files WHERE stage = ?", (stage,))
            self._connection.execute("DELETE FROM blocks WHERE stage = ?", (stage,))

    def forget(self, stage: str, blocks: Iterable[int]) -> None:
        """Forget these blocks of `stage`, all of them or, after a crash, none."""
        keys = [(stage, block) for block in blocks]
        with self._connection:
            self._connection.executemany("DELETE FROM files WHERE stage = ? AND block = ?", keys)
            self._connection.executemany("DELETE FROM blocks WHERE stage = ? AND block = ?", keys)

    def done(self, stage: str) -> dict[int, BlockRecord]:
        """The committed blocks of `stage`, by block index."""
        try:
            files: dict[int, list[FileRecord]] = {}
            for block, path, size, crc in self._connection.execute(
                "SELECT block, path, size, crc FROM files WHERE stage = ? ORDER BY path", (stage,)
            ):
                files.setdefault(block, []).append(FileRecord(str(path), int(size), int(crc)))
            rows = self._connection.execute(
                "SELECT block, start, stop, digest, nonfinite, bad_rows, seconds, committed"
                " FROM blocks WHERE stage = ? ORDER BY block",
                (stage,),
            ).fetchall()
            return {int(row[0]): _record(stage, row, files.get(row[0], [])) for row in rows}
        except (sqlite3.DatabaseError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise DamagedStore(f"{self._path}: the ledger cannot be read ({error}); start over with --force") from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def done_in(path: Path, stage: str) -> dict[int, BlockRecord]:
    """The committed blocks of `stage` by a look into the ledger in `path`; none where there is no file."""
    if not path.exists():
        return {}
    ledger = Ledger(path, read_only=True)
    try:
        return ledger.done(stage)
    finally:
        ledger.close()


def _record(stage: str, row: Sequence[Any], files: Sequence[FileRecord]) -> BlockRecord:
    block, start, stop, digest, nonfinite, bad_rows, seconds, committed = row
    bad = tuple(int(each) for each in json.loads(bad_rows))
    return BlockRecord(
        stage, int(block), int(start), int(stop), str(digest), int(nonfinite), bad, float(seconds), float(committed),
        tuple(files),
    )  # fmt: skip


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    try:
        if read_only:
            return _connect_for_reading(path)
        # The writer thread commits, the main thread waits for it: one at a time, never both.
        connection = sqlite3.connect(path, timeout=30.0, check_same_thread=False)
        _refuse_code(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(_SCHEMA)
        return connection
    except sqlite3.DatabaseError as error:
        little = shutil.disk_usage(path.parent).free < ROOM
        if "disk is full" in str(error) or ("disk I/O" in str(error) and little):
            raise DiskFull(
                f"{path}: the disk is full, not even the ledger has room; make some and try again"
            ) from error
        raise DamagedStore(
            f"{path}: expected an SQLite ledger, found something else ({error});"
            " restore it, or remove the run folder and start over"
        ) from error


def _connect_for_reading(path: Path) -> sqlite3.Connection:
    """Without writing a byte where possible: on a read-only medium WAL's side files cannot be made."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30.0)
    try:
        _refuse_code(connection)
        connection.execute("SELECT count(*) FROM blocks").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        _refuse_code(connection)
        connection.execute("SELECT count(*) FROM blocks").fetchone()
    return connection


def _refuse_code(connection: sqlite3.Connection) -> None:
    """`sqlite3.DatabaseError` unless the file holds our two tables alone: no views, triggers, generated columns."""
    connection.execute("PRAGMA trusted_schema = OFF")
    ours = {" ".join(text.replace("IF NOT EXISTS ", "").split()) for text in _SCHEMA.split(";")}
    for kind, name, text in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        own_index = kind == "index" and text is None
        if not own_index and " ".join(str(text).split()) not in ours:
            raise sqlite3.DatabaseError(f"a {str(kind)[:20]} {str(name)[:40]!r} that is none of its own")


def array_bytes(records: Iterable[BlockRecord]) -> int:
    """Bytes on disk of the committed blocks."""
    return sum(file.size for record in records for file in record.files)
