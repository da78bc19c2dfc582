"""Where the tiles of stage 3 go: into the matrix and the rankings, or, in a run without a matrix, the rankings alone.

With a matrix a tile is a fact once it is synced and in the ledger. Without, what the rankings are made of is kept in
`RUN/influence.state`, replaced whole with the numbers of the tiles that are in it: that file says what is done, also
when more test samples are asked about later.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.layout import Block
from infl_cache.disk.ledger import FileRecord
from infl_cache.disk.matrix import Floats, MatrixFile, checksum
from infl_cache.disk.run import RunFolder
from infl_cache.disk.state import Header, read_header, read_state, write_state
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import DamagedStore
from infl_cache.stages.opening import Opened, log
from infl_cache.stages.rankings import new_standings
from infl_cache.stages.standings import Standings
from infl_cache.stages.tiles import Tile, tested

STATE = "influence.state"
KEEP_SECONDS = 120.0


class Tally(Protocol):
    """What takes the tiles of a stage 3."""

    def put(self, tile: Tile, values: Floats, seconds: float) -> None:
        """Take the influences of a tile."""

    def close(self) -> None:
        """No more tiles come, now or for good."""


def commit_rows(
    folder: RunFolder, stage: str, index: int, matrix: MatrixFile, rows: NDArray[np.int64], column: int,
    values: Floats, seconds: float,
) -> None:  # fmt: skip
    """Write rows of an open matrix from a column on, sync them, and make them block `index` of the stage."""
    matrix.write_rows(rows, column, values)
    matrix.sync()
    record = FileRecord(OUTPUTS[stage][0], values.nbytes, checksum(values))
    folder.commit(stage, Block(index, index, index + 1), [record], seconds)


class IntoMatrix:
    """Tiles into an open matrix file, one by one a fact; into the standings too, where these are given."""

    def __init__(self, folder: RunFolder, matrix: MatrixFile, standings: Standings | None) -> None:
        self._folder, self._matrix, self._standings = folder, matrix, standings
        self._samples = folder.samples("stest")

    def put(self, tile: Tile, values: Floats, seconds: float) -> None:
        """Write, sync and commit it."""
        tests = tested(self._samples, tile.test)
        commit_rows(self._folder, "influence", tile.index, self._matrix, tests, tile.columns.start, values, seconds)
        if self._standings is not None:
            self._standings.add(tests, tile.columns.start, values)

    def close(self) -> None:
        """Close the file."""
        self._matrix.close()


class IntoRankings:
    """Tiles into standings that are kept every two minutes, and when no more come."""

    def __init__(self, run: Opened, standings: Standings, done: set[int]) -> None:
        self._folder, self._standings, self._done = run.folder, standings, set(done)
        self._identity = state_identity(run)
        self._samples = run.folder.samples("stest")
        self._pending: list[tuple[int, float]] = []
        self._due = time.monotonic() + KEEP_SECONDS

    def put(self, tile: Tile, values: Floats, seconds: float) -> None:
        """Add it, and keep all that has been added if the last time is long ago."""
        self._standings.add(tested(self._samples, tile.test), tile.columns.start, values)
        self._pending.append((tile.index, seconds))
        if time.monotonic() >= self._due:
            self._keep()

    def close(self) -> None:
        """Keep what was added since."""
        self._keep()

    def _keep(self) -> None:
        """The state first; the ledger then shows how far it is."""
        if not self._pending:
            return
        self._done |= {index for index, _ in self._pending}
        facts = {"tiles": sorted(self._done)}
        write_state(self._folder.path / STATE, self._identity, facts, self._standings.state())
        for index, seconds in self._pending:
            self._folder.commit("influence", Block(index, index, index + 1), [], seconds)
        self._pending, self._due = [], time.monotonic() + KEEP_SECONDS


def state_identity(run: Opened) -> dict[str, Any]:
    """What a state belongs to: this stage, and rankings of this length."""
    options = run.options.influence
    return {
        "influence": run.folder.fingerprint("influence"), "top_k": options.top_k, "top_k_train": options.top_k_train,
    }  # fmt: skip


def state_of(run: Opened) -> Header | None:
    """What the kept state says it holds, if it belongs to this run and its options; its content is not compared."""
    try:
        header = read_header(run.folder.path / STATE)
    except DamagedStore as error:
        log.warning(f"{error}; the rankings start at their beginning")
        return None
    return header if header is not None and header.identity == state_identity(run) else None


def resumed(run: Opened) -> tuple[Standings, set[int]]:
    """What the rankings are made of so far and the tiles that are in it: from a sound state, else nothing yet.

    A kill may have come between the state and the ledger, which then learns of its last tiles.
    """
    header = state_of(run)
    if header is None:
        return new_standings(run), set()
    standings = new_standings(run)
    try:
        standings.restore(read_state(run.folder.path / STATE, header))
        done = {int(index) for index in header.facts["tiles"]}
    except (DamagedStore, KeyError, TypeError, ValueError) as error:
        log.warning(f"{error}; the rankings start at their beginning")
        return new_standings(run), set()
    for index in sorted(done - run.folder.records("influence").keys()):
        run.folder.commit("influence", Block(index, index, index + 1), [], 0.0)
    return standings, done


def column_mask(columns: slice, skipped: Sequence[int]) -> NDArray[np.bool_]:
    """Which columns of a tile belong to training samples that are skipped."""
    return np.isin(np.arange(columns.start, columns.stop), skipped)
