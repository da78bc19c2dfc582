"""Stage 3: both stores streamed through a blocked product into `influence.npy`, and the rankings made of it.

Test tiles outermost: one tile of s_test stays in memory while the gradients pass by once. The unit of
work and of commit is a tile of the matrix: the rows of a test tile by a run of training blocks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.durable import crc32c, sync_folders
from infl_cache.disk.layout import Block, blocks
from infl_cache.disk.ledger import BlockRecord, FileRecord
from infl_cache.disk.matrix import Floats, MatrixFile, create_matrix
from infl_cache.disk.run import Force, RunFolder
from infl_cache.disk.store import Store
from infl_cache.errors import DamagedStore, IncompleteStore
from infl_cache.maths import scores
from infl_cache.maths.capture import Forms
from infl_cache.maths.narrow import NARROW
from infl_cache.progress import progress
from infl_cache.stages.blocks import some
from infl_cache.stages.grads import grads, rows_at_once
from infl_cache.stages.opening import Opened, StageResult, summary
from infl_cache.stages.rankings import write_rankings
from infl_cache.stages.rounding import TEST_SAMPLES, measured_rounding
from infl_cache.stages.same import check_against_store
from infl_cache.stages.source import gradient_reader

FINAL, PARTIAL = "influence.npy", "influence.partial.npy"
TILE_COLUMNS = 4096


@dataclass(frozen=True)
class Tile:
    """Rows `test` by the columns of the training blocks `train`: tile `index` of the matrix."""

    index: int
    test: Block
    train: tuple[Block, ...]

    @property
    def columns(self) -> slice:
        """The tile's columns in the matrix."""
        return slice(self.train[0].start, self.train[-1].stop)


def influence(run: Opened, force: Force = False) -> StageResult:
    """Compute what is missing of `influence.npy`, then the rankings."""
    started = time.perf_counter()
    folder = run.folder
    if not run.options.grads.cache:
        grads(run)  # losses and digests only
    skipped_train, skipped_test = _require_parents(run)
    identity = {"grads": folder.fingerprint("grads"), "stest": folder.fingerprint("stest")}
    plan = folder.claim("influence", run.task_identity, identity, force)
    check_against_store(run, "grads")
    check_against_store(run, "stest")
    shape = (len(run.task.test), len(run.task.train))
    if plan is None:
        folder.begin("influence", run.task_identity, identity, _plan(run))
    tiles = planned_tiles(folder)
    done = checked_tiles(folder, tiles)
    todo = [tile for tile in tiles if tile.index not in done]
    if todo:
        _compute(run, tiles, todo, shape, skipped_train)
    _finish(folder)
    write_rankings(run, bool(force) or bool(todo))
    notes = [f"test samples {some(skipped_test)} have no s_test; their rows are NaN"] if skipped_test else []
    if skipped_train:
        notes.append(f"train samples {some(skipped_train)} have no finite gradient; their columns are NaN")
    return summary(
        run, "influence", shape[0], sum({tile.test: tile.test.rows for tile in todo}.values()), started, notes
    )


def _require_parents(run: Opened) -> tuple[list[int], list[int]]:
    """Rows of the two stores that are not finite; `IncompleteStore` unless both are finished and fit to be used."""
    bad: dict[str, list[int]] = {}
    for stage in ("grads", "stest"):
        records = run.folder.require_complete(stage)
        bad[stage] = [row for record in records.values() for row in record.bad_rows]
        if bad[stage] and run.options.influence.nonfinite == "stop":
            raise IncompleteStore(
                f"{stage}: expected finite rows, found NaN or Inf at {some(bad[stage])};"
                " mend them, or leave them out by --nonfinite skip"
            )
    return bad["grads"], bad["stest"]


