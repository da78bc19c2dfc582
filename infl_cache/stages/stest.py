"""Stage 2: s_test of every test sample into `s_test.zarr`, K of them solved together and committed as a block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import Block, array_layout
from infl_cache.errors import IncompleteStore
from infl_cache.maths.capture import Captured, Forms, capture, decide_forms, rows_of
from infl_cache.maths.curvature import Curvature, remembered
from infl_cache.maths.probe import activation_bytes, check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of, spread
from infl_cache.maths.solvers import Solution, make_solver
from infl_cache.maths.solvers.exact import COLUMNS
from infl_cache.maths.task import losses_of
from infl_cache.progress import Bar, progress
from infl_cache.stages.grads import CHECKED_SAMPLES, MAX_BATCH, rows_at_once, some
from infl_cache.stages.opening import (
    Opened,
    StageResult,
    block_digest,
    log,
    options_identity,
    stored_dtype,
    summary,
    test_identity,
)
from infl_cache.stages.same import check_against_store

MAX_RIGHT_HAND_SIDES = 128
# Vectors of n_params a right-hand side needs at once: itself, solution, residual, direction, product, vmap's own.
VECTORS_A_SIDE = 12
# Beyond this the host spends its time on fresh pages: on a CNN of 137k parameters, 32 vectors at once, products of
# 8 samples (64 MB) ran at 6,600 vector-samples/s, of 32 samples at 2,600.
HOST_WORKING_SET = 64 * 2**20
SMALLEST_BATCH = 8


def stest(run: Opened, force: bool = False) -> StageResult:
    """Compute what is missing of `s_test.zarr`; a finished store is left as it is.

    Raises `IncompleteStore` at the end if some rows are not finite; the others are done by then.
    """
    started = time.perf_counter()
    identity = {
        **options_identity(run.options.stest),
        **test_identity(run.task),
        "dtype": stored_dtype(run.parameters, run.task),
    }
    if run.folder.claim("stest", run.task_identity, identity, force) is None:
        _begin(run, identity)
    done = run.folder.done("stest")
    check_against_store(run, "stest")
    if "grads" in run.folder.manifest.stages:
        check_against_store(run, "grads")
    todo = [b for b in run.folder.stage_blocks("stest") if b.index not in done or done[b.index].bad_rows]
    notes = _compute(run, todo, len(run.task.test) - sum(b.rows for b in todo)) if todo else []
    bad = [row for record in run.folder.records("stest").values() for row in record.bad_rows]
    if bad and run.options.influence.nonfinite == "stop":
        raise IncompleteStore(
            f"s_test: expected finite numbers, found NaN or Inf at test samples {some(bad)}; the other"
            f" {len(run.task.test) - len(bad)} are done. More damping or --curvature ggn may help,"
            " or go on without them by --nonfinite skip"
        )
    return summary(run, "stest", len(run.task.test), sum(block.rows for block in todo), started, notes)


def _begin(run: Opened, identity: dict[str, Any]) -> None:
    """Try the task on test samples and lay out the store."""
    task, n_test, size = run.task, len(run.task.test), run.parameters.size
    check_independence(task, "test", spread(n_test, 4), run.device)
    check_gradients_arrive(task, run.parameters, spread(len(task.train), 4), run.device)
    itemsize = 8 if _solve_dtype(run) == torch.float64 else 4
    asked = run.options.resources.test_block_rows
    fitting = run.budget // 3 // (size * itemsize * VECTORS_A_SIDE)
    block_rows = min(asked or max(1, min(fitting, MAX_RIGHT_HAND_SIDES)), n_test)
    arrays = [("s_test", (size,), identity["dtype"]), ("residual", (), "float64"), ("iterations", (), "int64"),
              ("converged", (), "bool"), ("loss", (), "float64"), ("target", (), "float64"),
              ("prediction", (), "float64"), ("digest", (), "uint64")]  # fmt: skip
    run.folder.begin_store(
        "stest", run.task_identity, identity, {"n_rows": n_test, "block_rows": block_rows},
        [array_layout(path, n_test, shape, kind, block_rows) for path, shape, kind in arrays],
        Codec("lz4", 5),
    )  # fmt: skip


def _compute(run: Opened, todo: Sequence[Block], finished: int) -> list[str]:
    """Solve, write, sync and commit the given blocks one after the other; notes on rows that did not converge."""
    store = run.folder.store("stest", "r+")
    first = probe_batch(run.task, range(min(CHECKED_SAMPLES, len(run.task.train))), run.device)
    forms, notes = decide_forms(run.task, run.parameters, first, "dense", rows_at_once(run))
    with progress("stest", len(run.task.test), finished, show=run.options.resources.progress) as bar:
        products = _Products(run.check, bar)
        # The planned block, not the longest that is left: a resumed run does the same arithmetic as a calm one.
        sides = COLUMNS if run.options.stest.solver == "exact" else run.folder.plan("stest")["block_rows"]
        operator = replace(_operator(run, sides), tick=products.tick, note=products.note)
        solver = make_solver(run.options.stest, run.budget).prepare(operator)
        for block in todo:
            started = time.perf_counter()
            captured, rhs, digests = _right_hand_sides(run, forms, block)
            solution = solver(rhs.to(operator.dtype))
            data, bad = _stored(solution, captured, digests, block)
            nonfinite = int((~np.isfinite(data["s_test"])).sum())
            files = store.write_block(block, data)
            seconds = time.perf_counter() - started
            run.folder.commit("stest", block, files, seconds, block_digest(digests), nonfinite, bad)
            notes += _not_converged(solution, block, bad)
            bar.advance(block.rows, sum(file.size for file in files), f"residual {float(solution.residual.max()):.1e}")
            run.check()
    for note in notes:
        log.warning(note)
    return notes


class _Products:
    """Counts products for the bar, lets a signal stop a long solve, and says once what is slow."""

    def __init__(self, check: Callable[[], None], bar: Bar) -> None:
        self._check, self._bar, self._count = check, bar, 0
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def tick(self) -> None:
        self._check()
        self._count += 1
        if self._count % 16 == 0:
            self._bar.advance(0, note=f"{self._count} batch products")


def _solve_dtype(run: Opened) -> torch.dtype:
    asked: str = run.options.stest.solve_dtype
    if asked == "auto":
        asked = "float64" if run.options.stest.solver == "exact" else stored_dtype(run.parameters, run.task)
    return torch.float64 if asked == "float64" else torch.float32


def _operator(run: Opened, sides: int) -> Curvature:
    """The damped curvature over the training set, its micro-batch and cache chosen from the budget."""
    task, n_train, dtype = run.task, len(run.task.train), _solve_dtype(run)
    first = probe_batch(task, range(min(8, n_train)), run.device)
    kept = activation_bytes(task, run.parameters, first) * (2 if dtype == torch.float64 else 1)
    # One pass keeps, per sample, the activations once and their derivatives for each of the vectors.
    room = min(run.budget // 4, HOST_WORKING_SET) if run.device.type == "cpu" else run.budget // 4
    size = run.options.resources.batch_size or max(SMALLEST_BATCH, min(MAX_BATCH, room // (kept * (1 + sides))))
    workers = run.options.resources.workers

    def load() -> Iterable[Batch]:
        return batches(task.train, "train", task.collate, groups_of(0, n_train, size), run.device, workers)

    def pick(indices: Sequence[int]) -> Iterable[Batch]:
        groups = [indices[i : i + size] for i in range(0, len(indices), size)]
        return batches(task.train, "train", task.collate, groups, run.device)

    return Curvature(
        task=task,
        parameters=run.parameters,
        kind=run.options.stest.curvature,
        batches=remembered(load, run.budget // 8),
        pick=pick,
        n_train=n_train,
        damping=run.options.stest.damping,
        dtype=dtype,
    )


def _right_hand_sides(run: Opened, forms: Forms, block: Block) -> tuple[Captured, Tensor, Any]:
    """d measure / d theta of the block's test samples (K, P), with their losses, targets and predictions."""
    size = min(run.options.resources.batch_size or CHECKED_SAMPLES, rows_at_once(run))
    if forms.mapped and forms.engine == "loop":
        size = 1
    pieces, rows, digests, losses = [], [], [], []
    for batch in batches(run.task.test, "test", run.task.collate, groups_of(block.start, block.stop, size), run.device):
        captured = capture(run.task, forms, batch, measure=True)
        rows.append(rows_of(forms, captured.factors, captured.dense))
        pieces.append(captured)
        digests.append(batch.digests)
        losses.append(_test_losses(run, batch) if run.task.measure is not None else captured.loss)
    together = Captured(
        {}, rows[0].new_zeros(0), torch.cat(losses), torch.cat([p.target for p in pieces]),
        torch.cat([p.prediction for p in pieces]),
    )  # fmt: skip
    return together, torch.cat(rows), np.concatenate(digests)


