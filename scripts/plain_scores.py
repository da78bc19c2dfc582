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
from collections.abc import Callable, Iterator, Sequence
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
from infl_cache.maths.product import product

# Bytes of plain rows that are made at once, that stay in memory, and that are taken from a memory map at once.
GROUP, HELD, MAPPED = 64 * 10**6, 10**9, 64 * 10**6
# Shapes (m, k, n) of which the fastest product says what the machine can do.
SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (1000, 32_768, 1000))
QUICK_SHAPES = ((256, 256, 256), (512, 512, 512))
CHECKSUM, HEADER = 4, 4096

Multiply = Callable[[Tensor, Tensor], Tensor]


def from_left(s_test: Tensor, rows: Tensor) -> Tensor:
    """`(M, P) @ (P, B)`."""
    return torch.mm(s_test, rows.T)


def from_right(s_test: Tensor, rows: Tensor) -> Tensor:
    """`((B, P) @ (P, M))^T`: the same, but not for the library that multiplies."""
    return torch.mm(rows, s_test.T).T


# `torch.mm` with the operands either way round; and the product of stage 3 as well.
OF_TORCH: tuple[Multiply, ...] = (from_left, from_right)
ANY: tuple[Multiply, ...] = (*OF_TORCH, product)


def elapsed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def faster(ways: Sequence[Multiply], s_test: Tensor, rows: Tensor) -> Multiply:
    """The way that multiplies a half of the rows fastest, the better of two calls after a first one."""
    if len(ways) == 1:
        return ways[0]
    half, seconds = rows[: max(1, len(rows) // 2)], {}
    for way in ways:
        way(s_test, half)
        seconds[way] = min(elapsed(lambda way=way: way(s_test, half)) for _ in range(2))
    return min(seconds, key=seconds.__getitem__)


def fitting(work: Callable[[int], float], most: int, seconds: float) -> int:
    """How many samples, at most `most`, take so many seconds, by the second of two turns over a twentieth of them."""
    few = max(1, most // 20)
    work(few)
    return max(few, min(most, int(few * seconds / work(few))))


def write_map(run: Run, count: int, file: Path) -> None:
    """The first `count` gradients of a run as float32 rows behind one another, in a file without a header."""
    # Not all at once, for fresh memory can be slow to get; nor a few, for every call reads whole chunks.
    size = max(1, GROUP // (4 * run.grad_z(0).size))
    with file.open("wb") as opened:
        for start in range(0, count, size):
            np.asarray(run.grad_z(slice(start, min(start + size, count))), np.float32).tofile(opened)


def held(file: Path, n_params: int, n_bytes: int = HELD) -> Tensor:
    """The first rows (B, n_params) of such a file in memory: all of them, or so many bytes."""
    rows = np.fromfile(file, np.float32, count=max(1, n_bytes // (4 * n_params)) * n_params)
    return torch.from_numpy(rows).view(-1, n_params)


def in_memory(rows: Tensor, s_test: Tensor, multiply: Multiply, samples: int) -> float:
    """Seconds of multiplying so many rows in memory; where there are fewer, they are multiplied again."""
    parts = [rows[: samples - start] for start in range(0, samples, len(rows))]

    def work() -> None:
        for part in parts:
            multiply(s_test, part)

    return elapsed(work)


def from_map(file: Path, s_test: Tensor, multiply: Multiply, samples: int) -> Tensor:
    """`s_test @ rows^T` (M, samples) with the first float32 rows of a memory map, a few at once."""
    # Copy on write, which nobody does: torch takes no array that cannot be written.
    table = np.memmap(file, np.float32, "c", shape=(samples, s_test.shape[1]))
    size = max(1, MAPPED // (4 * s_test.shape[1]))
    found = torch.empty(len(s_test), samples)
    for start in range(0, samples, size):
        part = slice(start, min(start + size, samples))
        found[:, part] = multiply(s_test, torch.from_numpy(table[part]))
    return found


def by_slices(folder: Path, s_test: Tensor, multiply: Multiply, samples: int) -> Tensor:
    """`s_test @ dense^T` (M, samples) with slices of the array `dense`, a row of chunks each, as zarr gives them."""
    group = zarr.open_group(folder, mode="r")
    dense: Any = group["dense"]
    exponents: Any = group["dense_exponent"] if dense.dtype != np.float32 else None
    found = torch.empty(len(s_test), samples)
    for start in range(0, samples, dense.chunks[0]):
        part = slice(start, min(start + dense.chunks[0], samples))
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
            # A chunk that does not get smaller has a header more than its rows.
            own.packed = bytearray(size + HEADER + CHECKSUM)
        whole = memoryview(own.room)[:size]
        with file.open("rb", buffering=0) as opened:
            if not packed:
                return opened.readinto(whole)
            read = opened.readinto(own.packed)
        Blosc().decode(memoryview(own.packed)[: read - CHECKSUM], out=whole)
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


@dataclasses.dataclass(frozen=True)
class Fastest:
    """The product of float32 matrices in memory that this machine does fastest: a turn gives its GFLOP/s."""

    multiply: Multiply
    left: Tensor
    right: Tensor

    def __call__(self) -> float:
        """The best of three."""
        seconds = min(elapsed(lambda: self.multiply(self.left, self.right)) for _ in range(3))
        return 2e-9 * self.left.numel() * len(self.right) / seconds


def fastest_product(quick: bool) -> Fastest:
    """The fastest of a few shapes, by `torch.mm` or by what multiplies faster."""
    found: dict[float, Fastest] = {}
    for m, k, n in QUICK_SHAPES if quick else SHAPES:
        left, right = torch.randn(m, k), torch.randn(n, k)
        for way in (from_left, product):
            way(left, right)
            made = Fastest(way, left, right)
            found[made()] = made
    return found[max(found)]