def _plan(run: Opened) -> dict[str, int]:
    """Rows of a tile from the memory that a tile of s_test takes; training blocks of a tile from its columns."""
    n_test, size = len(run.task.test), run.parameters.size
    stored = {layout.path: layout for layout in run.folder.array_layouts("stest")}["s_test"]
    fitting = max(1, run.budget // 4 // (size * np.dtype(stored.dtype).itemsize))
    tile_rows = min(run.options.resources.tile_rows or fitting, n_test)
    block_rows = run.folder.plan("grads")["block_rows"]
    tile_blocks = max(1, TILE_COLUMNS // block_rows)
    n_blocks = len(run.folder.stage_blocks("grads"))
    n_tiles = -(-n_test // tile_rows) * -(-n_blocks // tile_blocks)
    return {"n_rows": n_tiles, "block_rows": 1, "tile_rows": tile_rows, "tile_blocks": tile_blocks}


def all_tiles(shape: tuple[int, int], tile_rows: int, train: Sequence[Block], tile_blocks: int) -> list[Tile]:
    """The tiles of a matrix in the order they are computed: every entry in exactly one."""
    groups = [tuple(train[i : i + tile_blocks]) for i in range(0, len(train), tile_blocks)]
    pairs = [(test, group) for test in blocks(shape[0], tile_rows) for group in groups]
    return [Tile(index, test, group) for index, (test, group) in enumerate(pairs)]


def _compute(
    run: Opened, tiles: Sequence[Tile], todo: Sequence[Tile], shape: tuple[int, int], skipped: Sequence[int]
) -> None:
    """Fill, sync and commit the given tiles."""
    folder = run.folder
    path = folder.path / PARTIAL
    if len(todo) == len(tiles):
        create_matrix(path, shape)
    forms = Forms.from_json(folder.plan("grads")["forms"])
    matrix = MatrixFile(path, writable=True)
    finished = sum(tile.test.rows * (tile.columns.stop - tile.columns.start) for tile in tiles if tile not in todo)
    try:
        with progress("influence", shape[0] * shape[1], finished, "pair", run.options.resources.progress) as bar:
            for tile, values, seconds in _tile_values(run, forms, todo):
                values[:, np.isin(np.arange(tile.columns.start, tile.columns.stop), skipped)] = np.nan
                matrix.write(tile.test.start, tile.columns.start, values)
                matrix.sync()
                record = FileRecord(FINAL, values.nbytes, crc32c(values.tobytes()))
                folder.commit("influence", Block(tile.index, tile.index, tile.index + 1), [record], seconds)
                bar.advance(values.size)
                run.check()
    finally:
        matrix.close()


def _tile_values(run: Opened, forms: Forms, todo: Sequence[Tile]) -> Iterator[tuple[Tile, Floats, float]]:
    """The influences of each tile, with the seconds it took."""
    dtype = _product_dtype(run)
    read_test, read_train = _tested_rows(run, run.folder.store("stest")), gradient_reader(run, forms, dtype)
    _measure_rounding(run, forms, read_test)
    n_train = len(run.task.train)
    loaded: tuple[Block, scores.Queries] | None = None
    for tile in todo:
        started = time.perf_counter()
        if loaded is None or loaded[0] != tile.test:
            loaded = None  # the last tile's memory goes before the next one's comes
            loaded = (tile.test, scores.queries(forms, read_test(tile.test).to(dtype)))
        pieces = []
        for block in tile.train:
            factors, dense = read_train(block)
            dots = scores.scores(forms, loaded[1], factors, dense, run.budget // 8)
            pieces.append(scores.influence(dots, n_train).to("cpu", torch.float32).numpy())
        yield tile, np.concatenate(pieces, axis=1), time.perf_counter() - started


def _measure_rounding(run: Opened, forms: Forms, read_test: Callable[[Block], Tensor]) -> None:
    """Once a run, what 16-bit gradients do to the influences of the first test samples; kept for `status`."""
    stored = run.folder.manifest.stages["grads"]["identity"]["dtype"]
    if stored not in NARROW or not run.options.grads.cache or "rounding" in run.folder.plan("influence"):
        return
    at_once = rows_at_once(run)
    first = read_test(Block(0, 0, min(len(run.task.test), TEST_SAMPLES, at_once)))
    finite = first[torch.isfinite(first).all(1)]
    if len(finite):
        run.folder.remember("influence", rounding=measured_rounding(run, forms, stored, finite, at_once))


def _tested_rows(run: Opened, store: Store) -> Callable[[Block], Tensor]:
    """A function that reads the s_test rows of a tile, whatever blocks they were stored in."""
    records = run.folder.records("stest")
    stored = run.folder.stage_blocks("stest")

    def read(tile: Block) -> Tensor:
        layout = store.layouts["s_test"]
        rows = np.empty((tile.rows, *layout.row_shape), layout.dtype)
        for block in stored:
            start, stop = max(block.start, tile.start), min(block.stop, tile.stop)
            if start < stop:
                run.folder.check_block(records[block.index])
                part = store.read_block(Block(block.index, start, stop), ["s_test"])["s_test"]
                rows[start - tile.start : stop - tile.start] = part
        return torch.from_numpy(rows).to(run.device)

    return read


def _product_dtype(run: Opened) -> torch.dtype:
    """The type of the products: float64 if gradients or s_test are kept in it, else float32."""
    kept = [run.folder.manifest.stages["grads"]["identity"]["dtype"]]
    kept += [layout.dtype for layout in run.folder.array_layouts("stest") if layout.path == "s_test"]
    return torch.float64 if "float64" in kept else torch.float32


def checked_tiles(folder: RunFolder, tiles: Sequence[Tile]) -> dict[int, BlockRecord]:
    """The committed tiles, each compared with its checksum; `DamagedStore` names rows and columns otherwise."""
    records = folder.records("influence")
    if not records:
        return {}
    name = FINAL if (folder.path / FINAL).exists() else PARTIAL
    if not (folder.path / name).exists():
        raise DamagedStore(f"{folder.path / FINAL}: expected a matrix, found no file; run infl-cache influence --force")
    matrix = MatrixFile(folder.path / name)
    try:
        for tile in tiles:
            if tile.index in records:
                width = tile.columns.stop - tile.columns.start
                values = matrix.read(tile.test.start, tile.test.stop, tile.columns.start, width)
                if crc32c(values.tobytes()) != records[tile.index].files[0].crc:
                    raise DamagedStore(
                        f"{folder.path / name}: test rows {tile.test.start} to {tile.test.stop - 1}, train columns"
                        f" {tile.columns.start} to {tile.columns.stop - 1} are not what was committed;"
                        " run infl-cache influence --force"
                    )
    finally:
        matrix.close()
    return records


def planned_tiles(folder: RunFolder) -> list[Tile]:
    """The tiles of a run's matrix as the stage was begun."""
    plan = folder.plan("influence")
    shape = (folder.plan("stest")["n_rows"], folder.plan("grads")["n_rows"])
    return all_tiles(shape, plan["tile_rows"], folder.stage_blocks("grads"), plan["tile_blocks"])


def require_sound_matrix(folder: RunFolder) -> None:
    """Raise unless `influence.npy` is finished and, byte for byte, what was committed."""
    folder.require_complete("influence")
    checked_tiles(folder, planned_tiles(folder))
    if not (folder.path / FINAL).exists():
        raise IncompleteStore(f"{folder.path / FINAL}: expected a finished matrix, found none; run influence")


def _finish(folder: RunFolder) -> None:
    """Give the complete matrix its name."""
    if (folder.path / PARTIAL).exists():
        os.replace(folder.path / PARTIAL, folder.path / FINAL)
        sync_folders([folder.path])
