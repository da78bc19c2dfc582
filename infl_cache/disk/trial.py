"""A small store written, synced, read back and removed: what a disk and a codec do, measured where it matters."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numcodecs import blosc

from infl_cache.disk.codecs import CRC_BYTES, Codec
from infl_cache.disk.durable import disk_full_is_said
from infl_cache.disk.layout import ArrayLayout, Block
from infl_cache.disk.ledger import BlockRecord, FileRecord, Ledger
from infl_cache.disk.matrix import MatrixFile, create_matrix
from infl_cache.disk.reader import BlockReader
from infl_cache.disk.store import ENCODERS, Array, Store, create_store


@dataclass(frozen=True)
class Trial:
    """Bytes on the disk; seconds to make an empty store, to open it and read a column, to encode a block, to write and
    sync it, to commit it, and to read it (from the page cache).
    """

    n_bytes: int
    create_seconds: float
    look_seconds: float
    encode_seconds: float
    write_seconds: float
    commit_seconds: float
    read_seconds: float


def try_store(near: Path, layouts: Iterable[ArrayLayout], codec: Codec, data: Mapping[str, Array]) -> Trial:
    """Write one block of `data` next to where the run folder is, or will be; nothing is left behind."""
    parent = _there(near)
    layouts = tuple(layouts)
    with disk_full_is_said(parent), tempfile.TemporaryDirectory(prefix=".infl_cache-plan-", dir=parent) as folder:
        begun = time.perf_counter()
        create_store(Path(folder) / "trial.zarr", layouts, codec)
        created = time.perf_counter()
        store = Store(Path(folder) / "trial.zarr", layouts, "r+", codec)
        block = Block(0, 0, layouts[0].n_rows)
        started = time.perf_counter()
        chunks = store.encode_block(block, data)
        encoded = time.perf_counter()
        files = store.write_encoded(chunks)
        written = time.perf_counter()
        committed = _commit(Path(folder), block, files)
        look = time.perf_counter()
        Store(store.folder, layouts).read_block(block, [layouts[-1].path])
        looked = time.perf_counter() - look
        record = BlockRecord("trial", 0, 0, block.rows, "", 0, (), 0.0, 0.0, files)
        with closing(BlockReader(store, codec, {0: record})) as reader:
            again = time.perf_counter()
            reader.read(block, data)
            read = time.perf_counter()
    size = sum(file.size for file in files)
    return Trial(size, created - begun, looked, encoded - started, written - encoded, committed, read - again)


def try_codec(layouts: Iterable[ArrayLayout], codec: Codec, data: Mapping[str, Array]) -> tuple[int, float, float]:
    """Bytes that a block becomes, seconds to encode and to decode it by all cores; nothing is written."""
    encoded: list[tuple[bytes, Array]] = []
    parts = [np.ascontiguousarray(data[each.path].astype(each.dtype, copy=False)) for each in layouts]
    pieces = [piece for part in parts for piece in np.array_split(part, min(len(part), ENCODERS))]
    with ThreadPoolExecutor(ENCODERS) as pool:
        started = time.perf_counter()
        encoded = list(zip((body for body, _ in pool.map(codec.encode, pieces)), pieces, strict=True))
        between = time.perf_counter()
        if codec.name != "none":
            list(pool.map(lambda pair: blosc.decompress(pair[0], np.empty_like(pair[1])), encoded))
        seconds = (between - started, time.perf_counter() - between)
    return sum(len(body) + CRC_BYTES for body, _ in encoded), *seconds


def try_matrix(near: Path, rows: int, columns: int) -> float:
    """Seconds to write, sync and commit a tile of a matrix."""
    parent = _there(near)
    with disk_full_is_said(parent), tempfile.TemporaryDirectory(prefix=".infl_cache-plan-", dir=parent) as folder:
        path, block = Path(folder) / "trial.npy", Block(0, 0, rows)
        create_matrix(path, (rows, columns))
        with closing(MatrixFile(path, writable=True)) as matrix:
            values = np.ones((rows, columns), np.float32)
            started = time.perf_counter()
            matrix.write(0, 0, values)
            matrix.sync()
            seconds = time.perf_counter() - started
        return seconds + _commit(Path(folder), block, [FileRecord(path.name, values.nbytes, 0)])


def _commit(folder: Path, block: Block, files: Iterable[FileRecord]) -> float:
    """Seconds to make a block a fact."""
    with closing(Ledger(folder / "ledger.sqlite")) as ledger:
        record = BlockRecord("trial", block.index, block.start, block.stop, "", 0, (), 0.0, 0.0, tuple(files))
        started = time.perf_counter()
        ledger.commit(record)
        return time.perf_counter() - started


def free_bytes(near: Path) -> int:
    """Bytes free where the run folder is, or will be."""
    return shutil.disk_usage(_there(near)).free


def allocated_bytes(path: Path) -> int:
    """Bytes that a file takes of the disk, its holes left out; 0 if there is none."""
    return 512 * path.stat().st_blocks if path.exists() else 0


def _there(near: Path) -> Path:
    return next(folder for folder in (near.absolute(), *near.absolute().parents) if folder.is_dir())
