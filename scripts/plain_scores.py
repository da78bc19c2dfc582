"""Products of s_test with gradients by plain means, beside stage 3: from memory, from a memory map, by zarr's slices.

And the halves of stage 3 alone: decoding every chunk of a store, and multiplying what is in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs.blosc import Blosc
from torch import Tensor

from infl_cache import Run
from infl_cache.maths.narrow import widened

# Bytes of plain rows that are multiplied at once, in memory and from a memory map.
PIECE, MAPPED = 2 * 10**9, 64 * 10**6
# Shapes (m, k, n) of which the fastest product says what the machine can do.
SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (1000, 32_768, 1000), (1000, 262_144, 500))
QUICK_SHAPES = ((256, 256, 256), (512, 512, 512))
CHECKSUM = 4

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The first `count` gradients of a run as plain float32 rows, and the s_test rows that they are multiplied with."""

    run: Run
    s_test: Tensor
    count: int

    def pieces(self, n_bytes: int = PIECE) -> Iterator[Tensor]:
        """The rows, so many bytes at once; each piece is made when it is asked for."""
        size = max(1, n_bytes // (4 * self.s_test.shape[1]))
        for start in range(0, self.count, size):
            rows = self.run.grad_z(slice(start, min(start + size, self.count)))
            yield torch.from_numpy(np.asarray(rows, np.float32))


def from_left(s_test: Tensor, rows: Tensor) -> Tensor:
    """`(M, P) @ (P, B)`."""
    return torch.mm(s_test, rows.T)


def from_right(s_test: Tensor, rows: Tensor) -> Tensor:
    """`((B, P) @ (P, M))^T`: the same, but not for the library that multiplies."""
    return torch.mm(rows, s_test.T).T


def faster(rows: Rows) -> Multiply:
    """The order in which `torch.mm` multiplies a first piece faster."""
    piece = next(rows.pieces(PIECE // 4))
    ways: dict[Multiply, float] = {}
    for way in (from_left, from_right):
        way(rows.s_test, piece)
        ways[way] = elapsed(lambda way=way: way(rows.s_test, piece))
    return min(ways, key=ways.__getitem__)


def elapsed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_memory(rows: Rows, multiply: Multiply) -> float:
    """Seconds of `torch.mm` alone: each piece is in memory before the clock runs."""
    return sum(elapsed(lambda piece=piece: multiply(rows.s_test, piece)) for piece in rows.pieces())


def write_map(rows: Rows, file: Path) -> None:
    """All rows behind one another in a file without a header."""
    with file.open("wb") as opened:
        for piece in rows.pieces():
            piece.numpy().tofile(opened)


def from_map(file: Path, s_test: Tensor, count: int, multiply: Multiply) -> Tensor:
    """`s_test @ rows^T` (M, count) with float32 rows in a memory map, a few at once."""
    # Copy on write, which nobody does: torch takes no array that cannot be written.
    table = np.memmap(file, np.float32, "c", shape=(count, s_test.shape[1]))
    size = max(1, MAPPED // (4 * s_test.shape[1]))
    found = torch.empty(len(s_test), count)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        found[:, part] = multiply(s_test, torch.from_numpy(table[part]))
    return found


def by_slices(folder: Path, s_test: Tensor, multiply: Multiply) -> Tensor:
    """`s_test @ dense^T` (M, n_train) with slices of the array `dense`, a row of chunks each, as zarr gives them."""
    group = zarr.open_group(folder, mode="r")
    dense: Any = group["dense"]
    exponents: Any = group["dense_exponent"] if dense.dtype != np.float32 else None
    found = torch.empty(len(s_test), dense.shape[0])
    for start in range(0, dense.shape[0], dense.chunks[0]):
        part = slice(start, min(start + dense.chunks[0], dense.shape[0]))
        rows = torch.from_numpy(np.asarray(dense[part]))
        if exponents is not None:
            bits = rows.view(torch.int16).view(torch.bfloat16)
            rows = widened(bits, torch.from_numpy(np.asarray(exponents[part])), torch.float32)
        found[:, part] = multiply(s_test, rows)
    return found


def decoded(folder: Path) -> int:
    """Read and decode every chunk file of a store by all cores, into buffers that are used again; bytes decoded."""
    own = threading.local()

    def decode(work: tuple[Path, int, bool]) -> int:
        file, size, packed = work
        if not hasattr(own, "room") or len(own.room) < size:
            own.room = bytearray(size)
        whole = memoryview(own.room)[:size]
        if not packed:
            with file.open("rb", buffering=0) as opened:
                return opened.readinto(whole)
        Blosc().decode(memoryview(file.read_bytes())[:-CHECKSUM], out=whole)
        return size

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return sum(pool.map(decode, list(chunk_files(folder))))


def chunk_files(folder: Path) -> Iterator[tuple[Path, int, bool]]:
    """Every chunk file of the gradients, its size when decoded, and whether Blosc packed it."""
    for described in sorted(folder.rglob("zarr.json")):
        about = json.loads(described.read_text())
        if about["node_type"] != "array" or described.parent.name in ("loss", "target", "digest"):
            continue
        size = math.prod(about["chunk_grid"]["configuration"]["chunk_shape"])
        packed = any(codec["name"] == "blosc" for codec in about["codecs"])
        for file in sorted(described.parent.glob("c.*")):
            yield file, size * np.dtype(about["data_type"]).itemsize, packed


def machine_rate(quick: bool) -> float:
    """GFLOP/s of the fastest of a few float32 products in memory, each the best of three."""
    best = 0.0
    for m, k, n in QUICK_SHAPES if quick else SHAPES:
        left, right = torch.randn(m, k), torch.randn(n, k)
        torch.mm(left, right.T)
        seconds = min(elapsed(lambda left=left, right=right: torch.mm(left, right.T)) for _ in range(3))
        best = max(best, 2e-9 * m * k * n / seconds)
    return best
