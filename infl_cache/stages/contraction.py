"""Tiles of the matrix from the two stores: an accumulator in memory, the parameters in slabs (see `schedule`).

All parameters of a tile are summed up at a time, or those of one layer. The sums are kept meanwhile: a kill loses at
most a few minutes of a tile, and what is carried on with the same `--memory` has the same bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infl_cache.disk.durable import remove
from infl_cache.disk.layout import Block
from infl_cache.disk.matrix import Floats
from infl_cache.errors import Interrupted
from infl_cache.maths import scores
from infl_cache.maths.capture import Forms
from infl_cache.maths.narrow import NARROW
from infl_cache.maths.parts import Part, whole
from infl_cache.stages.grads import rows_at_once
from infl_cache.stages.kept import KeptState
from infl_cache.stages.opening import Opened, log
from infl_cache.stages.rounding import TEST_SAMPLES, measured_rounding, product_error
from infl_cache.stages.schedule import Slab, slabs
from infl_cache.stages.solutions import solution_layout, solution_reader
from infl_cache.stages.source import gradient_reader, piece_reader
from infl_cache.stages.stored import GradientPiece
from infl_cache.stages.tiles import Tile, tested, tile_rows_of

KEEP_SECONDS = 120.0
# What an interrupt throws away rather than wait for the disk.
WORTH_KEEPING_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What is summed up at a time: of a tile what a part of the parameters gives, all of them or those of a layer."""

    tile: Tile
    part: Part
    layer: int | None = None


# One step: a slab of a job by a training block.
Step = tuple[Job, Slab, Block]
# The slabs of a job, by its layer and its row of tiles.
Cut = Mapping[tuple[int | None, int], Sequence[Slab]]


def sums_of(folder: Path, stage: str) -> Path:
    """Where the sums of a stage's tile are kept until the tile is a fact."""
    return folder / f"{stage}.tile"


def tile_values(
    run: Opened, forms: Forms, todo: Sequence[Tile], advance: Callable[[int], None]
) -> Iterator[tuple[Tile, Floats, float]]:
    """The influences of each tile, with the seconds it took; `advance` is told of pairs as they are done."""
    _measure_errors(run, forms)
    jobs = [Job(tile, whole(forms)) for tile in todo]
    for job, values, seconds in job_values(run, forms, "influence", jobs, advance):
        yield job.tile, values, seconds


def job_values(
    run: Opened, forms: Forms, stage: str, todo: Sequence[Job], advance: Callable[[int], None]
) -> Iterator[tuple[Job, Floats, float]]:
    """What each job gives, with the seconds it took, by the slabs of the stage's plan."""
    dtype = product_dtype(run)
    narrow = torch.bfloat16 if run.options.influence.product_dtype == "bfloat16" else None
    with solution_reader(run) as read_test, piece_reader(run, forms, dtype) as read_train:
        kept = KeptState(
            sums_of(run.folder.path, stage), "the sums of a tile", "the tile starts at its beginning", log.warning
        )
        cut = _cut(run, stage, todo)
        following = itertools.chain(_steps(todo, cut), [None])
        next(following)
        asked: tuple[Block, Slab, scores.Queries] | None = None
        for job in todo:
            tile, sums = job.tile, Sums(run, kept, stage, job, dtype)
            for step, (_, slab, block) in enumerate(_steps([job], cut)):
                after = next(following)
                if step < sums.done:
                    continue
                if asked is None or asked[:2] != (tile.test, slab):
                    asked = None  # the last slab's memory goes before the next one's comes
                    rows = read_test(tile.test, slab.start, slab.stop, slab.part).to(narrow or dtype)
                    asked = (tile.test, slab, scores.queries(forms, rows, slab.part))
                expected = None if after is None else (after[2], after[1].part)
                for piece in read_train((block, slab.part), expected, partial(scores.plain_scores, asked[2])):
                    sums.add(slab, block, piece, asked[2])
                advance(sums.advanced(slab, block))
                sums.keep(step + 1)
            yield job, sums.values(len(run.task.train)), sums.seconds
            sums.forget()


def _cut(run: Opened, stage: str, todo: Sequence[Job]) -> Cut:
    plan, samples = run.folder.plan(stage), run.folder.samples("stest")
    itemsize = np.dtype(solution_layout(run).dtype).itemsize
    found: dict[tuple[int | None, int], list[Slab]] = {}
    for job in todo:
        rows = len(tested(samples, job.tile.test))
        if (job.layer, job.tile.test.index) not in found:
            cut = slabs(job.part, rows, itemsize, plan.get("slab_bytes", 0), plan.get("chunk_columns", 1))
            found[job.layer, job.tile.test.index] = list(cut)
    return found


def _steps(jobs: Sequence[Job], cut: Cut) -> Iterator[Step]:
    return (
        (job, slab, block) for job in jobs for slab in cut[job.layer, job.tile.test.index] for block in job.tile.train
    )


