"""Stage 1: grad_z of every training sample into `grad_z.zarr`, block by committed block.

Computing block k + 1 overlaps encoding, writing, syncing and committing block k (`behind`), in buffers that are
used again and again (`buffers`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import Block, choose_block_rows
from infl_cache.disk.run import Force
from infl_cache.errors import BadInput
from infl_cache.maths.capture import Captured, Forms, capture, check_forms, decide_forms
from infl_cache.maths.probe import activation_bytes, check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of, spread
from infl_cache.maths.task import losses_of, out_of_memory, targets_as_numbers
from infl_cache.progress import progress
from infl_cache.stages.behind import Behind
from infl_cache.stages.buffers import BlockBuffer
from infl_cache.stages.opening import (
    Opened,
    StageResult,
    block_digest,
    log,
    options_identity,
    stored_dtype,
    summary,
)
from infl_cache.stages.rounding import measured_rounding, test_gradients
from infl_cache.stages.same import check_against_store
from infl_cache.stages.stored import arrays_of, layouts
from infl_cache.stages.timing import Timings

CHECKED_SAMPLES = 32
MAX_BATCH = 1024
SMALLEST_CPU_BATCH = 16
CPU_ACTIVATIONS = 32 * 2**20
MAX_VMAP_BATCH = 32
# A row that is rebuilt exists as pieces, as their concatenation, and in what vmap or autograd holds besides.
ROW_COPIES = 4
# One block is computed, one waits, one is written.
BUFFERS = 3


def grads(run: Opened, force: Force = False) -> StageResult:
    """Compute what is missing of `grad_z.zarr`; a finished store is left as it is."""
    started = time.perf_counter()
    asked = stored_dtype(run.parameters, run.task, run.options.grads.dtype)
    identity = options_identity(run.options.grads, dtype=asked)
    plan = run.folder.claim("grads", run.task_identity, identity, force)
    notes: list[str] = []
    if plan is None:
        plan, notes = _begin(run, identity)
    forms = Forms.from_json(plan["forms"])
    done = run.folder.done("grads")
    todo = [block for block in run.folder.stage_blocks("grads") if block.index not in done]
    check_against_store(run, "grads")
    timings = Timings()
    if todo:
        if done and identity["cache"]:
            check_forms(run.task, forms, _first_samples(run, CHECKED_SAMPLES // 4))
        timings.seconds["start"] = time.perf_counter() - started
        _compute(run, forms, todo, len(run.task.train) - sum(block.rows for block in todo), timings)
    for note in notes:
        log.warning(note)
    computed = sum(block.rows for block in todo)
    return summary(run, "grads", len(run.task.train), computed, started, notes, timings.seconds)


def _first_samples(run: Opened, count: int) -> Batch:
    """The first `count` training samples as one batch."""
    return probe_batch(run.task, list(range(min(count, len(run.task.train)))), run.device)


def _begin(run: Opened, identity: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Try the task, choose the forms, and lay out the store."""
    forms, plan, notes = planned(run, identity)
    run.folder.begin_store(
        "grads", run.task_identity, identity, plan,
        layouts(forms, plan["n_rows"], identity["dtype"], plan["block_rows"], identity["cache"]),
        Codec(identity["codec"], identity["level"]),
    )  # fmt: skip
    return run.folder.plan("grads"), notes


