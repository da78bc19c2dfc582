"""What each layer gives to the influences, into `influence_by_layer.npy`: see `layers` for what that is.

The tiles are those of the finished matrix, once more for each layer; the unit of work and of commit is a tile of a
layer. The layers come one after the other, each with all tiles of some test samples: s_test is read once, what a
layer's gradients are made of once for each row of tiles. Gradients that are not kept are made whole, so there all
layers of a tile follow one another: those of a tile of one block are made once.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from infl_cache.disk.durable import remove, sync_together, write_atomically
from infl_cache.disk.layout import Block
from infl_cache.disk.matrix import MatrixFile, create_matrix
from infl_cache.disk.run import RunFolder
from infl_cache.disk.trial import allocated_bytes
from infl_cache.maths.capture import Forms
from infl_cache.maths.parts import Part, by_module
from infl_cache.progress import progress
from infl_cache.stages.again import chosen, claim_again
from infl_cache.stages.contraction import Job, job_values, sums_of
from infl_cache.stages.layers import (
    BY_LAYER,
    BY_LAYER_PARTIAL,
    SHARES,
    SHARES_FILE,
    STAGE,
    checked_layers,
    covered_tiles,
    shares_of,
)
from infl_cache.stages.opening import Opened, StageResult, summary
from infl_cache.stages.room import require_room
from infl_cache.stages.tally import column_mask, commit_rows
from infl_cache.stages.tiles import in_layer, matrix_tests, planned_tiles, tested


def by_layer(run: Opened, only: Collection[int] | None = None) -> StageResult:
    """Compute what is missing of `influence_by_layer.npy`, then `by_layer.npz`; the matrix is finished.

    The damaged blocks `only` are forgotten and made again, and the second file if it is damaged; nothing else is done.
    Raises `DamagedStore` if a tile is not what was committed. A file that was removed is made anew.
    """
    started, folder = time.perf_counter(), run.folder
    parts = by_module(Forms.from_json(folder.plan("grads")["forms"]))
    tiles, names = planned_tiles(folder), list(parts)
    if only is None:
        _begin_or_extend(run, names, len(tiles) * len(parts))
    else:
        only, tiles = _claim_again(run, only), covered_tiles(folder)
    done = checked_layers(folder)
    every = [Job(tile, part, layer) for tile in tiles for layer, part in enumerate(parts.values())]
    if run.options.grads.cache:
        every.sort(key=lambda job: (job.tile.test.index, job.layer, job.tile.index))
    blocks = [in_layer(job.tile, job.layer or 0, len(parts)) for job in every]
    todo = [job for job, block in zip(every, blocks, strict=True) if block not in done and chosen(block, only)]
    if todo:
        _require_room(run, len(names))
        _compute(run, names, every, todo, not done)
    if only is None or len(folder.records(STAGE)) == len(every):
        _finish(folder)
    if only is None or len(folder.records(STAGE)) == len(planned_tiles(folder)) * len(parts):
        _write_shares(run, parts, bool(todo) and only is None)
    samples = folder.samples("stest")
    rows = [
        sum(len(tested(samples, test)) for _, test in {(job.layer, job.tile.test) for job in jobs})
        for jobs in (every, todo)
    ]
    return summary(run, STAGE, rows[0], rows[1], started)


def _claim_again(run: Opened, damaged: Collection[int]) -> set[int]:
    """`claim_again`; a file of which nothing is left goes."""
    folder = run.folder
    only = claim_again(run, STAGE, {"influence": folder.fingerprint("influence")}, damaged)
    if not folder.records(STAGE):
        remove(folder.path / name for name in (BY_LAYER, BY_LAYER_PARTIAL))
    return only


def _begin_or_extend(run: Opened, names: Sequence[str], n_blocks: int) -> None:
    """Begin the stage where it has not been, or add the blocks of test samples that came since."""
    folder, identity = run.folder, {"influence": run.folder.fingerprint("influence")}
    plan = folder.claim(STAGE, run.task_identity, identity, False)
    if plan is not None and not any((folder.path / name).exists() for name in (BY_LAYER, BY_LAYER_PARTIAL)):
        plan = folder.claim(STAGE, run.task_identity, identity, True)
    if plan is None:
        folder.begin(STAGE, run.task_identity, identity, _plan(run, names, n_blocks))
    elif plan["n_rows"] < n_blocks:
        # The old shares go first, and the file loses its name before anything is written: nobody takes them for new.
        folder.drop([SHARES])
        folder.remember(STAGE, n_rows=n_blocks)


def _plan(run: Opened, names: Sequence[str], n_blocks: int) -> dict[str, Any]:
    """A layer whose part of a tile's s_test fits a quarter of the memory is one slab."""
    stored = {each.path: each for each in run.folder.array_layouts("grads")}
    chunk_columns = stored["dense"].chunk_row_shape[0] if "dense" in stored else 1
    sizes = {"slab_bytes": max(1, run.budget // 4), "chunk_columns": chunk_columns}
    return {"n_rows": n_blocks, "block_rows": 1, "layers": list(names), **sizes}


def _require_room(run: Opened, n_layers: int) -> None:
    """`DiskFull` unless the whole file fits on the disk; what is on the disk of it counts."""
    n_test, n_train = len(run.task.test), len(run.task.train)
    there = sum(allocated_bytes(run.folder.path / name) for name in (BY_LAYER, BY_LAYER_PARTIAL))
    what = f"the influences of {n_layers:,} layers, {n_train:,} training on {n_test:,} test samples"
    require_room(run.folder, "by-layer", 4 * n_layers * n_test * n_train - there, what, "or --no-by-layer")


def _open_matrices(run: Opened, n_layers: int, anew: bool) -> MatrixFile:
    """The file under the name of an unfinished one; rows of test samples that nobody asked for are NaN."""
    final, partial = run.folder.path / BY_LAYER, run.folder.path / BY_LAYER_PARTIAL
    if anew:
        n_test = len(run.task.test)
        unasked = np.setdiff1d(np.arange(n_test), matrix_tests(run.folder))
        empty = (np.arange(n_layers)[:, None] * n_test + unasked).reshape(-1)
        create_matrix(partial, (n_layers, n_test, len(run.task.train)), empty)
    elif final.exists():
        os.replace(final, partial)
        sync_together([run.folder.path])
    return MatrixFile(partial, writable=True, leading=(n_layers,))


def _compute(run: Opened, names: Sequence[str], every: Sequence[Job], todo: Sequence[Job], anew: bool) -> None:
    """Compute the jobs `todo` into the file, each a fact as soon as it is synced and in the ledger."""
    folder, samples, n_test = run.folder, run.folder.samples("stest"), len(run.task.test)
    forms = Forms.from_json(folder.plan("grads")["forms"])
    skipped = [row for record in folder.records("grads").values() for row in record.bad_rows]
    total, left = (sum(len(tested(samples, job.tile.test)) * job.tile.width for job in jobs) for jobs in (every, todo))
    matrices = _open_matrices(run, len(names), anew)
    show = run.options.resources.progress
    with closing(matrices), progress("by layer", total, total - left, "pair", show) as bar:
        for job, values, seconds in job_values(run, forms, STAGE, todo, bar.advance):
            tile, layer = job.tile, job.layer or 0
            values[:, column_mask(tile.columns, skipped)] = np.nan
            rows, index = layer * n_test + tested(samples, tile.test), in_layer(tile, layer, len(names))
            commit_rows(folder, STAGE, index, matrices, rows, tile.columns.start, values, seconds)
            run.check()


def _finish(folder: RunFolder) -> None:
    """Give the complete file its name; a kill may have left the sums of its last tile."""
    if (folder.path / BY_LAYER_PARTIAL).exists():
        os.replace(folder.path / BY_LAYER_PARTIAL, folder.path / BY_LAYER)
        sync_together([folder.path])
    remove([sums_of(folder.path, STAGE)])


def _write_shares(run: Opened, parts: Mapping[str, Part], anew: bool) -> None:
    """`by_layer.npz`: `names`, `parameters`, `share` and `share_of_all`, as in `LayerShares`."""
    folder, records = run.folder, run.folder.records(SHARES)
    there = 0 in records and (folder.path / SHARES_FILE).is_file()
    if not anew and there and folder.record_file(SHARES_FILE) in records[0].files:
        return
    identity = {STAGE: folder.fingerprint(STAGE)}
    folder.begin(SHARES, run.task_identity, identity, {"n_rows": 1, "block_rows": 1})
    started, buffer = time.perf_counter(), io.BytesIO()
    found = shares_of(folder, list(parts), [part.size for part in parts.values()], run.budget // 8)
    np.savez(
        buffer, names=np.array(found.names), parameters=found.parameters, share=found.share,
        share_of_all=found.share_of_all,
    )  # fmt: skip
    write_atomically(folder.path / SHARES_FILE, buffer.getvalue())
    folder.commit(SHARES, Block(0, 0, 1), [folder.record_file(SHARES_FILE)], time.perf_counter() - started)
