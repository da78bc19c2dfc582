"""Gradients of whole blocks of training samples: computed, encoded, written, synced, committed.

While one block is written, synced and committed the next is computed (`behind`), in buffers that are used again and
again (`buffers`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from infl_cache.disk.layout import Block
from infl_cache.disk.store import Array, EncodedChunk
from infl_cache.errors import BadInput
from infl_cache.maths.capture import Captured, Forms, capture
from infl_cache.maths.samples import Batch, batches, groups_of
from infl_cache.maths.task import losses_of, out_of_memory, requiring_grad, targets_as_numbers
from infl_cache.progress import progress
from infl_cache.stages.behind import Behind
from infl_cache.stages.buffers import BlockBuffer
from infl_cache.stages.opening import Opened, block_digest, log
from infl_cache.stages.stored import arrays_of
from infl_cache.stages.timing import Timings

# For a GPU: one block is computed, one waits, one is encoded and written.
BUFFERS = 3


@dataclass(frozen=True)
class _Filled:
    """A computed block on its way to the disk, encoded already or still to be."""

    block: Block
    digest: str
    arrays: dict[str, Array]
    bad: list[int]
    nonfinite: int
    chunks: list[EncodedChunk] | None = None


def compute_blocks(run: Opened, forms: Forms, todo: list[Block], finished: int, timings: Timings) -> None:
    """Compute the given blocks; write, sync and commit each while the next one is computed."""
    folder, resources = run.folder, run.options.resources
    store = folder.store("grads", "r+")
    # Beside a GPU's work encoding is free. On 2 cores, in the writer's thread, it made W1, W2, W3 and W5 of
    # scripts/workloads.py 4 to 9 % slower than in turn.
    encode_in_turn = run.device.type == "cpu"
    started = [time.perf_counter()]
    with progress("grads", len(run.task.train), finished, show=resources.progress) as bar:

        def write(filled: _Filled) -> None:
            chunks = filled.chunks if filled.chunks is not None else store.encode_block(filled.block, filled.arrays)
            files = store.write_encoded(chunks)
            with timings.of("commit"):
                # Seconds since the last commit: with the halves overlapping, that is what a block takes.
                now = time.perf_counter()
                seconds, started[0] = now - started[0], now
                folder.commit("grads", filled.block, files, seconds, filled.digest,
                              filled.nonfinite, filled.bad)  # fmt: skip
            bar.advance(filled.block.rows, sum(file.size for file in files))

        with Behind(write) as behind, closing(_filled_blocks(run, forms, todo, timings)) as blocks:
            for filled in blocks:
                if filled.bad and run.options.influence.nonfinite == "stop":
                    raise BadInput(
                        f"gradients: expected finite numbers, found NaN or Inf at train samples {some(filled.bad)};"
                        " look at these samples, or go on without them by --nonfinite skip"
                    )
                if encode_in_turn:
                    chunks = store.encode_block(filled.block, filled.arrays)
                    filled = replace(filled, arrays={}, chunks=chunks)
                with timings.of("wait"):
                    behind.put(filled)
                run.check()
    for name, seconds in store.seconds.items():
        timings.seconds[name] += seconds


def _filled_blocks(
    run: Opened, forms: Forms, todo: Sequence[Block], timings: Timings
) -> Generator[_Filled, None, None]:
    """The arrays of each block, filled micro-batch by micro-batch; a micro-batch never crosses a block."""
    stored = run.folder.array_layouts("grads")
    dtype = run.folder.manifest.stages["grads"]["identity"]["dtype"]
    rows = max(block.rows for block in todo)
    # Encoded before it is handed on, a block leaves its buffer free for the next one.
    count = 1 if run.device.type == "cpu" else min(BUFFERS, len(todo))
    buffers = [BlockBuffer(stored, rows, run.device) for _ in range(count)]
    with closing(_captured(run, forms, todo, timings)) as captured:
        for number, block in enumerate(todo):
            buffer = buffers[number % len(buffers)]
            filled = 0
            while filled < block.rows:
                batch, found = next(captured)
                at = slice(filled, filled + len(batch.indices))
                with timings.of("copy"):
                    arrays = {"loss": found.loss, "target": found.target}
                    if found.factors or found.dense.shape[1]:
                        arrays.update(arrays_of(forms, found, dtype))
                    buffer.fill(at, arrays, batch.digests)
                filled = at.stop
            with timings.of("copy"):
                buffer.wait()
                bad, nonfinite = buffer.nonfinite(block.rows)
            digest = block_digest(buffer.digests[: block.rows])
            yield _Filled(block, digest, buffer.arrays(block.rows), [block.start + row for row in bad], nonfinite)


def _captured(
    run: Opened, forms: Forms, todo: Sequence[Block], timings: Timings
) -> Generator[tuple[Batch, Captured], None, None]:
    """Every micro-batch of the given blocks and its gradients; out of memory, it goes on with half the batch."""
    size = batch_size(run, forms)
    left = [range(block.start, block.stop) for block in todo]
    while left:
        groups = [group for rows in left for group in groups_of(rows.start, rows.stop, size)]
        workers = run.options.resources.workers
        try:
            with closing(batches(run.task.train, "train", run.task.collate, groups, run.device, workers)) as loaded:
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


def batch_size(run: Opened, forms: Forms) -> int:
    """Training samples in one pass, as asked for or as planned."""
    return forms.at_once(run.options.resources.batch_size or run.folder.plan("grads")["batch_size"])


def _gradients(run: Opened, forms: Forms, batch: Batch) -> Captured:
    """A batch's gradients; if they are not kept, its losses alone, unless a gradient of it is not finite."""
    if run.options.grads.cache:
        return capture(run.task, forms, batch)
    named = dict(run.task.model.named_parameters())
    chosen = [named[name] for name in run.parameters.names]
    with requiring_grad(chosen), torch.enable_grad():
        _, losses = losses_of(run.task, batch)
        summed = torch.autograd.grad(losses.sum(), chosen, allow_unused=True) if losses.requires_grad else ()
    if not all(bool(torch.isfinite(gradient).all()) for gradient in summed if gradient is not None):
        return capture(run.task, forms, batch)
    size, losses = len(batch.indices), losses.detach()
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
