"""The only door to zarr: create a store, write a block and sync it, read a block back.

Zarr v3 arrays, one chunk grid per array with whole chunk files per block, codecs blosc then
crc32c, NaN as fill value (a chunk that went missing must never look like a zero gradient),
`write_empty_chunks` on (or an all-NaN chunk would leave no file).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from infl_cache.disk.codecs import CRC_BYTES, Codec, stored_checksum
from infl_cache.disk.durable import crc32c_of_file, sync_file, sync_folders
from infl_cache.disk.layout import ArrayLayout, Block, chunk_keys
from infl_cache.disk.ledger import FileRecord
from infl_cache.errors import DamagedStore

Array = NDArray[np.generic]
METADATA = "zarr.json"


class Store:
    """A zarr v3 group of arrays that share their rows; every write is a whole block."""

    def __init__(self, folder: Path, layouts: Iterable[ArrayLayout], mode: str = "r") -> None:
        self.folder = folder
        self._writable = mode == "r+"
        self.layouts = {layout.path: layout for layout in layouts}
        group = zarr.open_group(folder, mode="r+" if mode == "r+" else "r", zarr_format=3)
        # Where writing spends its time.
        self.seconds = {"encode and write": 0.0, "sync": 0.0}
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
        started = time.perf_counter()
        for path, array in self._arrays.items():
            # What a killed writer left is not to be merged with: zarr reads an edge chunk before it writes it.
            for key in chunk_keys(self.layouts[path], block):
                (self.folder / path / key).unlink(missing_ok=True)
            array[block.start : block.stop] = data[path]
        self.seconds["encode and write"] += time.perf_counter() - started
        started = time.perf_counter()
        records, folders = [], set()
        for path, layout in self.layouts.items():
            for key in chunk_keys(layout, block):
                file = self.folder / path / key
                sync_file(file)
                folders.add(file.parent)
                records.append(record_of_chunk(self.folder.parent, file))
        sync_folders(folders)
        self.seconds["sync"] += time.perf_counter() - started
        return tuple(records)

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
