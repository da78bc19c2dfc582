"""The only door to zarr: create a store, write a block and sync it, read a block back.

Zarr makes the stores and reads them. Blocks are written by ourselves, whole chunk files with the bytes that zarr
would write: its own way, with more copies, takes 1.3 to 1.9 times as long (medians, scripts/bench_store.py).

Zarr v3 arrays, one chunk grid per array with whole chunk files per block, codecs blosc then
crc32c, NaN as fill value (a chunk that went missing must never look like a zero gradient).
Every chunk of a block has its file, also one of nothing but NaN.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from infl_cache.disk.codecs import CRC_BYTES, Codec, stored_checksum
from infl_cache.disk.direct import write_durably
from infl_cache.disk.durable import crc32c_of_file, sync_together
from infl_cache.disk.inside import leads_out
from infl_cache.disk.layout import ArrayLayout, Block, chunk_parts
from infl_cache.disk.ledger import FileRecord
from infl_cache.errors import DamagedStore

Array = NDArray[np.generic]
Stored: TypeAlias = "zarr.Array[Any]"
METADATA = "zarr.json"
# What may make bytes of numbers; of no other codec is anything read.
CODECS = {"bytes", "blosc", "crc32c"}
ENCODERS = os.cpu_count() or 1
# Waiting for the disk in one thread, the others go on.
WRITERS = 4
S = TypeVar("S")
T = TypeVar("T")


class EncodedChunk(NamedTuple):
    """One chunk file: array, file name, content and the checksum that ends it."""

    path: str
    key: str
    body: bytes
    checksum: bytes


class Store:
    """A zarr v3 group of arrays that share their rows; every write is a whole block."""

    def __init__(
        self, folder: Path, layouts: Iterable[ArrayLayout], mode: str = "r", codec: Codec | None = None
    ) -> None:
        self.folder = folder
        if mode == "r+" and codec is None:
            raise ValueError("expected the codec that the store was made with, to write into it")
        self._codec = codec
        self.layouts = {layout.path: layout for layout in layouts}
        # Where a block's way to the disk takes its time, on the clock; "write" includes the sync of each file.
        self.seconds = {"encode": 0.0, "write": 0.0, "sync": 0.0}
        self._arrays: dict[str, Stored] = {}
        with self._understood():
            for layout in self.layouts.values():
                _check_laid_out(folder, layout)

    def write_block(self, block: Block, data: Mapping[str, Array]) -> tuple[FileRecord, ...]:
        """Write the rows of `block` into every array; return once files and their names are on the disk."""
        return self.write_encoded(self.encode_block(block, data))

    def encode_block(self, block: Block, data: Mapping[str, Array]) -> list[EncodedChunk]:
        """The chunk files of `block`, in memory: what keeps processors busy, by all of them. `data` may then go."""
        if self._codec is None:
            raise ValueError(f"{self.folder} was opened read-only")
        for path, layout in self.layouts.items():
            if data[path].shape != (block.rows, *layout.row_shape):
                raise ValueError(f"{path}: expected rows {(block.rows, *layout.row_shape)}, found {data[path].shape}")
        parts = [
            (path, key, data[path][part])
            for path, layout in self.layouts.items()
            for key, part in chunk_parts(layout, block).items()
        ]
        # The largest first: no thread is left alone with it at the end.
        order = sorted(range(len(parts)), key=lambda index: -parts[index][2].nbytes)
        with self._timed("encode"):
            encoded = self._each_in_a_thread(self._encoded, [parts[index] for index in order], ENCODERS)
        return [chunk for _, chunk in sorted(zip(order, encoded, strict=True))]

    def write_encoded(self, chunks: Iterable[EncodedChunk]) -> tuple[FileRecord, ...]:
        """Write a block's chunk files: what waits for the disk. Returns once files and their names are on it."""
        with self._timed("write"):
            records = self._each_in_a_thread(self._written, tuple(chunks), WRITERS)
        with self._timed("sync"):
            sync_together({self.folder / path for path in self.layouts})
        return tuple(records)

    def _each_in_a_thread(self, work: Callable[[S], T], items: Sequence[S], most: int) -> list[T]:
        # Threads of their own also for a single item: outside the main thread Blosc is deterministic.
        with ThreadPoolExecutor(max(1, min(len(items), most))) as pool:
            return list(pool.map(work, items))

    def _encoded(self, part: tuple[str, str, Array]) -> EncodedChunk:
        path, key, values = part
        layout = self.layouts[path]
        assert self._codec is not None
        if values.shape != layout.chunks:
            whole = np.full(layout.chunks, _fill_value(layout), layout.dtype)
            whole[tuple(map(slice, values.shape))] = values
            values = whole
        return EncodedChunk(path, key, *self._codec.encode(values.astype(layout.dtype, copy=False)))

    def _written(self, chunk: EncodedChunk) -> FileRecord:
        file = self.folder / chunk.path / chunk.key
        write_durably(file, chunk.body, chunk.checksum)
        size = len(chunk.body) + len(chunk.checksum)
        return FileRecord(file.relative_to(self.folder.parent).as_posix(), size, stored_checksum(chunk.checksum))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def _array(self, path: str) -> Stored:
        """An array, opened by zarr when it is first read: that takes longer than to read a small one."""
        if path not in self._arrays:
            with self._understood():
                self._arrays[path] = zarr.open_array(self.folder / path, mode="r", zarr_format=3)
        return self._arrays[path]

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # metadata that nobody understands raise many kinds
            raise DamagedStore(
                f"{self.folder}: expected the arrays of the manifest's plan, found others"
                f" ({' '.join(str(error).split())[:160]}); restore {METADATA}, or start the stage over with --force"
            ) from error

    def read_block(self, block: Block, paths: Iterable[str] | None = None) -> dict[str, Array]:
        """The rows of `block` of the named arrays (all by default); the codec checks every byte.

        Raises `DamagedStore` that names the array and rows. Files are checked against the
        ledger by the caller (`run`), because a missing chunk would read as NaN in silence.
        """
        read = {}
        for path in self.layouts if paths is None else paths:
            array = self._array(path)
            try:
                read[path] = np.asarray(array[block.start : block.stop])
            except Exception as error:  # zarr and its codecs raise many kinds for bytes they cannot decode
                raise DamagedStore(
                    f"{self.folder / path}: rows {block.start} to {block.stop - 1} cannot be read"
                    f" ({' '.join(str(error).split())[:120]}); restore the file or start the stage over with --force"
                ) from error
            if len(read[path]) != block.rows:  # zarr cuts a slice that goes beyond its array, in silence
                raise DamagedStore(
                    f"{self.folder / path}: expected rows {block.start} to {block.stop - 1}, found"
                    f" {len(read[path])} of them; restore {METADATA}, or start the stage over with --force"
                )
        return read


