"""How a chunk becomes bytes: compression inside, crc32c outermost, so that damage is an error and not a crash."""

from __future__ import annotations

from dataclasses import dataclass

from zarr.codecs import BloscCodec, Crc32cCodec

CRC_BYTES = 4


@dataclass(frozen=True)
class Codec:
    """A compression by name (`lz4`, `zstd`, `none`) and level."""

    name: str
    level: int

    def pipeline(self, itemsize: int) -> list[BloscCodec | Crc32cCodec]:
        """The zarr codecs that turn one chunk's bytes into the file's bytes.

        Byte shuffle groups the exponents of neighbouring numbers; the checksum comes last
        because a truncated Blosc buffer crashes the interpreter before any later check could speak.
        """
        if self.name == "none":
            return [Crc32cCodec()]
        blosc = BloscCodec(cname=self.name, clevel=self.level, shuffle="shuffle", typesize=itemsize)  # type: ignore[arg-type]
        return [blosc, Crc32cCodec()]


def stored_checksum(tail: bytes) -> int:
    """The checksum that the crc32c codec keeps in the last four bytes of a chunk file."""
    return int.from_bytes(tail[-CRC_BYTES:], "little")
