"""A run folder may come from anybody: nothing in it leads out of it, and nothing that it says makes us run away.

Links, pipes and devices in the folder are refused before anything is opened; names that were read from the disk must
stay inside; numbers of a plan must be such as a run can have. What else a file says is covered by checksums, types
and limits where it is read, and nothing is ever unpickled.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from infl_cache.errors import DamagedStore

# Rows and blocks that a plan may speak of, and bytes of one chunk: a thousand times what was ever planned.
MAX_ROWS, MAX_BLOCKS, MAX_CHUNK_BYTES = 10**12, 10**7, 2**36
MAX_AXES, MAX_DEPTH = 8, 32
DTYPES = {
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip


def leads_out(name: str) -> bool:
    """Whether a name that was read from the disk leads out of the run folder, or can be no name at all.

    >>> leads_out("../x"), leads_out("/x"), leads_out("grad_z.zarr/dense/c.0.0")
    (True, True, False)
    """
    path = Path(name)
    return ".." in path.parts or path.is_absolute() or "\0" in name


def refuse_links(folder: Path, below: Iterable[str] | None = (), only_run: bool = False, depth: int = 0) -> None:
    """`DamagedStore` that names a link, pipe or device among the entries of `folder`, or anywhere under those `below`.

    With None under all of them; with `only_run` nothing is looked at where there is no manifest. The folder itself may
    be a link: whoever named it meant what it leads to.
    """
    if only_run and not os.path.lexists(folder / "manifest.json"):
        return
    if depth > MAX_DEPTH:
        raise DamagedStore(f"{str(folder)[:200]}: expected a run, found folders in folders without end; remove them")
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
            refuse_links(Path(entry.path), None, depth=depth + 1)


def _kind(entry: os.DirEntry[str]) -> str:
    mode = entry.stat(follow_symlinks=False).st_mode
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


class Plan(dict[str, Any]):
    """A stage's plan as it was read: whoever asks for a fact that is not there is told so."""

    def __missing__(self, name: str) -> Any:
        raise DamagedStore(f"manifest.json: expected {name} in the plan of a stage, found none; restore the file")


def check_plan(plan: Mapping[str, Any]) -> None:
    """`ValueError` or `TypeError` unless names, types and sizes of a stage's plan are such as a run can have."""
    for name, value in plan.items():
        CHECKS.get(name, _anything)(value)
    if "n_rows" not in plan or "block_rows" not in plan:
        return  # nothing can be done with it
    n_rows = int(plan["n_rows"])
    spans = plan.get("spans", [[0, n_rows]])
    blocks = sum(1 + (stop - start) // plan["block_rows"] for start, stop in spans)
    if len(spans) > MAX_BLOCKS or blocks > MAX_BLOCKS:
        raise ValueError(f"{n_rows} rows in blocks of {plan['block_rows']}")
    rows = sum(stop - start for start, stop in spans)
    if "samples" in plan and sum(len(range(*each)) for each in plan["samples"]) != rows:
        raise ValueError(f"other samples than its {rows} rows")


def _anything(value: Any) -> None:
    """What decides nothing where it is read, or is checked there."""


def _name(name: Any) -> None:
    if not isinstance(name, str) or leads_out(name):
        raise ValueError(f"a name that leads out of the folder: {str(name)[:80]!r}")


def _number(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MAX_ROWS:
        raise ValueError(f"{str(value)[:40]!r} in place of a number from {least} to {MAX_ROWS}")
    return value


def _above_zero(value: Any) -> None:
    _number(value, 1)


def _of(kind: type | tuple[type, ...]) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{str(value)[:40]!r} of another type")

    return check


def _some(each_is: Callable[[Any], object]) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not isinstance(value, list) or not value:
            raise TypeError(f"{str(value)[:40]!r} in place of a list with something in it")
        for each in value:
            each_is(each)

    return check


def _span(value: Any) -> None:
    start, stop = value
    if _number(start) >= _number(stop):
        raise ValueError(f"rows {start} to {stop}")


def _range(value: Any) -> None:
    start, stop, step = value
    if len(range(_number(start, -1), _number(stop, -1), _number(step, -MAX_ROWS))) > MAX_ROWS:
        raise ValueError(f"samples {start} to {stop}")


def _record(value: Any) -> None:
    _name(value["path"])
    _number(value["size"])
    _number(value["crc"])


def _layout(value: Any) -> None:
    _name(value["path"])
    if value["dtype"] not in DTYPES:
        raise ValueError(f"an array of {str(value['dtype'])[:40]!r}")
    _number(value["n_rows"])
    shape = [_number(each) for each in (*value["row_shape"], *value["chunk_row_shape"])]
    size = 8 * _number(value["chunk_rows"], 1) * math.prod(value["chunk_row_shape"])
    if len(shape) > 2 * MAX_AXES or size > MAX_CHUNK_BYTES:
        raise ValueError(f"chunks of {size} bytes")
    axes = value.get("axes", [])
    if not isinstance(axes, list | tuple) or len(axes) not in (0, 1 + len(value["row_shape"])):
        raise ValueError(f"axes {str(axes)[:40]!r}")
    for axis in axes:
        _of(str)(axis)


def _codec(value: Any) -> None:
    if value["name"] not in ("lz4", "zstd", "none") or _number(value["level"]) > 9 or len(value) != 2:
        raise ValueError(f"codec {str(value)[:40]!r}")


def _spectrum(value: Any) -> None:
    if not all(isinstance(value[name], int | float) for name in ("largest", "smallest", "mean", "steps", "samples")):
        raise TypeError(f"{str(value)[:40]!r} in place of numbers")


# What each fact of a plan must be.
CHECKS: dict[str, Callable[[Any], object]] = {
    "n_rows": _number, "block_rows": _above_zero, "batch_size": _above_zero, "tile_rows": _above_zero,
    "tile_blocks": _above_zero, "chunk_columns": _above_zero, "slab_bytes": _number, "room": _number,
    "spans": _some(_span), "tests": _some(_span), "samples": _some(_range), "arrays": _some(_layout),
    "metadata": _some(_record), "metadata_before": _some(_record), "codec": _codec, "layers": _some(_of(str)),
    "repairing": _some(_number), "forms": _of(dict), "matrix": _of(bool), "damping": _of((int, float)),
    "curvature": _of(str), "measure": _of(str), "parameters_dtype": _of(str), "spectrum": _spectrum,
    "rounding": _of(dict),
}  # fmt: skip
