"""Stage 3: both stores streamed through a blocked product into `influence.npy`, and the rankings made of it.

Test tiles outermost: one tile of s_test stays in memory while the gradients pass by once. The unit of
work and of commit is a tile of the matrix: the rows of a test tile by a run of training blocks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.durable import sync_folders
from infl_cache.disk.layout import Block
from infl_cache.disk.matrix import Floats, MatrixFile, create_matrix
from infl_cache.disk.run import Force, RunFolder
from infl_cache.disk.store import Store
from infl_cache.errors import IncompleteStore
from infl_cache.maths import scores
from infl_cache.maths.capture import Forms
from infl_cache.maths.narrow import NARROW
from infl_cache.progress import progress
from infl_cache.stages.blocks import some
from infl_cache.stages.grads import grads, rows_at_once
from infl_cache.stages.opening import Opened, StageResult, log, summary
from infl_cache.stages.rankings import ROOM, has_matrix, new_standings, write_rankings
from infl_cache.stages.rounding import TEST_SAMPLES, measured_rounding, product_error
from infl_cache.stages.same import check_against_store
from infl_cache.stages.selection import asked_tests, held_tests
from infl_cache.stages.source import piece_reader
from infl_cache.stages.standings import Standings
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


def influence(run: Opened, force: Force = False) -> StageResult:
    """Compute what is missing of `influence.npy`, then the rankings."""
    started = time.perf_counter()
    folder = run.folder
    if not run.options.grads.cache:
        grads(run)  # losses and digests only
    skipped_train, skipped_test = _require_parents(run)
    _require_asked(run)
    identity = {"grads": folder.fingerprint("grads"), "stest": folder.fingerprint("stest")}
    if run.options.influence.product_dtype != "float32":
        identity["product_dtype"] = run.options.influence.product_dtype
    plan = folder.claim("influence", run.task_identity, identity, force)
    if plan is not None and _must_begin_anew(run, plan):
        plan = folder.claim("influence", run.task_identity, identity, True)
    check_against_store(run, "grads")
    check_against_store(run, "stest")
    if plan is None:
        folder.begin("influence", run.task_identity, identity, _plan(run))
    else:
        _extend(folder)
    tiles = planned_tiles(folder)
    standings: Standings | None = None
    if has_matrix(folder):
        done = set(checked_tiles(folder, tiles))
        standings = None if done else new_standings(run)  # else made from the matrix: some tiles passed earlier
    else:
        standings, done = resumed(run)
    todo = [tile for tile in tiles if tile.index not in done]
    if todo:
        _compute(run, tiles, todo, skipped_train, standings)
    _finish(folder)
    write_rankings(run, bool(force) or bool(todo), standings)
    notes = [f"test samples {some(skipped_test)} have no s_test; their rows are NaN"] if skipped_test else []
    if skipped_train:
        notes.append(f"train samples {some(skipped_train)} have no finite gradient; their columns are NaN")
    for note in (uncertain := _uncertain(folder, skipped_test)):
        log.warning(note)
    notes += uncertain
    samples = folder.samples("stest")
    rows = [sum(len(tested(samples, test)) for test in {tile.test for tile in chosen}) for chosen in (tiles, todo)]
    return summary(run, "influence", rows[0], rows[1], started, notes)


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
    """Rows of a tile from the memory that a tile of s_test takes; training blocks of a tile from its columns."""
    n_test, size = len(run.task.test), run.parameters.size
    stored = {layout.path: layout for layout in run.folder.array_layouts("stest")}["s_test"]
    fitting = max(1, run.budget // 4 // (size * np.dtype(stored.dtype).itemsize))
    tile_rows = min(run.options.resources.tile_rows or fitting, n_test)
    tile_blocks = max(1, TILE_COLUMNS // run.folder.plan("grads")["block_rows"])
    tests = uncovered(run.folder, 0, tile_rows)
    sizes = {"tile_rows": tile_rows, "tile_blocks": tile_blocks, "tests": tests}
    if not run.options.influence.matrix:
        # What fits is settled here: a run goes on with another --memory.
        sizes |= {"matrix": False, "room": run.budget // ROOM}
    return {"n_rows": _n_tiles(run.folder, tests, tile_blocks), "block_rows": 1, **sizes}


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
        sync_folders([run.folder.path])
    return MatrixFile(partial, writable=True)


def _compute(
    run: Opened, tiles: Sequence[Tile], todo: Sequence[Tile], skipped: Sequence[int], standings: Standings | None
) -> None:
    """Compute the tiles `todo` into the matrix and the standings, or the standings alone."""
    folder = run.folder
    forms = Forms.from_json(folder.plan("grads")["forms"])
    samples = folder.samples("stest")
    total, left = (sum(len(tested(samples, tile.test)) * tile.width for tile in chosen) for chosen in (tiles, todo))
    tally: Tally
    if has_matrix(folder):
        tally = IntoMatrix(folder, _open_matrix(run, anew=len(todo) == len(tiles)), standings)
    else:
        assert standings is not None
        tally = IntoRankings(run, standings, {tile.index for tile in tiles} - {tile.index for tile in todo})
    with closing(tally), progress("influence", total, total - left, "pair", run.options.resources.progress) as bar:
        for tile, values, seconds in _tile_values(run, forms, todo):
            values[:, column_mask(tile.columns, skipped)] = np.nan
            tally.put(tile, values, seconds)
            bar.advance(values.size)
            run.check()


def _tile_values(run: Opened, forms: Forms, todo: Sequence[Tile]) -> Iterator[tuple[Tile, Floats, float]]:
    """The influences of each tile, with the seconds it took."""
    dtype = _product_dtype(run)
    read_test = _tested_rows(run, run.folder.store("stest"))
    _measure_rounding(run, forms, read_test)
    narrow = torch.bfloat16 if run.options.influence.product_dtype == "bfloat16" else None
    n_train = len(run.task.train)
    order = [block for tile in todo for block in tile.train]
    following = iter([*order[1:], None])
    loaded: tuple[Block, scores.Queries] | None = None
    with piece_reader(run, forms, dtype) as read_train:
        for tile in todo:
            started = time.perf_counter()
            if loaded is None or loaded[0] != tile.test:
                loaded = None  # the last tile's memory goes before the next one's comes
                loaded = (tile.test, scores.queries(forms, read_test(tile.test).to(narrow or dtype)))
            found = []
            for block in tile.train:
                for factors, dense in read_train(block, next(following)):
                    if narrow and "product_error" not in run.folder.plan("influence"):
                        first = read_test(tile.test)[:TEST_SAMPLES].to(dtype)
                        error = product_error(forms, first, factors, dense, run.budget // 8)
                        run.folder.remember("influence", product_error=error)
                    dots = scores.scores(forms, loaded[1], factors, dense, run.budget // 8)
                    found.append(scores.influence(dots, n_train))
            values = torch.cat(found, 1).to("cpu", torch.float32).numpy()
            yield tile, values, time.perf_counter() - started


def _measure_rounding(run: Opened, forms: Forms, read_test: Callable[[Block], Tensor]) -> None:
    """Once a run, what 16-bit gradients do to the influences of the first test samples; kept for `status`."""
    stored = run.folder.manifest.stages["grads"]["identity"]["dtype"]
    if stored not in NARROW or not run.options.grads.cache or "rounding" in run.folder.plan("influence"):
        return
    at_once = rows_at_once(run)
    first = read_test(Block(0, 0, min(tile_rows_of(run.folder)[0][1], TEST_SAMPLES, at_once)))
    finite = first[torch.isfinite(first).all(1)]
    if len(finite):
        run.folder.remember("influence", rounding=measured_rounding(run, forms, stored, finite, at_once))


def _tested_rows(run: Opened, store: Store) -> Callable[[Block], Tensor]:
    """A function that reads the s_test rows of a tile, whatever blocks they were stored in."""
    records, samples = run.folder.records("stest"), run.folder.samples("stest")
    stored = run.folder.stage_blocks("stest")

    def read(tile: Block) -> Tensor:
        layout, filled = store.layouts["s_test"], 0
        rows = np.empty((len(tested(samples, tile)), *layout.row_shape), layout.dtype)
        for block in stored:
            start, stop = max(block.start, tile.start), min(block.stop, tile.stop)
            if start < stop:
                run.folder.check_block(records[block.index])
                part = store.read_block(Block(block.index, start, stop), ["s_test"])["s_test"]
                rows[filled : filled + len(part)] = part
                filled += len(part)
        return torch.from_numpy(rows).to(run.device)

    return read


def _product_dtype(run: Opened) -> torch.dtype:
    """The type of the products: float64 if gradients or s_test are kept in it, else float32."""
    kept = [run.folder.manifest.stages["grads"]["identity"]["dtype"]]
    kept += [layout.dtype for layout in run.folder.array_layouts("stest") if layout.path == "s_test"]
    if run.options.influence.product_dtype == "bfloat16":
        return torch.float32
    return torch.float64 if "float64" in kept else torch.float32


def _finish(folder: RunFolder) -> None:
    """Give the complete matrix its name."""
    if (folder.path / PARTIAL).exists():
        os.replace(folder.path / PARTIAL, folder.path / FINAL)
        sync_folders([folder.path])
