"""Stage 3: both stores streamed through a blocked product into `influence.npy`, and the rankings made of it.

The unit of work and of commit is a tile of the matrix: the rows of a test tile by a run of training blocks. How large
it is, and in which order the stores are read for it, is chosen by `schedule`; `contraction` computes it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from infl_cache.disk.durable import remove, sync_together
from infl_cache.disk.layout import ArrayLayout
from infl_cache.disk.matrix import MatrixFile, create_matrix
from infl_cache.disk.run import Force, RunFolder
from infl_cache.errors import IncompleteStore
from infl_cache.maths.capture import Forms
from infl_cache.maths.parts import units
from infl_cache.progress import progress
from infl_cache.stages.again import chosen, claim_again
from infl_cache.stages.blocks import some
from infl_cache.stages.contraction import product_dtype, sums_of, tile_values
from infl_cache.stages.grads import grads
from infl_cache.stages.opening import Opened, StageResult, log, summary
from infl_cache.stages.rankings import ROOM, has_matrix, new_standings, write_rankings
from infl_cache.stages.room import require_room_for_influence
from infl_cache.stages.same import check_against_store
from infl_cache.stages.schedule import Order, Room, Stores, Unit, best_order, most_rows, order_of_rows
from infl_cache.stages.selection import asked_tests, held_tests
from infl_cache.stages.solutions import solution_layout
from infl_cache.stages.standings import Standings
from infl_cache.stages.stored import wanted_arrays
from infl_cache.stages.tally import IntoMatrix, IntoRankings, Tally, column_mask, resumed, state_of
from infl_cache.stages.tiles import (
    FINAL,
    PARTIAL,
    Tile,
    checked_tiles,
    matrix_tests,
    planned_tiles,
    solved,
    tested,
    tile_rows_of,
    uncovered,
)

TILE_COLUMNS = 4096


def influence(run: Opened, force: Force = False, only: Collection[int] | None = None) -> StageResult:
    """Compute what is missing of `influence.npy`, then the rankings.

    The damaged tiles `only` are forgotten and made again, and the rankings if they are damaged; nothing else is done.
    """
    started = time.perf_counter()
    folder = run.folder
    if not run.options.grads.cache and only is None:
        grads(run)  # losses and digests only
    skipped_train, skipped_test = _require_parents(run)
    _require_asked(run)
    identity = {"grads": folder.fingerprint("grads"), "stest": folder.fingerprint("stest")}
    if run.options.influence.product_dtype != "float32":
        identity["product_dtype"] = run.options.influence.product_dtype
    plan: dict[str, Any] | None
    if only is not None:
        only, plan = _claim_tiles_again(run, identity, only), folder.plan("influence")
    else:
        plan = folder.claim("influence", run.task_identity, identity, force)
        if plan is not None and _must_begin_anew(run, plan):
            plan = folder.claim("influence", run.task_identity, identity, True)
    check_against_store(run, "grads")
    check_against_store(run, "stest")
    require_room_for_influence(run, plan)
    if plan is None:
        folder.begin("influence", run.task_identity, identity, _plan(run))
    elif only is None:
        folder.write_configuration()
        _extend(folder)
    tiles = planned_tiles(folder)
    standings: Standings | None = None
    if has_matrix(folder):
        done = set(checked_tiles(folder, tiles))
        standings = None if done else new_standings(run)  # else made from the matrix: some tiles passed earlier
    else:
        standings, done = resumed(run)
    todo = [tile for tile in tiles if tile.index not in done and chosen(tile.index, only)]
    if todo:
        _compute(run, tiles, todo, done, skipped_train, standings)
    if only is None or len(folder.records("influence")) == len(tiles):
        _finish(folder)
        write_rankings(run, bool(force) or (bool(todo) and only is None), standings)
    notes = [f"test samples {some(skipped_test)} have no s_test; their rows are NaN"] if skipped_test else []
    if skipped_train:
        notes.append(f"train samples {some(skipped_train)} have no finite gradient; their columns are NaN")
    for note in (uncertain := _uncertain(folder, skipped_test)):
        log.warning(note)
    notes += uncertain
    samples = folder.samples("stest")
    rows = [sum(len(tested(samples, test)) for test in {tile.test for tile in chosen}) for chosen in (tiles, todo)]
    return summary(run, "influence", rows[0], rows[1], started, notes)


def _claim_tiles_again(run: Opened, identity: dict[str, Any], damaged: Collection[int]) -> set[int]:
    """`claim_again`; a matrix without tiles goes, and where rankings have lost what they are made of, all tiles."""
    folder = run.folder
    if not has_matrix(folder) and state_of(run) is None:
        damaged = folder.records("influence")
    only = claim_again(run, "influence", identity, damaged)
    if not folder.records("influence"):
        remove(folder.path / name for name in (FINAL, PARTIAL))
    return only


def _require_parents(run: Opened) -> tuple[list[int], list[int]]:
    """Samples without finite rows in the two stores; `IncompleteStore` unless both are finished and fit to be used."""
    bad: dict[str, list[int]] = {}
    for stage in ("grads", "stest"):
        records, samples = run.folder.require_complete(stage), run.folder.samples(stage)
        bad[stage] = [int(samples[row]) for record in records.values() for row in record.bad_rows]
        if bad[stage] and run.options.influence.nonfinite == "stop":
            raise IncompleteStore(
                f"{stage}: expected finite rows, found NaN or Inf at {some(bad[stage])};"
                " mend them, or leave them out by --nonfinite skip"
            )
    return bad["grads"], bad["stest"]


def _require_asked(run: Opened) -> None:
    """`IncompleteStore` unless stage 2 has a row for every test sample that is asked for."""
    selection = run.options.selection
    held = set(held_tests(run.folder).tolist())
    missing = [
        test for test in asked_tests(selection, run.task, run.options.resources.progress) or () if test not in held
    ]
    if missing:
        raise IncompleteStore(
            f"{run.folder.path}: expected an s_test for each test sample that is asked for, found none for"
            f" {some(missing)}; run infl-cache stest with the same --test first"
        )


def _uncertain(folder: RunFolder, skipped: Sequence[int]) -> list[str]:
    """What there is to say of rows whose s_test did not meet the tolerance."""
    tests, found = solved(folder)
    over = np.flatnonzero(~found["converged"].astype(bool) & ~np.isin(tests, skipped))
    if not len(over):
        return []
    return [
        f"s_test of {len(over)} of {len(tests)} test samples did not meet the tolerance: {some(tests[over].tolist())}"
        f" (relative residual up to {found['residual'][over].max():.1e}); the influences on them are as uncertain:"
        " see infl-cache status"
    ]


def _plan(run: Opened) -> dict[str, Any]:
    """The order of least bytes and the tiles it makes; the room of a run without a matrix for its sums per class."""
    grads, stored = run.folder.plan("grads"), {each.path: each for each in run.folder.array_layouts("grads")}
    chunk_columns = stored["dense"].chunk_row_shape[0] if "dense" in stored else 1
    order = _order(run, Forms.from_json(grads["forms"]), stored)
    asked, n_test = run.options.resources.tile_rows, len(run.task.test)
    test_bytes = run.parameters.size * np.dtype(solution_layout(run).dtype).itemsize
    most = most_rows(order, test_bytes, room_of(run.budget, product_dtype(run).itemsize))
    tile_blocks = -(-order.columns // grads["block_rows"])
    tests = uncovered(run.folder, 0, min(asked or order.rows, n_test))
    # Test samples that come later share tiles, however few there are now.
    sizes = {"tile_rows": min(asked or most, n_test), "tile_blocks": tile_blocks, "tests": tests}
    if order.slab_bytes:
        sizes |= {"slab_bytes": order.slab_bytes, "chunk_columns": chunk_columns}
    if not run.options.influence.matrix:
        # What fits is settled here: a run goes on with another --memory.
        sizes |= {"matrix": False, "room": run.budget // ROOM}
    return {"n_rows": _n_tiles(run.folder, tests, tile_blocks), "block_rows": 1, **sizes}


def _order(run: Opened, forms: Forms, stored: Mapping[str, ArrayLayout]) -> Order:
    """In which order the stores of this run are read."""
    counts, block_rows = (len(held_tests(run.folder)), len(run.task.train)), run.folder.plan("grads")["block_rows"]
    staying = not run.options.grads.cache or bool(run.options.resources.tile_rows)
    room = room_of(run.budget, product_dtype(run).itemsize)
    return order_for(counts, forms, stored, solution_layout(run), room, block_rows, staying)


def order_for(
    counts: tuple[int, int], forms: Forms, stored: Mapping[str, ArrayLayout], solutions: ArrayLayout, room: Room,
    block_rows: int, staying: bool,
) -> Order:  # fmt: skip
    """The order for (n_test, n_train) samples, whose gradients are `stored` and whose s_test are `solutions`.

    Gradients that are not kept are made whole, for rows of s_test that stay (`staying`).
    """
    itemsize = np.dtype(solutions.dtype).itemsize
    found = []
    for part in units(forms):
        paths = wanted_arrays(stored, part)[0]
        n_bytes = sum(_row_bytes(stored[path]) for path in paths)
        cut = "dense" in paths and stored["dense"].chunk_row_shape != stored["dense"].row_shape
        chunk = itemsize * stored["dense"].chunk_row_shape[0] if cut else 0
        found.append(Unit(part.size * itemsize, n_bytes, chunk))
    stores = Stores(tuple(found), itemsize * solutions.chunk_row_shape[0])
    columns = min(counts[1], max(1, TILE_COLUMNS // block_rows) * block_rows)
    return (order_of_rows if staying else best_order)(*counts, stores, room, columns)


def room_of(budget: int, number: int) -> Room:
    """The parts of the memory budget for s_test and for sums of so many bytes a number."""
    return Room(budget // 4, budget // 8, number)


def _row_bytes(layout: ArrayLayout) -> int:
    return math.prod(layout.row_shape) * np.dtype(layout.dtype).itemsize


def _must_begin_anew(run: Opened, plan: Mapping[str, Any]) -> bool:
    """Whether what is there is of no use: a matrix is wanted that is not kept, or its rankings are of another length.

    A finished matrix stays where none is asked for.
    """
    wanted, kept = run.options.influence.matrix, bool(plan.get("matrix", True))
    if wanted and kept:
        return False
    records = run.folder.records("influence")
    if kept:
        return len(records) < int(plan["n_rows"])
    return wanted or (bool(records) and state_of(run) is None)


def _n_tiles(folder: RunFolder, tests: Sequence[Sequence[int]], tile_blocks: int) -> int:
    return len(tests) * -(-len(folder.stage_blocks("grads")) // tile_blocks)


def _extend(folder: RunFolder) -> None:
    """Plan tiles for test samples that came to stage 2 since; the tiles that there are stay as they are.

    The rankings go first and the matrix loses its name (`_open_matrix`): nobody takes the old ones for the new.
    """
    plan, tests = folder.plan("influence"), tile_rows_of(folder)
    more = uncovered(folder, tests[-1][1], plan["tile_rows"])
    if more:
        folder.drop(["rankings"])
        n_tiles = _n_tiles(folder, tests + more, plan["tile_blocks"])
        folder.remember("influence", tests=tests + more, n_rows=n_tiles)


def _open_matrix(run: Opened, anew: bool) -> MatrixFile:
    """The matrix under the name of an unfinished one; rows of test samples that nobody asked for are NaN."""
    final, partial = run.folder.path / FINAL, run.folder.path / PARTIAL
    if anew:
        shape, asked = (len(run.task.test), len(run.task.train)), matrix_tests(run.folder)
        create_matrix(partial, shape, np.setdiff1d(np.arange(shape[0]), asked))
    elif final.exists():
        os.replace(final, partial)
        sync_together([run.folder.path])
    return MatrixFile(partial, writable=True)


def _compute(
    run: Opened, tiles: Sequence[Tile], todo: Sequence[Tile], done: set[int], skipped: Sequence[int],
    standings: Standings | None,
) -> None:  # fmt: skip
    """Compute the tiles `todo` into the matrix and the standings, or the standings alone."""
    folder = run.folder
    forms = Forms.from_json(folder.plan("grads")["forms"])
    samples = folder.samples("stest")
    total, left = (sum(len(tested(samples, tile.test)) * tile.width for tile in chosen) for chosen in (tiles, todo))
    tally: Tally
    if has_matrix(folder):
        tally = IntoMatrix(folder, _open_matrix(run, anew=not done), standings)
    else:
        assert standings is not None
        tally = IntoRankings(run, standings, done)
    with closing(tally), progress("influence", total, total - left, "pair", run.options.resources.progress) as bar:
        for tile, values, seconds in tile_values(run, forms, todo, bar.advance):
            values[:, column_mask(tile.columns, skipped)] = np.nan
            tally.put(tile, values, seconds)
            run.check()


def _finish(folder: RunFolder) -> None:
    """Give the complete matrix its name; a kill may have left the sums of its last tile."""
    if (folder.path / PARTIAL).exists():
        os.replace(folder.path / PARTIAL, folder.path / FINAL)
        sync_together([folder.path])
    remove([sums_of(folder.path, "influence")])
