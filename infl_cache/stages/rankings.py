"""`rankings.npz`: the strongest training samples of each test sample, of each class and of all, and the reverse.

It is made while the tiles of the matrix pass, or from the finished matrix; what a run without one answers, it answers.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.arrays import read_arrays
from infl_cache.disk.durable import write_atomically
from infl_cache.disk.layout import Block, blocks
from infl_cache.disk.matrix import Floats, MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.disk.store import check_file, record_of_file
from infl_cache.errors import BadInput, IncompleteStore
from infl_cache.progress import human_bytes
from infl_cache.stages import rank
from infl_cache.stages.columns import classes_of, stored_column
from infl_cache.stages.opening import Opened, log
from infl_cache.stages.rank import Ranking
from infl_cache.stages.selection import count_of_tests
from infl_cache.stages.standings import Standings
from infl_cache.stages.tiles import matrix_tests, sign_of

MATRIX, RANKINGS = "influence.npy", "rankings.npz"
# The part of the memory budget that sums per class may take.
ROOM = 8

Arrays = Mapping[str, NDArray[Any]]
# Of an end (`helpful`, `harmful`), a test sample and k.
RankingOf = Callable[[str, int, int], Ranking]


def new_standings(run: Opened) -> Standings:
    """What the tiles of the run's matrix are to be added to: nothing has been yet."""
    folder, options = run.folder, run.options.influence
    room = folder.plan("influence").get("room", run.budget // ROOM)
    return Standings(
        count_of_tests(folder), len(run.task.train), options.top_k, options.top_k_train, sign_of(folder),
        classes_of(stored_column(folder, "stest", "target")), room,
    )  # fmt: skip


def write_rankings(run: Opened, anew: bool, standings: Standings | None = None) -> None:
    """`rankings.npz` (`Standings.arrays`) of what has been added to `standings`; without them, of the finished matrix.

    Raises `IncompleteStore` where there is neither, and no file of that length.
    """
    folder, options = run.folder, run.options.influence
    identity = {
        "influence": folder.fingerprint("influence"),
        "top_k": min(options.top_k, len(run.task.train)),
        "top_k_train": min(options.top_k_train, count_of_tests(folder)),
    }
    entry = folder.manifest.stages.get("rankings")
    if not anew and entry is not None and entry["identity"] == identity and _rankings_intact(folder):
        return
    if standings is None:
        require_matrix(folder, "to rank it anew")
    folder.begin("rankings", run.task_identity, identity, {"n_rows": 1, "block_rows": 1})
    started = time.perf_counter()
    standings = standings or _standings_of_matrix(run)
    if standings.has_classes and not standings.by_class:
        log.warning(
            f"no rankings by class: their sums do not fit in {human_bytes(run.budget // ROOM)}; give more --memory"
        )
    buffer = io.BytesIO()
    np.savez(buffer, **standings.arrays())  # type: ignore[arg-type]
    write_atomically(folder.path / RANKINGS, buffer.getvalue())
    folder.commit("rankings", Block(0, 0, 1), [folder.record_file(RANKINGS)], time.perf_counter() - started)


def _rankings_intact(folder: RunFolder) -> bool:
    records = folder.records("rankings")
    file = folder.path / RANKINGS
    return 0 in records and file.is_file() and folder.record_file(RANKINGS) in records[0].files


def _standings_of_matrix(run: Opened) -> Standings:
    standings, tests = new_standings(run), matrix_tests(run.folder)
    place = 0
    for rows in matrix_rows(run.folder, tests, run.budget // 8):
        standings.add(tests[place : place + len(rows)], 0, rows)
        place += len(rows)
    return standings


def matrix_rows(folder: RunFolder, tests: NDArray[np.int64], budget: int) -> Iterator[Floats]:
    """Rows of the finished matrix a few at a time, within `budget` bytes."""
    with closing(MatrixFile(folder.path / MATRIX)) as matrix:
        step = max(1, budget // (16 * matrix.shape[1]))
        for block in blocks(len(tests), step):
            yield matrix.read_rows(tests[block.start : block.stop])


def has_matrix(folder: RunFolder) -> bool:
    """Whether the run keeps its matrix, or will; runs of older versions do."""
    return "influence" not in folder.manifest.stages or bool(folder.plan("influence").get("matrix", True))


def require_matrix(folder: RunFolder, what: str) -> None:
    """`IncompleteStore` for a run that was made without the matrix, which is needed `what` for."""
    if not has_matrix(folder):
        raise IncompleteStore(
            f"{folder.path}: expected a matrix {what}, found a run that was made with --no-matrix, which keeps rankings"
            " only; run infl-cache influence --matrix --force"
        )


def stored_rankings(folder: RunFolder) -> Arrays:
    """The arrays of `rankings.npz`; files of older versions have fewer.

    Raises `IncompleteStore` for a run that has none, `DamagedStore` if the file is not what was committed.
    """
    records = folder.records("rankings")
    if 0 not in records:
        raise IncompleteStore(f"{folder.path}: expected finished rankings, found none; run infl-cache influence first")
    for file in records[0].files:
        check_file(folder.path, file, record_of_file)
    return read_arrays(folder.path / RANKINGS)


def stored_length(folder: RunFolder, asked: int | None, usual: int) -> int:
    """How long rankings of training samples are to be: as asked, else the usual, without a matrix at most as stored.

    Raises `BadInput` where the stored ones are shorter than what is asked for.
    """
    if has_matrix(folder):
        return asked or usual
    length = int(stored_rankings(folder)["helpful_ids"].shape[1])
    if asked is not None:
        _require_length("--top-k", length, asked, folder.plan("grads")["n_rows"])
    return min(asked or usual, length)


@contextmanager
def strongest(folder: RunFolder) -> Iterator[RankingOf]:
    """The rankings of test samples: of the rows of the matrix, which is not checked, or those that are stored."""
    if not has_matrix(folder):
        arrays, n_train = stored_rankings(folder), folder.plan("grads")["n_rows"]
        yield lambda end, test, k: stored_ranking(arrays, end, test, k, n_train)
        return
    sign = sign_of(folder)
    with closing(MatrixFile(folder.path / MATRIX)) as matrix:
        yield lambda end, test, k: rank.ENDS[end](matrix.read(test, test + 1)[0], k, sign)


def stored_ranking(arrays: Arrays, name: str, row: int, k: int, every: int) -> Ranking:
    """The first k of row `row` of the rankings `name`, such as `train_helpful`, of which `every` would be all.

    Raises `BadInput` if they are shorter, `IncompleteStore` if an older version left them out.
    """
    if f"{name}_ids" not in arrays:
        raise IncompleteStore(f"{RANKINGS}: expected {name}_ids, found an older version's; run infl-cache influence")
    ids, values = arrays[f"{name}_ids"][row], arrays[f"{name}_values"][row]
    _require_length("--top-k-train" if name.startswith("train") else "--top-k", len(ids), k, every)
    there = ids[:k] >= 0
    return Ranking(ids[:k][there], values[:k][there])


def _require_length(flag: str, length: int, k: int, every: int) -> None:
    if length < min(k, every):
        raise BadInput(
            f"k: expected at most {length}, the length of the stored rankings, found {k}; run infl-cache influence with"
            f" {flag} {k}, in a run without a matrix with --force"
        )
