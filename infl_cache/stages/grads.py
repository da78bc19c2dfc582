"""Stage 1: grad_z of every training sample into `grad_z.zarr`, block by committed block."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import torch

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import choose_block_rows
from infl_cache.disk.run import Force
from infl_cache.disk.trial import free_bytes, try_store
from infl_cache.maths.capture import Forms, capture, check_forms, decide_forms
from infl_cache.maths.probe import activation_bytes, check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import Batch, spread
from infl_cache.stages.again import chosen, claim_again
from infl_cache.stages.blocks import compute_blocks
from infl_cache.stages.buffers import BlockBuffer
from infl_cache.stages.opening import (
    Opened,
    StageResult,
    log,
    options_identity,
    stored_dtype,
    summary,
)
from infl_cache.stages.room import require_room
from infl_cache.stages.rounding import measured_rounding, test_gradients
from infl_cache.stages.same import check_against_store
from infl_cache.stages.stored import arrays_of, layouts
from infl_cache.stages.timing import Timings

# Free bytes wanted of the disk, for each byte of the store.
SPARE = 1.05
CHECKED_SAMPLES = 16
FEWEST_CHECKED = 8
# Numbers of plain gradients that the check of the first samples compares: a few seconds' work.
CHECKED_NUMBERS = 2**26
MAX_BATCH = 1024
MAX_VMAP_BATCH = 32
# A row that is rebuilt exists as pieces, as their concatenation, and in what vmap or autograd holds besides.
ROW_COPIES = 4


def grads(run: Opened, force: Force = False, only: Collection[int] | None = None) -> StageResult:
    """Compute what is missing of `grad_z.zarr`; a finished store is left as it is.

    The damaged blocks `only` are forgotten and made again, and nothing else is done.
    """
    started = time.perf_counter()
    asked = stored_dtype(run.parameters, run.task, run.options.grads.dtype)
    identity = options_identity(run.options.grads, dtype=asked)
    if only is None:
        plan = run.folder.claim("grads", run.task_identity, identity, force)
    else:
        only, plan = claim_again(run, "grads", identity, only), run.folder.plan("grads")
    notes: list[str] = []
    if plan is None:
        plan, notes = _begin(run, identity)
    else:
        check_against_store(run, "grads")
        if only is None:
            run.folder.write_configuration()
    forms = Forms.from_json(plan["forms"])
    done = run.folder.done("grads")
    todo = [each for each in run.folder.stage_blocks("grads") if each.index not in done and chosen(each.index, only)]
    timings = Timings()
    if todo:
        if done and identity["cache"]:
            check_forms(run.task, forms, first_samples(run, FEWEST_CHECKED))
        timings.seconds["start"] = time.perf_counter() - started
        compute_blocks(run, forms, todo, len(run.task.train) - sum(block.rows for block in todo), timings)
    for note in notes:
        log.warning(note)
    computed = sum(block.rows for block in todo)
    return summary(run, "grads", len(run.task.train), computed, started, notes, timings.seconds)


def first_samples(run: Opened, count: int = CHECKED_SAMPLES) -> Batch:
    """The first training samples as one batch; fewer than `count` of a large model."""
    fitting = max(FEWEST_CHECKED, CHECKED_NUMBERS // run.parameters.size)
    return probe_batch(run.task, list(range(min(count, fitting, len(run.task.train)))), run.device)


def _begin(run: Opened, identity: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Try the task, choose the forms, and lay out the store."""
    forms, plan, notes = planned(run, identity)
    if identity["cache"]:
        _require_room(run, forms, identity)
    run.folder.begin_store(
        "grads", run.task_identity, identity, plan,
        layouts(forms, plan["n_rows"], identity["dtype"], plan["block_rows"], identity["cache"]),
        Codec(identity["codec"], identity["level"]),
    )  # fmt: skip
    return run.folder.plan("grads"), notes


def _require_room(run: Opened, forms: Forms, identity: dict[str, Any]) -> None:
    """`DiskFull` before anything is written if the store will not fit, with a twentieth to spare.

    Only where it does not fit uncompressed is it tried on the first samples how far they can be compressed.
    """
    dtype, n_train = identity["dtype"], len(run.task.train)
    free = free_bytes(run.folder.path)
    needed = SPARE * n_train * forms.row_size * bytes_a_number(dtype)
    if needed <= free:
        return
    first = first_samples(run, forms.at_once(CHECKED_SAMPLES))
    captured, rows = capture(run.task, forms, first), len(first.indices)
    arrays = layouts(forms, rows, dtype, rows)
    buffer = BlockBuffer(arrays, rows, run.device)
    stored = {"loss": captured.loss, "target": captured.target, **arrays_of(forms, captured, dtype)}
    buffer.fill(slice(0, rows), stored, first.digests)
    buffer.wait()
    codec = Codec(identity["codec"], identity["level"])
    needed = SPARE * try_store(run.folder.path, arrays, codec, buffer.arrays(rows)).n_bytes / rows * n_train
    require_room(
        run.folder, "grads", needed, f"the gradients of {n_train:,} samples",
        "--dtype bfloat16, --codec zstd or --no-cache (infl-cache plan says what each costs)",
    )  # fmt: skip


def planned(run: Opened, identity: dict[str, Any]) -> tuple[Forms, dict[str, Any], list[str]]:
    """How stage 1 would be done: the forms, sizes of blocks and batches, the error of rounding; nothing is written."""
    task, parameters, n_train = run.task, run.parameters, len(run.task.train)
    probes = spread(n_train, 8)
    check_independence(task, "train", probes, run.device)
    check_gradients_arrive(task, parameters, probes, run.device)
    first = first_samples(run)
    forms, notes = decide_forms(task, parameters, first, identity["form"], rows_at_once(run), identity["layer_forms"])
    row_bytes = forms.row_size * bytes_a_number(identity["dtype"])
    resources = run.options.resources
    block_rows = min(resources.block_rows or choose_block_rows(n_train, row_bytes, run.budget // 8), n_train)
    plan = {
        "n_rows": n_train,
        "block_rows": block_rows,
        "forms": forms.to_json(),
        "parameters_dtype": stored_dtype(parameters, task),
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
    """Samples in one pass: what a quarter of the budget holds of activations and rows; on a CPU what caches like."""
    kept = activation_bytes(run.task, run.parameters, probe_batch(run.task, first.indices[:8], run.device))
    sizes = dict(zip(run.parameters.names, run.parameters.sizes, strict=True))
    sample = 4 * kept + 4 * row_bytes + 12 * sum(sizes[name] for name in forms.mapped)
    most = MAX_VMAP_BATCH if forms.mapped else cpu_batch(kept) if run.device.type == "cpu" else MAX_BATCH
    return max(1, min(most, run.budget // 4 // sample))


def cpu_batch(kept: int) -> int:
    """A power of two for the bytes of activations a sample, near what five networks were seen to like; speed only.

    >>> cpu_batch(6_000), cpu_batch(180_000), cpu_batch(1_500_000), cpu_batch(100_000_000)
    (1024, 256, 64, 16)
    """
    size = 16
    while size < MAX_BATCH and 2 * size * kept <= (100_000_000 if size < 256 else 16_000_000):
        size *= 2
    return size


def rows_at_once(run: Opened) -> int:
    """How many plain gradient rows may be worked with at a time outside the stage's own micro-batches."""
    return max(1, min(CHECKED_SAMPLES, run.budget // 8 // (ROW_COPIES * 8 * run.parameters.size)))
