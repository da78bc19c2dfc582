"""JSON lines that are on the disk when we say so: appended one by one, each with its checksum, a torn end ignored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infl_cache.disk.durable import crc32c, make_folders, sync_together


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Add one line; return once it is on the disk. What a killed writer left half written stays apart from it."""
    make_folders(path.parent)
    new = not path.exists()
    text = json.dumps(content, sort_keys=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write(f"{'' if not torn else chr(10)}{crc32c(text.encode()):08x} {text}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_together([path.parent])


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines whose checksum is right, in order; none where there is no file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if crc == b"%08x" % crc32c(text):
                yield json.loads(text)
