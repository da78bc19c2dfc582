"""The only door to zarr: create a store, write a block and sync it, read a block back.

Zarr makes the stores and reads them. Blocks are written by ourselves, whole chunk files with the bytes that zarr
would write: its own way takes three times as long, in copies.

Zarr v3 arrays, one chunk grid per array with whole chunk files per block, codecs blosc then
crc32c, NaN as fill value (a chunk that went missing must never look like a zero gradient),
`write_empty_chunks` on (or an all-NaN chunk would leave no file).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from infl_cache.disk.codecs import CRC_BYTES, Codec, stored_checksum
from infl_cache.disk.direct import write_durably
from infl_cache.disk.durable import crc32c_of_file, sync_file, sync_folders
from infl_cache.disk.layout import ArrayLayout, Block, chunk_parts
from infl_cache.disk.ledger import FileRecord
from infl_cache.errors import DamagedStore

Array = NDArray[np.generic]
METADATA = "zarr.json"
# Threads that encode and write one block: waiting for the disk in one, the others go on.
WRITERS = max(2, min(8, os.cpu_count() or 1))


class Store:
    """A zarr v3 group of arrays that share their rows; every write is a whole block."""

    def __init__(
        self, folder: Path, layouts: Iterable[ArrayLayout], mode: str = "r", codec: Codec | None = None
    ) -> None:
        self.folder = folder
        self._codec = codec or Codec("lz4", 5)
        self._lock = threading.Lock()
        self._writable = mode == "r+"
        self.layouts = {layout.path: layout for layout in layouts}
        group = zarr.open_group(folder, mode="r+" if mode == "r+" else "r", zarr_format=3)
        # Where writing spends its time, summed over threads; "write" includes the sync of each file.
        self.seconds = {"encode": 0.0, "write": 0.0, "sync": 0.0}
        self._arrays: dict[str, zarr.Array] = {}  # type: ignore[type-arg]
        for path in self.layouts:
            array = group[path]
            if not isinstance(array, zarr.Array):
                raise DamagedStore(f"{folder / path}: expected a zarr array, found a group")
            # A run-time setting that zarr does not store: it must be set at every opening.
            self._arrays[path] = array.with_config({"write_empty_chunks": True})

    def write_block(self, block: Block, data: Mapping[str, Array]) -> tuple[FileRecord, ...]:
        """Write the rows of `block` into every array; return once files and their names are on the disk."""
        if not self._writable:
            raise ValueError(f"{self.folder} was opened read-only")
        for path, layout in self.layouts.items():
            if data[path].shape != (block.rows, *layout.row_shape):
                raise ValueError(f"{path}: expected rows {(block.rows, *layout.row_shape)}, found {data[path].shape}")
        parts = [
            (path, key, data[path][part])
            for path, layout in self.layouts.items()
            for key, part in chunk_parts(layout, block).items()
        ]
        # Threads of their own also when there is one chunk: outside the main thread Blosc is deterministic.
        with ThreadPoolExecutor(min(len(parts), WRITERS)) as pool:
            records = tuple(pool.map(self._write_chunk, parts))
        started = time.perf_counter()
        sync_folders({self.folder / path for path in self.layouts})
        self._count("sync", started)
        return records

    def _write_chunk(self, part: tuple[str, str, Array]) -> FileRecord:
        """Encode and write one chunk file; return once its content is on the disk (its name not yet)."""
        path, key, values = part
        layout, file = self.layouts[path], self.folder / path / key
        started = time.perf_counter()
        if values.shape != layout.chunks:
            whole = np.full(layout.chunks, _fill_value(layout), layout.dtype)
            whole[tuple(map(slice, values.shape))] = values
            values = whole
        if values.dtype != np.dtype(layout.dtype):
            values = values.astype(layout.dtype)
        body, checksum = self._codec.encode(values)
        started = self._count("encode", started)
        write_durably(file, body, checksum)
        self._count("write", started)
        size = len(body) + len(checksum)
        return FileRecord(file.relative_to(self.folder.parent).as_posix(), size, stored_checksum(checksum))

    def _count(self, name: str, started: float) -> float:
        """Add the seconds since `started`; return the time now."""
        now = time.perf_counter()
        with self._lock:
            self.seconds[name] += now - started
        return now

    def read_block(self, block: Block, paths: Iterable[str] | None = None) -> dict[str, Array]:
        """The rows of `block` of the named arrays (all by default); the codec checks every byte.

        Raises `DamagedStore` that names the array and rows. Files are checked against the
        ledger by the caller (`run`), because a missing chunk would read as NaN in silence.
        """
        read = {}
        for path in self._arrays if paths is None else paths:
            try:
                read[path] = np.asarray(self._arrays[path][block.start : block.stop])
            except Exception as error:  # zarr and its codecs raise many kinds for bytes they cannot decode
                raise DamagedStore(
                    f"{self.folder / path}: rows {block.start} to {block.stop - 1} cannot be read"
                    f" ({' '.join(str(error).split())[:120]}); restore the file or start the stage over with --force"
                ) from error
        return read


def create_store(folder: Path, layouts: Iterable[ArrayLayout], codec: Codec) -> tuple[FileRecord, ...]:
    """Make an empty store on the disk (replacing a half-made one); return its metadata files as records."""
    layouts = tuple(layouts)
    shutil.rmtree(folder, ignore_errors=True)
    group = zarr.open_group(folder, mode="w-", zarr_format=3)
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
            dimension_names=("sample", *(f"axis{i}" for i in range(1, len(layout.shape)))),
            config={"write_empty_chunks": True},
            attributes=_attributes(layout),
        )
    files = sorted(folder.rglob(METADATA))
    for file in files:
        sync_file(file)
    sync_folders([folder.parent, *(file.parent for file in files)])
    return tuple(record_of_file(folder.parent, file) for file in files)


def _fill_value(layout: ArrayLayout) -> float | int:
    """What a missing chunk reads as: NaN, also in the bits of a bfloat16."""
    if layout.stands_for == "bfloat16":
        return 0x7FC0
    return float("nan") if np.dtype(layout.dtype).kind == "f" else 0


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
