"""How a chunk becomes bytes: compression inside, crc32c outermost, so that damage is an error and not a crash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from infl_cache.errors import DamagedStore

CRC_BYTES = 4


@dataclass(frozen=True)
class Codec:
    """A compression by name (`lz4`, `zstd`, `none`) and level."""

    name: str
    level: int

    def pipeline(self, itemsize: int) -> list[BloscCodec | Crc32cCodec]:
        """The zarr codecs that turn one chunk's bytes into the file's bytes.

        Shuffling groups the exponents of neighbouring numbers; the checksum comes last
        because a truncated Blosc buffer crashes the interpreter before any later check could speak.
        """
        if self.name == "none":
            return [Crc32cCodec()]
        blosc = BloscCodec(cname=self.name, clevel=self.level, shuffle=self.shuffle, typesize=itemsize)  # type: ignore[arg-type]
        return [blosc, Crc32cCodec()]

    @property
    def shuffle(self) -> str:
        """How Blosc arranges the bytes first.

        Bit by bit for lz4: on factors and rows of five networks byte by byte takes 1.3 to 2.3 times as long (medians,
        scripts/bench_store.py). Byte by byte for zstd.
        """
        return "bitshuffle" if self.name == "lz4" else "shuffle"

    def encode(self, chunk: NDArray[np.generic]) -> tuple[bytes, bytes]:
        """The bytes that `pipeline` makes of a whole chunk, and the four bytes of their checksum that follow them.

        Byte for byte what zarr writes (a test compares them), without the copies that zarr makes on the way. Called
        outside the main thread Blosc uses one thread, and its bytes do not depend on chance.
        """
        plain = np.ascontiguousarray(chunk)
        if self.name == "none":
            body = plain.tobytes()
        else:
            how = Blosc.BITSHUFFLE if self.shuffle == "bitshuffle" else Blosc.SHUFFLE
            blosc = Blosc(self.name, self.level, how)
            body = bytes(blosc.encode(plain))
        return body, google_crc32c.value(body).to_bytes(CRC_BYTES, "little")


def stored_checksum(tail: bytes) -> int:
    """The checksum that the crc32c codec keeps in the last four bytes of a chunk file."""
    return int.from_bytes(tail[-CRC_BYTES:], "little")


def planned_codec(plan: Mapping[str, Any], to_write: bool, folder: Path, stage: str) -> Codec | None:
    """The codec in a stage's plan; older versions did not write it down, and only writing needs it."""
    if "codec" in plan:
        return Codec(**plan["codec"])
    if to_write:
        raise DamagedStore(
            f"{folder}: expected the codec of {stage} in manifest.json, found none: the run was begun by"
            f" another version; finish it with that one, or start over with infl-cache {stage} --force"
        )
    return None
