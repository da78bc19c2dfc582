"""Training samples chosen by what they did: as ids, as data sets to retrain on, and as files of ids."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from infl_cache.config import short
from infl_cache.disk.durable import make_folders, require_folder, require_writable, write_atomically
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.stages import rank
from infl_cache.stages.rankings import matrix_rows

Ids = NDArray[np.int64]
EFFECTS = (*rank.ENDS, "both")
# How a file of ids is written, by the end of its name.
FORMATS = ("txt", "json", "npy")
# Bytes of rows of the matrix that are held while they are averaged.
ROWS_BYTES = 1 << 27


def of_both(k: int, helpful: rank.Ranking, harmful: rank.Ranking) -> rank.Ranking:
    """The k of largest influence, whatever its sign, from the k of either end; ties by lower id.

    >>> ends = [rank.Ranking(np.array(ids), np.array(values, np.float32)) for ids, values in
    ...         (([3, 0], [-2.0, -0.5]), ([1, 2], [4.0, 0.6]))]
    >>> of_both(3, *ends).ids.tolist()
    [1, 3, 2]
    """
    ids, places = np.unique(np.concatenate([helpful.ids, harmful.ids]), return_index=True)
    values = np.concatenate([helpful.values, harmful.values])[places]
    order = np.lexsort((ids, -np.abs(values)))[:k]
    return rank.Ranking(ids[order], values[order])


def mean_over(folder: RunFolder, tests: Ids) -> NDArray[np.float32]:
    """The influences averaged over test samples, (n_train,), from the finished matrix; what is not finite is left out.

    Rows are read a few at a time.
    """
    total, count = np.zeros(1), np.zeros(1, np.int64)
    for rows in matrix_rows(folder, tests, ROWS_BYTES):
        finite = np.isfinite(rows)
        total = total + np.where(finite, rows, 0).sum(0, dtype=np.float64)
        count = count + finite.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def checked_ids(ids: Sequence[int] | Ids | rank.Ranking, n_train: int) -> Ids:
    """Ids of training samples as integers; `BadInput` for one that does not exist, is no integer, or is there twice."""
    given = np.asarray(ids.ids if isinstance(ids, rank.Ranking) else ids)
    found = given.astype(np.int64) if given.dtype.kind in "iu" or not given.size else np.array([-1])
    if given.ndim != 1 or (found.size and (found.min() < 0 or found.max() >= n_train)):
        raise BadInput(f"ids: expected numbers of training samples, 0 to {n_train - 1}, found {short(given.tolist())}")
    if len(np.unique(found)) < len(found):
        raise BadInput(f"ids: expected each training sample once, found {len(found) - len(np.unique(found))} twice")
    return found


def others(ids: Ids, n_train: int) -> Ids:
    """All training samples but these, in ascending order.

    >>> others(np.array([3, 0]), 5).tolist()
    [1, 2, 4]
    """
    return np.setdiff1d(np.arange(n_train), ids)


def subset(dataset: Any, ids: Ids) -> Subset[Any]:
    """These samples of a data set, in that order: its sample k is `dataset[ids[k]]`."""
    return Subset(dataset, ids.tolist())


def require_file(path: Path, kind: str | None) -> str:
    """The format of a file of ids, as asked or by its name; `BadInput` if there is none, or it cannot be written."""
    found = kind or path.suffix.removeprefix(".").lower()
    if found not in FORMATS:
        known = ", .".join(FORMATS)
        raise BadInput(f"out: expected a name that ends in .{known}, or --format, found {short(kind or path.name)}")
    try:
        require_folder(path.parent)
        make_folders(path.parent)
        require_writable(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); choose another --out") from error
    return found


def write_ids(path: Path, ids: Ids, kind: str) -> None:
    """Replace a file by ids: `txt` one a line (`numpy.loadtxt(path, dtype=int)`), `json` a list, `npy` an array."""
    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, ids)
        write_atomically(path, buffer.getvalue())
        return
    write_atomically(path, (as_lines(ids) if kind == "txt" else json.dumps(ids.tolist()) + "\n").encode())


def as_lines(ids: Ids) -> str:
    """One id a line."""
    return "".join(f"{index}\n" for index in ids.tolist())
