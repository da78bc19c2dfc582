"""A small store written, synced, read back and removed: what a disk and a codec do, measured where it matters."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infl_cache.disk.codecs import Codec
from infl_cache.disk.durable import disk_full_is_said
from infl_cache.disk.layout import ArrayLayout, Block
from infl_cache.disk.store import Array, Store, create_store


@dataclass(frozen=True)
class Trial:
    """Bytes on the disk; seconds to encode them, to write and sync them, and to read them (from the page cache)."""

    n_bytes: int
    encode_seconds: float
    write_seconds: float
    read_seconds: float


def try_store(near: Path, layouts: Iterable[ArrayLayout], codec: Codec, data: Mapping[str, Array]) -> Trial:
    """Write one block of `data` next to where the run folder is, or will be; nothing is left behind."""
    parent = _there(near)
    layouts = tuple(layouts)
    with disk_full_is_said(parent), tempfile.TemporaryDirectory(prefix=".infl_cache-plan-", dir=parent) as folder:
        create_store(Path(folder) / "trial.zarr", layouts, codec)
        store = Store(Path(folder) / "trial.zarr", layouts, "r+", codec)
        block = Block(0, 0, layouts[0].n_rows)
        started = time.perf_counter()
        chunks = store.encode_block(block, data)
        encoded = time.perf_counter()
        files = store.write_encoded(chunks)
        written = time.perf_counter()
        store.read_block(block)
        read = time.perf_counter()
    return Trial(sum(file.size for file in files), encoded - started, written - encoded, read - written)


def free_bytes(near: Path) -> int:
    """Bytes free where the run folder is, or will be."""
    return shutil.disk_usage(_there(near)).free


def _there(near: Path) -> Path:
    return next(folder for folder in (near.absolute(), *near.absolute().parents) if folder.is_dir())
