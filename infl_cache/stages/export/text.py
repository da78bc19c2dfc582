"""JSON in the structure of `pytorch_influence_functions`, and CSV: one test sample at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.stages import rank

# Of each test sample and either end: the test sample, "helpful" or "harmful", and who is there.
End = tuple[int, str, rank.Ranking]
Row = tuple[int, NDArray[np.float32]]

COLUMNS = (
    "test_id",
    "train_id",
    "rank",
    "effect",
    "influence",
    "loss_change_if_removed",
    "test_label",
    "train_label",
)


def write_json(
    file: IO[bytes], rows: Iterator[Row], labels: NDArray[np.float64], seconds: float, k: int | None, sign: int
) -> None:
    """One test sample at a time, so that no more than one row is ever held as text."""
    file.write(b"{")
    for place, (index, row) in enumerate(rows):
        entry = entry_of(index, row, labels[index], seconds, k, sign)
        text = f"{',' if place else ''}\n{json.dumps(str(index))}: {json.dumps(entry, allow_nan=False)}"
        file.write(text.encode())
    file.write(b"\n}\n")


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


def write_csv(
    file: IO[bytes], ends: Iterator[End], test_labels: NDArray[np.float64], train_labels: NDArray[np.float64]
) -> None:
    """A line for each training sample of either end of each test sample."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for index, effect, ranking in ends:
            for place, (train_id, value) in enumerate(zip(ranking.ids.tolist(), ranking.values.tolist(), strict=True)):
                labels = (number(test_labels[index]), number(train_labels[train_id]))
                writer.writerow((index, train_id, place + 1, effect, value, -value, *labels))
    finally:
        text.detach()  # whoever opened the file closes it


def number(value: float) -> int | float | None:
    """A number as JSON has it: whole labels as integers, NaN as null.

    >>> number(3.0), number(0.5), number(float("nan"))
    (3, 0.5, None)
    """
    if not np.isfinite(value):
        return None
    return int(value) if value == int(value) else float(value)
