"""`export`: which rows of a finished run go into which format, and a file that appears only when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import disk_full_is_said, sync_file
from infl_cache.disk.inside import refuse_links
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import refuse_own_files
from infl_cache.errors import BadInput
from infl_cache.progress import Bar, progress
from infl_cache.stages import rank
from infl_cache.stages.columns import stored_column
from infl_cache.stages.export.facts import facts_of
from infl_cache.stages.export.parquet import Labels, require_pyarrow, write_all, write_ends
from infl_cache.stages.export.text import End, Row, write_csv, write_json
from infl_cache.stages.rankings import RankingOf, has_matrix, require_matrix, stored_length, strongest
from infl_cache.stages.tiles import FINAL, matrix_tests, require_sound_matrix, sign_of

FORMATS = ("json", "csv", "parquet")
# In place of a number: every pair of a training and a test sample.
ALL = "all"
# Of each test sample and either end, if nothing is said.
USUAL = 100


def export(
    folder: RunFolder, kind: str, out: Path | None = None, top_k: int | str | None = None, show: bool = True
) -> Path:
    """Write the finished matrix as `json`, `csv` or `parquet`; return the file.

    JSON: `{test id: {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"}}`,
    `influence` over all training samples, `helpful` and `harmful` training ids sorted by strength (all, or
    `top_k`). CSV: a row for each of the `top_k` (100 by default) most helpful and most harmful of each test sample,
    of those that do help or harm. Parquet: such a table too, or, with `top_k="all"`, every pair: see
    `infl_cache.stages.export.parquet`. Test samples that the run was not asked about are left out. A run without a
    matrix is written as `csv` or `parquet`, with at most the `top_k` of its rankings.
    """
    every, length = _asked(folder, kind, top_k)
    path = out or folder.path / "export" / f"influence.{kind}"
    if out is None:
        refuse_links(folder.path, ("export",))
    _require_place(path)
    refuse_own_files(folder.path, path)
    records = folder.records("influence").values()
    labels = Labels(stored_column(folder, "stest", "target"), stored_column(folder, "grads", "target"))
    tests, sign = matrix_tests(folder), sign_of(folder)
    with (
        disk_full_is_said(path.parent), _replacing(path) as file,
        progress("export", len(tests), unit="test sample", show=show) as bar,
    ):  # fmt: skip
        if every:
            with closing(MatrixFile(folder.path / FINAL)) as matrix:
                rows = _rows(matrix, tests, bar)
                if kind == "json":
                    seconds = sum(record.seconds for record in records) / len(tests)
                    write_json(file, rows, labels.test, seconds, length, sign)
                else:
                    write_all(file, rows, labels, sign, facts_of(folder))
        else:
            assert length is not None
            with strongest(folder) as found:
                ends = _ends(found, tests, length, sign, bar)
                if kind == "csv":
                    write_csv(file, ends, labels.test, labels.train)
                else:
                    write_ends(file, ends, labels, facts_of(folder))
    return path


def _asked(folder: RunFolder, kind: str, top_k: int | str | None) -> tuple[bool, int | None]:
    """Whether rows of the matrix are written whole, and the length of the rankings, None for all; refused if not so."""
    if kind not in FORMATS:
        raise BadInput(f"format: expected one of {', '.join(FORMATS)}, found {kind!r}")
    if top_k == ALL and kind == "csv":
        raise BadInput(f"top-k: expected a number for csv, found {ALL}; --format parquet has every pair")
    if top_k != ALL and top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise BadInput(f"top-k: expected at least 1, found {top_k}" + ("" if isinstance(top_k, int) else f"; or {ALL}"))
    if kind == "parquet":
        require_pyarrow()
    every, count = kind == "json" or top_k == ALL, top_k if isinstance(top_k, int) else None
    if every:
        require_matrix(folder, "for json (csv needs none)" if kind == "json" else f"for --top-k {ALL}")
    if has_matrix(folder):
        require_sound_matrix(folder)
    return every, count if every else stored_length(folder, count, USUAL)


def _ends(found: RankingOf, tests: NDArray[np.int64], k: int, sign: int, bar: Bar) -> Iterator[End]:
    """Both ends of each test sample, as far as they do help or harm."""
    for index in tests.tolist():
        for effect in rank.ENDS:
            yield index, effect, rank.only(found(effect, index, k), effect, sign)
        bar.advance(1)


def _rows(matrix: MatrixFile, tests: NDArray[np.int64], bar: Bar) -> Iterator[Row]:
    for index in tests.tolist():
        yield index, matrix.read(index, index + 1)[0]
        bar.advance(1)


def _require_place(path: Path) -> None:
    """`BadInput`, before any work, unless a file can be written beside `path` and then take its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("a folder has that name")
        _opened_anew(temporary := _temporary(path)).close()
        temporary.unlink()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); choose another --out") from error


@contextmanager
def _replacing(path: Path) -> Iterator[IO[Any]]:
    """A file that appears under its name only when it is complete; nothing is left of one that is not."""
    temporary = _temporary(path)
    try:
        with _opened_anew(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_file(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _opened_anew(path: Path) -> IO[Any]:
    """A new file in place of what a killed export has left, or of a link, which is not written through."""
    path.unlink(missing_ok=True)
    return open(path, "xb")