class Sums:
    """The accumulator of one job, (m, w) as its tile, as far as it had come when it was kept last."""

    def __init__(self, run: Opened, kept: KeptState, stage: str, job: Job, dtype: torch.dtype) -> None:
        self._run, self._kept, self._tile = run, kept, (tile := job.tile)
        self._identity: dict[str, Any] = {
            stage: run.folder.fingerprint(stage),
            "slab_bytes": run.folder.plan(stage).get("slab_bytes", 0),
            "test": [tile.test.start, tile.test.stop],
            "train": [tile.columns.start, tile.columns.stop],
            **({} if job.layer is None else {"layer": job.layer}),
        }
        rows = len(tested(run.folder.samples("stest"), tile.test))
        self._sums, self.done, before = torch.zeros(rows, tile.width, dtype=dtype, device=run.device), 0, 0.0
        if kept.path.exists() and (found := kept.read(self._identity, run.device)):
            header, state = found
            self._sums, self.done, before = state["sums"], int(header.facts["steps"]), float(header.facts["seconds"])
        self._started = time.perf_counter() - before
        self._due = time.perf_counter() + KEEP_SECONDS
        self._work = self._told = 0

    @property
    def seconds(self) -> float:
        """Since the tile was begun, of all processes that had it."""
        return time.perf_counter() - self._started

    def add(self, slab: Slab, block: Block, piece: GradientPiece, asked: scores.Queries) -> None:
        """Add what a piece of a block's gradients gives."""
        first = block.start - self._tile.columns.start
        into = self._sums[slab.start : slab.stop, first + piece.rows.start : first + piece.rows.stop]
        if piece.dots is not None:
            into += piece.dots
        if piece.plain is not None:
            into += scores.plain_scores(asked, piece.plain, piece.start)
        if piece.factors is not None:
            scores.add_factored_scores(asked, piece.factors, self._run.budget // 8, into)

    def advanced(self, slab: Slab, block: Block) -> int:
        """Pairs that this slab of a block is worth, in proportion to its parameters."""
        self._work += (slab.stop - slab.start) * block.rows * slab.part.size
        told, self._told = self._told, self._work // slab.part.forms.parameters.size
        return self._told - told

    def keep(self, steps: int) -> None:
        """Keep the sums after `steps` steps, if the last time is long ago or somebody interrupts."""
        if time.perf_counter() >= self._due:
            self._write(steps)
        try:
            self._run.check()
        except Interrupted:
            if self.seconds > WORTH_KEEPING_SECONDS:
                self._write(steps)
            raise

    def _write(self, steps: int) -> None:
        self._kept.write(self._identity, {"steps": steps, "seconds": self.seconds}, {"sums": self._sums})
        self._due = time.perf_counter() + KEEP_SECONDS

    def values(self, n_train: int) -> Floats:
        """The influences, or what the part gives to them, once everything has been added."""
        return scores.influence(self._sums, n_train).to("cpu", torch.float32).numpy()

    def forget(self) -> None:
        """The tile is a fact now, or in the standings."""
        remove([self._kept.path])


def product_dtype(run: Opened) -> torch.dtype:
    """The type of the sums: float64 if gradients or s_test are kept in it, else float32."""
    if run.options.influence.product_dtype == "bfloat16":
        return torch.float32
    kept = {run.folder.manifest.stages["grads"]["identity"]["dtype"], solution_layout(run).dtype}
    return torch.float64 if "float64" in kept else torch.float32


def _measure_errors(run: Opened, forms: Forms) -> None:
    """Once a run, what 16-bit gradients and products do to the influences of the first test samples."""
    plan, stored = run.folder.plan("influence"), run.folder.manifest.stages["grads"]["identity"]["dtype"]
    at_once = rows_at_once(run)
    rounds = stored in NARROW and run.options.grads.cache and "rounding" not in plan
    multiplies = run.options.influence.product_dtype != "float32" and "product_error" not in plan
    if not rounds and not multiplies:
        return
    start, stop = tile_rows_of(run.folder)[0]
    tile = Block(0, start, stop)
    count = min(len(tested(run.folder.samples("stest"), tile)), TEST_SAMPLES, at_once)
    with solution_reader(run) as read_test:
        first = read_test(tile, 0, count, whole(forms))
    finite = first[torch.isfinite(first).all(1)]
    if rounds and len(finite):
        run.folder.remember("influence", rounding=measured_rounding(run, forms, stored, finite, at_once))
    if multiplies and len(finite):
        dtype = product_dtype(run)
        factors, dense = gradient_reader(run, forms, dtype)(run.folder.stage_blocks("grads")[0])
        error = product_error(forms, finite.to(dtype), factors, dense, run.budget // 8)
        run.folder.remember("influence", product_error=error)
