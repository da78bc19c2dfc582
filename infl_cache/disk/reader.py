"""Committed blocks read as fast as the machine goes: chunk files decoded by all cores into memory that is used again.

Zarr reads the same files with a new buffer for every step on the way; `Store.read_block` is the slow twin, and what
reads single rows. Nothing is decoded before size and checksum of its file are those of the ledger. Chunks that are
not compressed are read, too: to map them took 1.3 times as long, the time of page faults (a product of 20 rows with
8 GB of plain rows in the page cache, scripts/bench_influence.py).
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from infl_cache.disk.codecs import CRC_BYTES, Codec, stored_checksum
from infl_cache.disk.layout import ArrayLayout, Block, chunk_parts
from infl_cache.disk.ledger import BlockRecord, FileRecord
from infl_cache.disk.pieces import Piece, all_columns, cut_to, overlaps, piece_of
from infl_cache.disk.store import Array, Store
from infl_cache.errors import DamagedStore

DECODERS = os.cpu_count() or 1
# Where Blosc's header says how many bytes come out.
_SIZE = slice(4, 8)
Bytes = NDArray[np.uint8]
Result = TypeVar("Result")
Work = Callable[[], object]
# A chunk's file, and which part of a block it holds.
Placed = tuple[FileRecord, tuple[slice, ...]]
# Of which arrays of plain rows only some columns are wanted, and which.
Columns = Mapping[str, slice]
EVERY: Columns = {}


def plain_room(size: int) -> Bytes:
    """Ordinary memory of so many bytes."""
    return np.empty(size, np.uint8)


class BlockReader:
    """Reads whole blocks; what it returned is overwritten by the `slots`-th reading after it.

    `room` gives the memory (of a kind that a GPU copies fast, say), `records` the committed blocks; each of the
    `threads` first does `begin`.
    """

    def __init__(
        self, store: Store, codec: Codec, records: Mapping[int, BlockRecord],
        room: Callable[[int], Bytes] = plain_room, slots: int = 1, threads: int = DECODERS,
        begin: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._codec, self._records, self._room = store, codec, records, room
        self._slots: list[dict[str, Bytes]] = [{} for _ in range(slots)]
        self._next = 0
        self._local = threading.local()
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, initializer=begin)
        # All threads begin now, and not in the middle of something.
        every = threading.Barrier(threads)
        list(self._pool.map(lambda _: every.wait(), range(threads)))

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()

    def read(self, block: Block, paths: Iterable[str], columns: Columns = EVERY) -> dict[str, list[Piece]]:
        """The block's rows of each array in pieces that are whole chunks, or one piece where these join without a copy.

        Of arrays of plain rows that `columns` names only the chunks that hold some of these columns, cut to them.
        Raises `DamagedStore` that names the file unless it has the size and checksum that were committed.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        found: dict[str, list[Piece]] = {}
        work: list[Work] = []
        for path in paths:
            at = columns.get(path)
            found[path] = self._pieces(block, path, self._parts(block, path, at), at, slot, work)
        self._do(work)
        return found

    def each(self, block: Block, path: str, columns: slice | None, then: Callable[[Piece], Result]) -> Iterator[Result]:
        """What `then` makes of each chunk of an array of plain rows, in order.

        The thread that decoded a chunk also does `then`, while its cache holds it; nothing of the piece may be kept.
        No more results wait than there are threads: they may be large.
        """

        def done(placed: Placed) -> Result:
            slot: dict[str, Bytes] = self._local.__dict__.setdefault("slot", {})
            work: list[Work] = []
            (piece,) = self._pieces(block, path, [placed], columns, slot, work)
            for step in work:
                step()
            return then(piece)

        begun: deque[Future[Result]] = deque()
        for placed in self._parts(block, path, columns):
            begun.append(self._pool.submit(done, placed))
            if len(begun) > self._threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def _parts(self, block: Block, path: str, columns: slice | None) -> list[Placed]:
        """The files of the chunks that are wanted, and which part of the block each is."""
        files = self._files(block)
        return [
            (self._named(files, block, path, key), part)
            for key, part in chunk_parts(self._store.layouts[path], block).items()
            if overlaps(part, columns)
        ]

    def _pieces(
        self, block: Block, path: str, parts: list[Placed], columns: slice | None, slot: dict[str, Bytes],
        work: list[Work],
    ) -> list[Piece]:  # fmt: skip
        """Pieces that are filled once the `work` is done."""
        layout = self._store.layouts[path]
        if self._codec.name == "none" and (layout.plain or layout.chunk_row_shape == layout.row_shape):
            pieces = self._as_they_are(layout, block, parts, slot, work)
        elif layout.plain:
            pieces = self._one_by_one(layout, block, parts, slot, work)
        else:
            pieces = [self._joined(layout, block, parts, slot, work)]
        return pieces if columns is None else [cut_to(each, columns) for each in pieces]

    def _do(self, work: list[Work]) -> None:
        for _ in self._pool.map(lambda each: each(), work):
            pass  # an error of a thread is raised here

    def expect(self, block: Block, paths: Iterable[str], columns: Columns = EVERY) -> None:
        """Ask the system to fetch what will be read next; returns at once."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        files = self._files(block)
        for path in paths:
            layout = self._store.layouts[path]
            for key, part in chunk_parts(layout, block).items():
                record = files.get(f"{self._store.folder.name}/{path}/{key}")
                if record is not None and overlaps(part, columns.get(path)):
                    self._fetch(record)

    def _fetch(self, record: FileRecord) -> None:
        try:
            descriptor = os.open(self._file(record), os.O_RDONLY)
        except OSError:
            return  # who reads it will say so
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def _files(self, block: Block) -> dict[str, FileRecord]:
        return {record.path: record for record in self._records[block.index].files}

    def _file(self, record: FileRecord) -> Path:
        return self._store.folder.parent / record.path

    def _named(self, files: Mapping[str, FileRecord], block: Block, path: str, key: str) -> FileRecord:
        """The record of a chunk; its name is made of ours, never of what was read."""
        name = f"{self._store.folder.name}/{path}/{key}"
        if name not in files:
            raise DamagedStore(
                f"{self._store.folder / path}: expected {key} (rows {block.start} to {block.stop - 1}) in the ledger,"
                " found no such file; start the stage over with --force"
            )
        return files[name]

    def _joined(
        self, layout: ArrayLayout, block: Block, parts: list[Placed],
        slot: dict[str, Bytes], work: list[Work],
    ) -> Piece:  # fmt: skip
        """Room for the block's rows, to be filled by `work`; a chunk of whole rows is decoded where it belongs."""
        rows = -(-block.rows // layout.chunk_rows) * layout.chunk_rows
        whole = self._in_slot(slot, layout, (rows, *layout.row_shape))
        for record, part in parts:
            if layout.chunk_row_shape == layout.row_shape:
                target = whole[part[0].start : part[0].start + layout.chunk_rows]
                work.append(partial(self._decode, record, block, target))
            else:
                work.append(partial(self._put, record, block, layout, whole[part]))
        return Piece(slice(0, block.rows), all_columns(layout), whole[: block.rows])

    def _one_by_one(
        self, layout: ArrayLayout, block: Block, parts: list[Placed],
        slot: dict[str, Bytes], work: list[Work],
    ) -> list[Piece]:  # fmt: skip
        """Room for each chunk, to be filled by `work`: columns of plain rows need not join."""
        room, pieces = self._in_slot(slot, layout, (len(parts), *layout.chunks)), []
        for target, (record, part) in zip(room, parts, strict=True):
            work.append(partial(self._decode, record, block, target))
            pieces.append(piece_of(part, target))
        return pieces

    def _in_slot(self, slot: dict[str, Bytes], layout: ArrayLayout, shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * np.dtype(layout.dtype).itemsize
        if len(slot.get(layout.path, ())) < size:
            slot[layout.path] = self._room(size)
        return slot[layout.path][:size].view(layout.dtype).reshape(shape)

    def _put(self, record: FileRecord, block: Block, layout: ArrayLayout, target: Array) -> None:
        """Decode a chunk that holds a part of its rows, the padding at their end left out."""
        chunk = np.empty(layout.chunks, layout.dtype)
        self._decode(record, block, chunk)
        target[...] = chunk[tuple(map(slice, target.shape))]

    def _decode(self, record: FileRecord, block: Block, target: Array) -> None:
        body = self._checked(record, block, self._content(record, block))
        if self._codec.name == "none":
            target.reshape(-1).view(np.uint8)[...] = body
            return
        if len(body) < _SIZE.stop or int.from_bytes(body[_SIZE].tobytes(), "little") != target.nbytes:
            raise self._damaged(record, block, f"{target.nbytes} bytes in it", "another number")
        blosc.decompress(body, target)

    def _as_they_are(
        self, layout: ArrayLayout, block: Block, parts: list[Placed],
        slot: dict[str, Bytes], work: list[Work],
    ) -> list[Piece]:  # fmt: skip
        """The chunks as they are in their files, each in memory of its own, to be read by `work`."""
        expected, found = math.prod(layout.chunks) * np.dtype(layout.dtype).itemsize, []
        length = -(-(expected + CRC_BYTES + 1) // 64) * 64
        if len(slot.get(layout.path, ())) < len(parts) * length:
            slot[layout.path] = self._room(len(parts) * length)
        for index, (record, part) in enumerate(parts):
            if record.size != expected + CRC_BYTES:
                raise self._damaged(record, block, f"{expected + CRC_BYTES} bytes", f"{record.size} in the ledger")
            room = slot[layout.path][index * length : (index + 1) * length]
            work.append(partial(self._read_checked, record, block, room))
            found.append(piece_of(part, room[:expected].view(layout.dtype).reshape(layout.chunks)))
        return found

    def _read_checked(self, record: FileRecord, block: Block, room: Bytes) -> None:
        self._checked(record, block, self._filled(record, block, room))

    def _content(self, record: FileRecord, block: Block) -> Bytes:
        """What the file holds, in memory of this thread that the next file overwrites."""
        if len(getattr(self._local, "bytes", ())) < record.size + 1:
            self._local.bytes = np.empty(record.size + 1, np.uint8)
        return self._filled(record, block, self._local.bytes)

    def _filled(self, record: FileRecord, block: Block, room: Bytes) -> Bytes:
        """`room` as far as the file fills it, one byte more than it should at most."""
        filled = 0
        try:
            with open(self._file(record), "rb", buffering=0) as file:
                while count := file.readinto(room[filled : record.size + 1].data):
                    filled += count
        except OSError as error:
            raise self._damaged(record, block, f"{record.size} bytes", f"none ({error.strerror})") from error
        return room[:filled]

    def _checked(self, record: FileRecord, block: Block, content: Bytes) -> Bytes:
        """The content without its checksum, once it is known to be what was committed."""
        body = content[:-CRC_BYTES]
        crc = google_crc32c.value(cast(bytes, body))
        kept = stored_checksum(content[-CRC_BYTES:].tobytes())
        if not len(content) == record.size >= CRC_BYTES or not crc == kept == record.crc:
            expected = f"{record.size} bytes with checksum {record.crc:08x}"
            raise self._damaged(record, block, expected, f"{len(content)} with {crc:08x}")
        return body

    def _damaged(self, record: FileRecord, block: Block, expected: str, found: str) -> DamagedStore:
        return DamagedStore(
            f"{self._file(record)} (rows {block.start} to {block.stop - 1}): expected {expected}, found {found};"
            " restore the file, or --force starts the stage over"
        )
