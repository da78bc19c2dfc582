"""Stage 1: grad_z of every training sample into `grad_z.zarr`, block by committed block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import ArrayLayout, Block, array_layout, choose_block_rows
from infl_cache.disk.run import Force
from infl_cache.disk.store import Array
from infl_cache.errors import BadInput
from infl_cache.maths.capture import Captured, Forms, capture, decide_forms
from infl_cache.maths.capture.decide import check_forms
from infl_cache.maths.probe import activation_bytes, check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of, spread
from infl_cache.progress import progress
from infl_cache.stages.opening import (
    Opened,
    StageResult,
    block_digest,
    log,
    options_identity,
    stored_dtype,
    summary,
)
from infl_cache.stages.same import check_against_store

CHECKED_SAMPLES = 32
MAX_BATCH = 256
MAX_VMAP_BATCH = 32
# A row that is rebuilt exists as pieces, as their concatenation, and in what vmap or autograd holds besides.
ROW_COPIES = 4


def grads(run: Opened, force: Force = False) -> StageResult:
    """Compute what is missing of `grad_z.zarr`; a finished store is left as it is."""
    started = time.perf_counter()
    identity = options_identity(
        run.options.grads, dtype=stored_dtype(run.parameters, run.task, run.options.grads.dtype)
    )
    plan = run.folder.claim("grads", run.task_identity, identity, force)
    notes: list[str] = []
    if plan is None:
        plan, notes = _begin(run, identity)
    forms = Forms.from_json(plan["forms"])
    done = run.folder.done("grads")
    todo = [block for block in run.folder.stage_blocks("grads") if block.index not in done]
    check_against_store(run, "grads")
    if todo:
        if done:
            check_forms(run.task, forms, _first_samples(run, CHECKED_SAMPLES // 4))
        _compute(run, forms, todo, len(run.task.train) - sum(block.rows for block in todo))
    for note in notes:
        log.warning(note)
    return summary(run, "grads", len(run.task.train), sum(block.rows for block in todo), started, notes)


def _first_samples(run: Opened, count: int) -> Batch:
    """The first `count` training samples as one batch."""
    return probe_batch(run.task, list(range(min(count, len(run.task.train)))), run.device)


def _begin(run: Opened, identity: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Try the task, choose the forms, and lay out the store."""
    task, parameters, n_train = run.task, run.parameters, len(run.task.train)
    probes = spread(n_train, 8)
    check_independence(task, "train", probes, run.device)
    check_gradients_arrive(task, parameters, probes, run.device)
    first = _first_samples(run, CHECKED_SAMPLES)
    forms, notes = decide_forms(task, parameters, first, identity["form"], rows_at_once(run))
    dtype = identity["dtype"]
    row_bytes = forms.row_size * np.dtype(dtype).itemsize
    resources = run.options.resources
    block_rows = min(resources.block_rows or choose_block_rows(n_train, row_bytes, run.budget // 8), n_train)
    plan = {
        "n_rows": n_train,
        "block_rows": block_rows,
        "forms": forms.to_json(),
        "batch_size": min(_choose_batch(run, forms, first, row_bytes), block_rows),
    }
    run.folder.begin_store(
        "grads", run.task_identity, identity, plan, layouts(forms, n_train, dtype, block_rows),
        Codec(identity["codec"], identity["level"]),
    )  # fmt: skip
    return run.folder.plan("grads"), notes


def _choose_batch(run: Opened, forms: Forms, first: Batch, row_bytes: int) -> int:
    """Samples in one pass: what a quarter of the budget holds of activations and gradients."""
    kept = activation_bytes(run.task, run.parameters, probe_batch(run.task, first.indices[:8], run.device))
    sample = (
        4 * kept + 4 * row_bytes + 12 * sum(run.parameters.sizes[run.parameters.names.index(n)] for n in forms.mapped)
    )
    most = MAX_VMAP_BATCH if forms.mapped else MAX_BATCH
    return max(1, min(most, run.budget // 4 // sample))


def rows_at_once(run: Opened) -> int:
    """How many plain gradient rows may be worked with at a time outside the stage's own micro-batches."""
    return max(1, min(CHECKED_SAMPLES, run.budget // 8 // (ROW_COPIES * 8 * run.parameters.size)))


def layouts(forms: Forms, n_train: int, dtype: str, block_rows: int) -> list[ArrayLayout]:
    """The arrays of the store: factors of each factored layer, plain columns, and what is kept per sample."""
    arrays: list[tuple[str, tuple[int, ...], str]] = []
    for layer in forms.factored:
        arrays.append((f"{layer.key}/input", (layer.positions, layer.n_in), dtype))
        arrays.append((f"{layer.key}/output_grad", (layer.positions, layer.n_out), dtype))
    if forms.n_dense:
        arrays.append(("dense", (forms.n_dense,), dtype))
    arrays += [("loss", (), "float64"), ("target", (), "float64"), ("digest", (), "uint64")]
    return [array_layout(path, n_train, shape, kind, block_rows) for path, shape, kind in arrays]


def _compute(run: Opened, forms: Forms, todo: list[Block], finished: int) -> None:
    """Compute, write, sync and commit the given blocks one after the other."""
    folder, resources = run.folder, run.options.resources
    store = folder.store("grads", "r+")
    n_train = len(run.task.train)
    with progress("grads", n_train, finished, show=resources.progress) as bar:
        started = time.perf_counter()
        for block, data in _block_data(run, forms, todo):
            bad, nonfinite = nonfinite_rows(block, data)
            if bad and run.options.influence.nonfinite == "stop":
                raise BadInput(
                    f"gradients: expected finite numbers, found NaN or Inf at train samples {some(bad)};"
                    " look at these samples, or go on without them by --nonfinite skip"
                )
            files = store.write_block(block, data)
            seconds = time.perf_counter() - started
            folder.commit("grads", block, files, seconds, block_digest(data["digest"]), nonfinite, bad)
            bar.advance(block.rows, sum(file.size for file in files))
            run.check()
            started = time.perf_counter()


def _block_data(run: Opened, forms: Forms, todo: list[Block]) -> Iterator[tuple[Block, dict[str, Any]]]:
    """The arrays of each block, filled micro-batch by micro-batch; a micro-batch never crosses a block."""
    store_layouts = run.folder.array_layouts("grads")
    size = run.options.resources.batch_size or run.folder.plan("grads")["batch_size"]
    if forms.mapped and forms.engine == "loop":
        size = 1
    groups = [group for block in todo for group in groups_of(block.start, block.stop, size)]
    loaded = batches(run.task.train, "train", run.task.collate, groups, run.device, run.options.resources.workers)
    for block in todo:
        data = {each.path: np.empty((block.rows, *each.row_shape), each.dtype) for each in store_layouts}
        for group in groups_of(block.start, block.stop, size):
            batch = next(loaded)
            captured = capture(run.task, forms, batch)
            at = slice(group.start - block.start, group.stop - block.start)
            for path, values in captured_arrays(captured).items():
                data[path][at] = values
            data["digest"][at] = batch.digests
        yield block, data


def captured_arrays(captured: Captured) -> dict[str, Array]:
    """A batch's gradients under the names they have in the store."""
    arrays: dict[str, torch.Tensor] = {"loss": captured.loss, "target": captured.target}
    for key, (inputs, output_grad) in captured.factors.items():
        arrays[f"{key}/input"], arrays[f"{key}/output_grad"] = inputs, output_grad
    if captured.dense.shape[1]:
        arrays["dense"] = captured.dense
    return {path: values.detach().cpu().numpy() for path, values in arrays.items()}


def nonfinite_rows(block: Block, data: dict[str, Any]) -> tuple[list[int], int]:
    """Row numbers with a value that is not finite in what the scores are made of, and how many such values."""
    bad = np.zeros(block.rows, bool)
    count = 0
    for path, values in data.items():
        if path == "target" or values.dtype.kind != "f":
            continue
        # A sum is finite unless a value is not (or it overflows, which the slow path then tells apart).
        if not np.isfinite(values.sum(dtype=np.float64)):
            wrong = ~np.isfinite(values.reshape(block.rows, -1))
            bad |= wrong.any(1)
            count += int(wrong.sum())
    return [block.start + int(row) for row in np.flatnonzero(bad)], count


def some(rows: list[int]) -> str:
    """The first few of many row numbers.

    >>> some([1, 2, 3])
    '1, 2, 3'
    """
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