def planned(run: Opened, identity: dict[str, Any]) -> tuple[Forms, dict[str, Any], list[str]]:
    """How stage 1 would be done: the forms, sizes of blocks and batches, the error of rounding; nothing is written."""
    task, parameters, n_train = run.task, run.parameters, len(run.task.train)
    probes = spread(n_train, 8)
    check_independence(task, "train", probes, run.device)
    check_gradients_arrive(task, parameters, probes, run.device)
    first = _first_samples(run, CHECKED_SAMPLES)
    forms, notes = decide_forms(task, parameters, first, identity["form"], rows_at_once(run), identity["layer_forms"])
    row_bytes = forms.row_size * bytes_a_number(identity["dtype"])
    resources = run.options.resources
    block_rows = min(resources.block_rows or choose_block_rows(n_train, row_bytes, run.budget // 8), n_train)
    plan = {
        "n_rows": n_train,
        "block_rows": block_rows,
        "forms": forms.to_json(),
        "batch_size": min(_choose_batch(run, forms, first, row_bytes), block_rows),
    }
    if identity["dtype"] in ("bfloat16", "float16") and identity["cache"]:
        plan["rounding"] = measured_rounding(
            run, forms, identity["dtype"], test_gradients(run, forms, rows_at_once(run)), rows_at_once(run)
        )
    return forms, plan, notes


def bytes_a_number(dtype: str) -> int:
    """Bytes of a stored number before compression."""
    return int(getattr(torch, dtype).itemsize)


def _choose_batch(run: Opened, forms: Forms, first: Batch, row_bytes: int) -> int:
    """Samples in one pass: what a quarter of the budget holds of activations and gradients, on a CPU what caches like.

    The faster batch sizes of five networks on a CPU (from an MLP to ResNet-18) all had activations of 8 to 64 MB.
    """
    kept = activation_bytes(run.task, run.parameters, probe_batch(run.task, first.indices[:8], run.device))
    sizes = dict(zip(run.parameters.names, run.parameters.sizes, strict=True))
    sample = 4 * kept + 4 * row_bytes + 12 * sum(sizes[name] for name in forms.mapped)
    most = MAX_VMAP_BATCH if forms.mapped else MAX_BATCH
    if run.device.type == "cpu":
        most = min(most, max(SMALLEST_CPU_BATCH, 2 ** int(math.log2(CPU_ACTIVATIONS / kept))))
    return max(1, min(most, run.budget // 4 // sample))


def rows_at_once(run: Opened) -> int:
    """How many plain gradient rows may be worked with at a time outside the stage's own micro-batches."""
    return max(1, min(CHECKED_SAMPLES, run.budget // 8 // (ROW_COPIES * 8 * run.parameters.size)))


@dataclass(frozen=True)
class _Filled:
    """A computed block on its way to the disk."""

    block: Block
    arrays: dict[str, NDArray[Any]]
    bad: list[int]
    nonfinite: int


def _compute(run: Opened, forms: Forms, todo: list[Block], finished: int, timings: Timings) -> None:
    """Compute the given blocks; write, sync and commit each while the next one is computed."""
    folder, resources = run.folder, run.options.resources
    store = folder.store("grads", "r+")
    started = [time.perf_counter()]
    with progress("grads", len(run.task.train), finished, show=resources.progress) as bar:

        def write(filled: _Filled) -> None:
            files = store.write_block(filled.block, filled.arrays)
            with timings.of("commit"):
                # Seconds since the last commit: with the halves overlapping, that is what a block takes.
                now = time.perf_counter()
                seconds, started[0] = now - started[0], now
                folder.commit("grads", filled.block, files, seconds, block_digest(filled.arrays["digest"]),
                              filled.nonfinite, filled.bad)  # fmt: skip
            bar.advance(filled.block.rows, sum(file.size for file in files))

        with Behind(write) as behind:
            for filled in _filled_blocks(run, forms, todo, timings):
                if filled.bad and run.options.influence.nonfinite == "stop":
                    raise BadInput(
                        f"gradients: expected finite numbers, found NaN or Inf at train samples {some(filled.bad)};"
                        " look at these samples, or go on without them by --nonfinite skip"
                    )
                with timings.of("wait"):
                    behind.put(filled)
                run.check()
    for name, seconds in store.seconds.items():
        timings.seconds[name] += seconds


def _filled_blocks(run: Opened, forms: Forms, todo: Sequence[Block], timings: Timings) -> Iterator[_Filled]:
    """The arrays of each block, filled micro-batch by micro-batch; a micro-batch never crosses a block."""
    stored = run.folder.array_layouts("grads")
    dtype = run.folder.manifest.stages["grads"]["identity"]["dtype"]
    rows = max(block.rows for block in todo)
    buffers = [BlockBuffer(stored, rows, run.device) for _ in range(min(BUFFERS, len(todo)))]
    captured = _captured(run, forms, todo, timings)
    for number, block in enumerate(todo):
        buffer = buffers[number % len(buffers)]
        filled = 0
        while filled < block.rows:
            batch, found = next(captured)
            at = slice(filled, filled + len(batch.indices))
            with timings.of("copy"):
                arrays = {"loss": found.loss, "target": found.target}
                if run.options.grads.cache:
                    arrays.update(arrays_of(forms, found, dtype))
                buffer.fill(at, arrays, batch.digests)
            filled = at.stop
        with timings.of("copy"):
            buffer.wait()
            bad, nonfinite = buffer.nonfinite(block.rows)
        yield _Filled(block, buffer.arrays(block.rows), [block.start + row for row in bad], nonfinite)


def _captured(run: Opened, forms: Forms, todo: Sequence[Block], timings: Timings) -> Iterator[tuple[Batch, Captured]]:
    """Every micro-batch of the given blocks and its gradients; out of memory, it goes on with half the batch."""
    size = run.options.resources.batch_size or run.folder.plan("grads")["batch_size"]
    if forms.mapped and forms.engine == "loop":
        size = 1
    left = [range(block.start, block.stop) for block in todo]
    while left:
        groups = [group for rows in left for group in groups_of(rows.start, rows.stop, size)]
        loaded = batches(run.task.train, "train", run.task.collate, groups, run.device, run.options.resources.workers)
        try:
            for batch in timings.each("load", loaded):
                with timings.of("compute"):
                    found = _gradients(run, forms, batch)
                yield batch, found
                left = _without(left, len(batch.indices))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if size == 1 or not out_of_memory(error):
                raise
            size //= 2
            run.folder.remember("grads", batch_size=size)
            log.warning(f"out of memory, going on with batches of {size} samples")
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def _gradients(run: Opened, forms: Forms, batch: Batch) -> Captured:
    """A batch's gradients; its losses alone if gradients are not kept."""
    if run.options.grads.cache:
        return capture(run.task, forms, batch)
    with torch.no_grad():
        _, losses = losses_of(run.task, batch)
    size = len(batch.indices)
    return Captured({}, losses.new_zeros(size, 0), losses, targets_as_numbers(run.task, batch.data, size), losses)


def _without(left: list[range], count: int) -> list[range]:
    """Row ranges less their first `count` rows, which never cross a range."""
    first = range(left[0].start + count, left[0].stop)
    return [first, *left[1:]] if first else left[1:]


def some(rows: list[int]) -> str:
    """The first few of many row numbers.

    >>> some([1, 2, 3])
    '1, 2, 3'
    """
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
