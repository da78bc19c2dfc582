"""One file that holds the state of an iteration: named arrays, what they belong to, and a checksum over all of it.

Layout: `MAGIC`, the length of the header (8 bytes, little endian), the header (JSON), the arrays one after the other,
CRC-32C of everything before it (4 bytes). It is replaced whole, and nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.direct import write_durably
from infl_cache.disk.durable import sync_file
from infl_cache.errors import DamagedStore

MAGIC = b"infl_cache state 1\n"
MAX_HEADER_BYTES = 1 << 20
DTYPES = ("float32", "float64", "int32", "int64", "uint8", "bool")
PIECE = 1 << 22

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Header:
    """What a state belongs to (`identity`), what is said of it (`facts`), and how its arrays lie in the file."""

    identity: dict[str, Any]
    facts: dict[str, Any]
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Size of the whole file."""
        return self.offset + sum(_n_bytes(dtype, shape) for _, dtype, shape in self.arrays) + 4


def write_state(path: Path, identity: Mapping[str, Any], facts: Mapping[str, Any], arrays: Arrays) -> int:
    """Replace the state in `path`, atomically and durably; return the bytes written.

    Raises `ValueError` for an array of another type than `DTYPES`.
    """
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, found {array.dtype}")
    described = [[name, array.dtype.name, list(array.shape)] for name, array in plain.items()]
    header = json.dumps({"identity": identity, "facts": facts, "arrays": described}, sort_keys=True).encode()
    bodies = [array.reshape(-1).view(np.uint8).data for array in plain.values() if array.nbytes]
    parts = [MAGIC + struct.pack("<Q", len(header)) + header, *bodies]
    crc = 0
    for part in parts:
        for start in range(0, len(part), PIECE):
            crc = google_crc32c.extend(crc, bytes(part[start : start + PIECE]))
    write_durably(path, *parts, struct.pack("<I", crc))  # type: ignore[arg-type]
    sync_file(path.parent)
    return sum(map(len, parts)) + 4


def read_header(path: Path) -> Header | None:
    """What the file says it holds, or None where there is none; `DamagedStore` if that cannot be understood.

    The checksum is not compared: good enough to be shown, not to be gone on with.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC) + 8)
            if start[: len(MAGIC)] != MAGIC:
                raise ValueError("no such file of this version")
            (length,) = struct.unpack("<Q", start[len(MAGIC) :])
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            content = json.loads(file.read(length))
            size = file.seek(0, os.SEEK_END)
        arrays = tuple((str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in content["arrays"])
        header = Header(dict(content["identity"]), dict(content["facts"]), arrays, len(start) + length)
        if any(dtype not in DTYPES or min(shape, default=0) < 0 for _, dtype, shape in arrays):
            raise ValueError("arrays of an unknown kind")
        if size != header.n_bytes:
            raise ValueError(f"expected {header.n_bytes} bytes, found {size}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise DamagedStore(f"{path}: expected the state of an iteration, found a damaged file ({error})") from error
    return header


def read_state(path: Path, header: Header) -> dict[str, NDArray[Any]]:
    """The arrays of the file whose header this is; `DamagedStore` unless every byte is as it was written."""
    found: dict[str, NDArray[Any]] = {}
    try:
        with open(path, "rb") as file:
            crc = google_crc32c.extend(0, file.read(header.offset))
            for name, dtype, shape in header.arrays:
                array = np.empty(_n_bytes(dtype, shape), np.uint8)
                for start in range(0, len(array), PIECE):
                    piece = file.read(min(PIECE, len(array) - start))
                    crc = google_crc32c.extend(crc, piece)
                    array[start : start + PIECE] = np.frombuffer(piece, np.uint8)
                found[name] = array.view(dtype).reshape(shape)
            (expected,) = struct.unpack("<I", file.read(4))
    except (OSError, ValueError, struct.error) as error:
        raise DamagedStore(f"{path}: the state of an iteration cannot be read ({error})") from error
    if crc != expected:
        raise DamagedStore(f"{path}: expected checksum {expected:08x}, found {crc:08x}")
    return found


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
