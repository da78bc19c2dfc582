"""`rankings.npz`: the strongest training samples of each test sample, and of the mean over all test samples."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import write_atomically
from infl_cache.disk.layout import Block, blocks
from infl_cache.disk.matrix import Floats, MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.stages import rank
from infl_cache.stages.opening import Opened
from infl_cache.stages.selection import count_of_tests
from infl_cache.stages.tiles import matrix_tests, sign_of

MATRIX, RANKINGS = "influence.npy", "rankings.npz"


def write_rankings(run: Opened, anew: bool) -> None:
    """`rankings.npz`: helpful and harmful ids and values per test sample, and of the mean over test samples."""
    folder, k = run.folder, min(run.options.influence.top_k, len(run.task.train))
    identity = {"influence": folder.fingerprint("influence"), "top_k": k}
    entry = folder.manifest.stages.get("rankings")
    if not anew and entry is not None and entry["identity"] == identity and _rankings_intact(folder):
        return
    folder.begin("rankings", run.task_identity, identity, {"n_rows": 1, "block_rows": 1})
    started = time.perf_counter()
    buffer = io.BytesIO()
    np.savez(buffer, **rankings(folder, k, run.budget // 8))  # type: ignore[arg-type]
    write_atomically(folder.path / RANKINGS, buffer.getvalue())
    folder.commit("rankings", Block(0, 0, 1), [folder.record_file(RANKINGS)], time.perf_counter() - started)


def _rankings_intact(folder: RunFolder) -> bool:
    records = folder.records("rankings")
    file = folder.path / RANKINGS
    return 0 in records and file.exists() and folder.record_file(RANKINGS) in records[0].files


def rankings(folder: RunFolder, k: int, budget: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Ids (n_test, k) padded with -1, values padded with NaN; `mean_*` (k,) of the mean over finite test rows.

    Of test samples that nobody asked for there is nothing but padding.
    """
    found: dict[str, list[rank.Ranking]] = {"helpful": [], "harmful": []}
    tests, sign = matrix_tests(folder), sign_of(folder)
    total, count = None, None
    for rows in matrix_rows(folder, tests, budget):
        finite = np.isfinite(rows)
        summed = np.where(finite, rows, 0).sum(0, dtype=np.float64)
        total = summed if total is None else total + summed
        count = finite.sum(0) if count is None else count + finite.sum(0)
        for row in rows:
            found["helpful"].append(rank.helpful(row, k, sign))
            found["harmful"].append(rank.harmful(row, k, sign))
    assert total is not None
    assert count is not None
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {"mean": mean}
    for name, of_mean in (("helpful", rank.helpful(mean, k, sign)), ("harmful", rank.harmful(mean, k, sign))):
        arrays[f"{name}_ids"], arrays[f"{name}_values"] = _padded(found[name], tests, count_of_tests(folder), k)
        arrays[f"mean_{name}_ids"], arrays[f"mean_{name}_values"] = of_mean.ids, of_mean.values
    return arrays


def matrix_rows(folder: RunFolder, tests: NDArray[np.int64], budget: int) -> Iterator[Floats]:
    """Rows of the finished matrix a few at a time, within `budget` bytes."""
    matrix = MatrixFile(folder.path / MATRIX)
    try:
        step = max(1, budget // (16 * matrix.shape[1]))
        for block in blocks(len(tests), step):
            yield matrix.read_rows(tests[block.start : block.stop])
    finally:
        matrix.close()


def _padded(
    found: Iterable[rank.Ranking], tests: NDArray[np.int64], n_test: int, k: int
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.generic]], Floats]:
    ids = np.full((n_test, k), -1, np.int64)
    values = np.full((n_test, k), np.nan, np.float32)
    for test, each in zip(tests, found, strict=True):
        ids[test, : len(each.ids)], values[test, : len(each.ids)] = each.ids, each.values
    return ids, values
