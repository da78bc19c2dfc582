"""Small pictures as PNG files in memory, by zlib alone: 8 bits a colour, grey or RGB."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of the format: bits a colour; the colour types of (H, W) and (H, W, 3); the filter "difference to the row above".
BITS, GREY, RGB, UP = 8, 0, 2, 2


def png(picture: NDArray[np.uint8]) -> bytes:
    """The PNG file of a picture (H, W) or (H, W, 3).

    >>> png(np.zeros((2, 3), np.uint8))[:8] == SIGNATURE
    True
    """
    height, width = picture.shape[:2]
    rows = np.ascontiguousarray(picture).reshape(height, -1)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.concatenate([np.full((height, 1), UP, np.uint8), rows - above], axis=1)
    header = struct.pack(">IIBBBBB", width, height, BITS, GREY if picture.ndim == 2 else RGB, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    return SIGNATURE + b"".join(_part(*each) for each in parts)


def _part(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def shrunk(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture whose longer side is at most `side`: each pixel the mean of those it stands for.

    >>> shrunk(np.array([[0, 10], [20, 30]], np.uint8), 1)
    array([[15]], dtype=uint8)
    """
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    mean = picture.astype(np.float64)
    for axis, length in enumerate((height, width)):
        starts = np.linspace(0, length, max(1, round(length * scale)), endpoint=False).astype(np.int64)
        counts = np.diff(starts, append=length).reshape((-1, *[1] * (mean.ndim - 1)))
        mean = np.moveaxis(np.add.reduceat(np.moveaxis(mean, axis, 0), starts, axis=0) / counts, 0, axis)
    found: NDArray[np.uint8] = np.round(mean).astype(np.uint8)
    return found