def _test_losses(run: Opened, batch: Batch) -> Tensor:
    with torch.no_grad():
        return losses_of(run.task, batch)[1]


def _stored(solution: Solution, captured: Captured, digests: Any, block: Block) -> tuple[dict[str, Any], list[int]]:
    """The block's arrays; rows that are not finite become NaN and are named."""
    value = solution.value.clone()
    wrong = ~(torch.isfinite(value).all(1) & torch.isfinite(solution.residual).to(value.device))
    value[wrong] = torch.nan
    arrays = {
        "s_test": value, "residual": solution.residual, "iterations": solution.iterations,
        "converged": solution.converged, "loss": captured.loss, "target": captured.target,
        "prediction": captured.prediction,
    }  # fmt: skip
    data = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    return {**data, "digest": digests}, [block.start + row for row in torch.nonzero(wrong).flatten().tolist()]


def _not_converged(solution: Solution, block: Block, bad: Sequence[int]) -> list[str]:
    """One line about rows of the block that are finite but above the tolerance."""
    rows = [i for i, fine in enumerate(solution.converged.tolist()) if not fine and block.start + i not in bad]
    if not rows:
        return []
    worst = float(solution.residual[rows].max())
    reasons = sorted({solution.reasons[i] for i in rows})
    return [
        f"s_test of test samples {some([block.start + i for i in rows])} did not converge"
        f" (relative residual up to {worst:.1e}): {'; '.join(reasons)}"
    ]