def _check_laid_out(folder: Path, layout: ArrayLayout) -> None:
    """`ValueError` unless an array's rows have the shape, type and kinds of codecs laid out."""
    metadata = json.loads((folder / layout.path / METADATA).read_bytes())
    if metadata["node_type"] != "array":
        raise ValueError(f"{layout.path}: a group")
    shape, chunks = (
        tuple(each) for each in (metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"])
    )
    found = (shape[1:], chunks, metadata["data_type"])  # a store that grows may have fewer rows
    kinds = {codec["name"] for codec in metadata["codecs"]}
    if found != (layout.shape[1:], layout.chunks, np.dtype(layout.dtype).name) or not kinds <= CODECS:
        raise ValueError(f"{layout.path}: {metadata['data_type']} of shape {shape} in chunks of {chunks}")


def create_store(folder: Path, layouts: Iterable[ArrayLayout], codec: Codec) -> tuple[FileRecord, ...]:
    """Make an empty store on the disk (replacing a half-made one); return its metadata files as records."""
    shutil.rmtree(folder, ignore_errors=True)
    _lay_out(folder, layouts, codec)
    files = sorted(folder.rglob(METADATA))
    sync_together([folder.parent, *files, *(file.parent for file in files)])
    return tuple(record_of_file(folder.parent, file) for file in files)


def metadata_contents(layouts: Iterable[ArrayLayout], codec: Codec) -> dict[str, bytes]:
    """What the metadata files of a store hold, by their names in it: those that `create_store` writes."""
    kept: dict[str, Any] = {}
    _lay_out(zarr.storage.MemoryStore(kept), layouts, codec)
    return {name: buffer.to_bytes() for name, buffer in kept.items()}


def _lay_out(place: Path | zarr.storage.MemoryStore, layouts: Iterable[ArrayLayout], codec: Codec) -> None:
    """A zarr group and its empty arrays."""
    group = zarr.open_group(place, mode="w-", zarr_format=3)
    for layout in layouts:
        dtype = np.dtype(layout.dtype)
        group.create_array(
            layout.path,
            shape=layout.shape,
            chunks=layout.chunks,
            dtype=dtype,
            fill_value=_fill_value(layout),
            compressors=codec.pipeline(dtype.itemsize),
            filters=None,
            # One flat folder of chunk files an array: one folder to sync a block.
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=layout.axes or ("sample", *(f"axis{i}" for i in range(1, len(layout.shape)))),
            attributes=_attributes(layout),
        )


def _fill_value(layout: ArrayLayout) -> float | int:
    """What a missing chunk reads as: NaN, also in the bits of a bfloat16."""
    if layout.stands_for == "bfloat16":
        return 0x7FC0
    return float("nan") if np.dtype(layout.dtype).kind == "f" else layout.fill


def _attributes(layout: ArrayLayout) -> dict[str, Any]:
    """What a reader without this package must know of 16-bit rows."""
    if layout.stands_for == "bfloat16" or layout.dtype == "float16":
        kind = layout.stands_for or layout.dtype
        return {"element_type": kind, "scaled_by": f"2 ** {layout.path}_exponent, row by row"}
    return {}


def record_of_chunk(root: Path, file: Path) -> FileRecord:
    """Size and checksum of a chunk file; the checksum is the one that its codec wrote last."""
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - CRC_BYTES))
        return FileRecord(file.relative_to(root).as_posix(), size, stored_checksum(opened.read()))


def record_of_file(root: Path, file: Path) -> FileRecord:
    """Size and checksum of any other file."""
    return FileRecord(file.relative_to(root).as_posix(), file.stat().st_size, crc32c_of_file(file))


def check_file(root: Path, expected: FileRecord, recorder: Callable[[Path, Path], FileRecord], rows: str = "") -> None:
    """`DamagedStore` that names the file (and its rows) unless it has the size and checksum that were recorded."""
    file, remedy = root / expected.path, f"infl-cache verify {root} --repair makes it again, --force starts over"
    if leads_out(expected.path):
        raise DamagedStore(f"{root}: expected file names inside the folder, found {expected.path!r}")
    try:
        found = recorder(root, file)
    except FileNotFoundError:
        raise DamagedStore(f"{file}{rows}: expected {expected.size} bytes, found no file; {remedy}") from None
    except OSError as error:  # a folder of that name, a medium that fails
        raise DamagedStore(
            f"{file}{rows}: expected {expected.size} bytes, found what cannot be read ({error.strerror}); {remedy}"
        ) from error
    if found != expected:
        raise DamagedStore(
            f"{file}{rows}: expected {expected.size} bytes with checksum {expected.crc:08x},"
            f" found {found.size} with {found.crc:08x}; {remedy}"
        )
