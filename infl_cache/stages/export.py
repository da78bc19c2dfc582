"""What other programs read: JSON in the structure of `pytorch_influence_functions`, and CSV."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import sync_file
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.progress import progress
from infl_cache.stages import rank
from infl_cache.stages.columns import stored_column
from infl_cache.stages.rankings import RankingOf, has_matrix, require_matrix, stored_length, strongest
from infl_cache.stages.tiles import matrix_tests, require_sound_matrix, sign_of

FORMATS = ("json", "csv")
# Of each test sample and either end, if nothing is said.
CSV_ROWS = 100
CSV_HEADER = (
    "test_id",
    "train_id",
    "rank",
    "effect",
    "influence",
    "loss_change_if_removed",
    "test_label",
    "train_label",
)


def export(folder: RunFolder, kind: str, out: Path | None = None, top_k: int | None = None, show: bool = True) -> Path:
    """Write the finished matrix as `json` or `csv`; return the file.

    JSON: `{test id: {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"}}`,
    `influence` over all training samples, `helpful` and `harmful` training ids sorted by strength (all, or
    `top_k`). CSV: a row for each of the `top_k` (100 by default) most helpful and most harmful of each test sample.
    Test samples that the run was not asked about are left out. A run without a matrix is written as `csv`, with at
    most the `top_k` of its rankings.
    """
    if kind not in FORMATS:
        raise BadInput(f"format: expected one of {', '.join(FORMATS)}, found {kind!r}")
    if top_k is not None and top_k < 1:
        raise BadInput(f"top-k: expected at least 1, found {top_k}")
    if kind == "json":
        require_matrix(folder, "for json (csv needs none)")
    if has_matrix(folder):
        require_sound_matrix(folder)
    length = stored_length(folder, top_k, CSV_ROWS)
    path = out or folder.path / "export" / f"influence.{kind}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path):
            pass
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); choose another --out") from error
    records = folder.records("influence").values()
    test_labels, train_labels = stored_column(folder, "stest", "target"), stored_column(folder, "grads", "target")
    tests = matrix_tests(folder)
    seconds = sum(record.seconds for record in records) / len(tests)
    with _replacing(path) as file, progress("export", len(tests), unit="test sample", show=show) as bar:
        if kind == "json":
            with closing(MatrixFile(folder.path / "influence.npy")) as matrix:
                _write_json(file, _rows(matrix, tests, bar), test_labels, seconds, top_k, sign_of(folder))
        else:
            with strongest(folder) as found:
                _write_csv(file, _rankings(found, tests, length, bar), test_labels, train_labels)
    return path


def _rankings(found: RankingOf, tests: NDArray[np.int64], k: int, bar: Any) -> Iterator[tuple[int, str, rank.Ranking]]:
    """Both ends of each test sample."""
    for index in tests.tolist():
        for effect in rank.ENDS:
            yield index, effect, found(effect, index, k)
        bar.advance(1)


def _rows(matrix: MatrixFile, tests: NDArray[np.int64], bar: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for index in tests.tolist():
        yield index, matrix.read(index, index + 1)[0]
        bar.advance(1)


def _write_json(
    file: IO[str],
    rows: Iterator[tuple[int, NDArray[np.float32]]],
    labels: NDArray[np.float64],
    seconds: float,
    k: int | None,
    sign: int,
) -> None:
    """One test sample at a time, so that no more than one row is ever held as text."""
    file.write("{")
    for place, (index, row) in enumerate(rows):
        entry = entry_of(index, row, labels[index], seconds, k, sign)
        file.write(f"{',' if place else ''}\n{json.dumps(str(index))}: {json.dumps(entry, allow_nan=False)}")
    file.write("\n}\n")


def entry_of(
    test: int, row: NDArray[np.float32], label: float, seconds: float, k: int | None = None, sign: int = 1
) -> dict[str, Any]:
    """What JSON says of a test sample: its influences, and training ids by strength (`k` of either end, or all).

    >>> entry_of(7, np.array([0.5, -2.0, np.nan], np.float32), 3.0, 0.1)["helpful"]
    [1, 0]
    """
    count = len(row) if k is None else k
    return {
        "label": number(label),
        "num_in_dataset": test,
        "time_calc_influence_s": seconds,
        "influence": [value if np.isfinite(value) else None for value in row.tolist()],
        "harmful": rank.harmful(row, count, sign).ids.tolist(),
        "helpful": rank.helpful(row, count, sign).ids.tolist(),
    }


def _write_csv(
    file: IO[str], rankings: Iterator[tuple[int, str, rank.Ranking]], test_labels: NDArray[np.float64],
    train_labels: NDArray[np.float64],
) -> None:  # fmt: skip
    writer = csv.writer(file)
    writer.writerow(CSV_HEADER)
    for index, effect, ranking in rankings:
        for place, (train_id, value) in enumerate(zip(ranking.ids.tolist(), ranking.values.tolist(), strict=True), 1):
            labels = (number(test_labels[index]), number(train_labels[train_id]))
            writer.writerow((index, train_id, place, effect, value, -value, *labels))


def number(value: float) -> int | float | None:
    """A number as JSON has it: whole labels as integers, NaN as null.

    >>> number(3.0), number(0.5), number(float("nan"))
    (3, 0.5, None)
    """
    if not np.isfinite(value):
        return None
    return int(value) if value == int(value) else float(value)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when it is complete."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_file(path.parent)
