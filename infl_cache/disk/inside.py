"""A run folder may come from anybody: nothing in it leads out of it, and nothing that it says makes us run away.

Links, pipes and devices in the folder are refused before anything is opened; names that were read from the disk must
stay inside; numbers of a plan must be such as a run can have. What else a file says is covered by checksums, types
and limits where it is read, and nothing is ever unpickled.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infl_cache.errors import DamagedStore

# Rows and blocks that a plan may speak of, and bytes of one chunk: a thousand times what was ever planned.
MAX_ROWS, MAX_BLOCKS, MAX_CHUNK_BYTES = 10**12, 10**7, 2**36
KINDS = "biuf"


def leads_out(name: str) -> bool:
    """Whether a name that was read from the disk leads out of the run folder, or can be no name at all.

    >>> leads_out("../x"), leads_out("/x"), leads_out("grad_z.zarr/dense/c.0.0")
    (True, True, False)
    """
    path = Path(name)
    return ".." in path.parts or path.is_absolute() or "\0" in name


def refuse_links(folder: Path, below: Iterable[str] | None = (), only_run: bool = False) -> None:
    """`DamagedStore` that names a link, pipe or device among the entries of `folder`, or anywhere under those `below`.

    With None under all of them; with `only_run` nothing is looked at where there is no manifest. The folder itself may
    be a link: whoever named it meant what it leads to.
    """
    if only_run and not os.path.lexists(folder / "manifest.json"):
        return
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # whoever opens it says so
    for entry in found:
        if entry.is_symlink() or not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
            kind = "a link" if entry.is_symlink() else _kind(entry)
            raise DamagedStore(
                f"{entry.path}: expected a file or folder of the run itself, found {kind}, which is not followed;"
                " remove it, or put in its place what it leads to"
            )
        if (below is None or entry.name in below) and entry.is_dir(follow_symlinks=False):
            refuse_links(Path(entry.path), None)


def _kind(entry: os.DirEntry[str]) -> str:
    mode = entry.stat(follow_symlinks=False).st_mode
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def check_plan(plan: Mapping[str, Any]) -> None:
    """`ValueError` or `TypeError` unless names and numbers of a stage's plan are such as a run can have."""
    for name in ("metadata", "metadata_before"):
        for record in plan.get(name, ()):
            _name(record["path"])
            _number(record["size"], 0)
            _number(record["crc"], 0)
    for layout in plan.get("arrays", ()):
        _name(layout["path"])
        kind = np.dtype(str(layout["dtype"]))
        for each in (*layout["row_shape"], *layout["chunk_row_shape"], layout["n_rows"]):
            _number(each, 0)
        size = kind.itemsize * _number(layout["chunk_rows"], 1) * math.prod(layout["chunk_row_shape"])
        if kind.kind not in KINDS or size > MAX_CHUNK_BYTES or len(layout["row_shape"]) > 8:
            raise ValueError(f"an array of {kind} in chunks of {size} bytes")
    if "n_rows" in plan:
        spans = plan.get("spans", [[0, plan["n_rows"]]])
        ends = [_number(each, 0) for span in spans for each in span] + [_number(plan["n_rows"], 0)]
        if sum(1 + (stop - start) // _number(plan["block_rows"], 1) for start, stop in spans) > MAX_BLOCKS:
            raise ValueError(f"{max(ends)} rows in blocks of {plan['block_rows']}")
    for start, stop, step in plan.get("samples", ()):
        if len(range(_number(start, -1), _number(stop, -1), step)) > max(ends):
            raise ValueError(f"samples {start} to {stop}")
    if not all(isinstance(each, str) for each in plan.get("layers", ())) or plan.get("layers") == []:
        raise ValueError("layers without names")
    for name in ("tile_rows", "tile_blocks", "chunk_columns", "batch_size"):
        if name in plan:
            _number(plan[name], 1)


def _name(name: Any) -> None:
    if not isinstance(name, str) or leads_out(name):
        raise ValueError(f"a name that leads out of the folder: {str(name)[:80]!r}")


def _number(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= MAX_ROWS:
        raise ValueError(f"{str(value)[:40]!r} in place of a number from {least} to {MAX_ROWS}")
    return value
