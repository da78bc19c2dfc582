"""Where stage 3 gets the training gradients from: the store, or, where none is kept, from the model once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infl_cache.disk.codecs import planned_codec
from infl_cache.disk.layout import Block
from infl_cache.disk.reader import BlockReader, plain_room
from infl_cache.errors import ForeignRun, IncompleteStore
from infl_cache.maths.capture import Factors, Forms, capture
from infl_cache.maths.parts import Part
from infl_cache.maths.samples import batches, groups_of
from infl_cache.stages.blocks import batch_size, some
from infl_cache.stages.opening import Opened
from infl_cache.stages.stored import GradientPiece, Score, gradient_pieces, stored_gradients, wanted_arrays

Read = Callable[[Block], tuple[Factors, Tensor]]
# What is read at once: a part of a block's gradients.
Wanted = tuple[Block, Part]
Pieces = Callable[[Wanted, Wanted | None, Score], Iterator[GradientPiece]]


def gradient_reader(run: Opened, forms: Forms, wide: torch.dtype) -> Read:
    """A function from a block of training samples to its factors and plain columns of type `wide`."""
    return _from_store(run, forms, wide) if run.options.grads.cache else _from_model(run, forms, wide)


@contextmanager
def piece_reader(run: Opened, forms: Forms, wide: torch.dtype) -> Iterator[Pieces]:
    """A function from a part of a block, and the one that comes after it, to factors and plain columns in pieces.

    On a CPU plain columns are scored at once, each chunk by the thread that decoded it: the threads of a product wait
    for more work in a loop, at the cost of those that decode.
    """
    codec = planned_codec(run.folder.plan("grads"), False, run.folder.path, "grads")
    if not run.options.grads.cache or codec is None:  # versions before the codec was written down
        yield _whole_blocks(gradient_reader(run, forms, wide))
        return
    store, cuda = run.folder.store("grads"), run.device.type == "cuda"
    room = _pinned if cuda else plain_room
    threads = torch.get_num_threads()
    records = run.folder.records("grads")
    if cuda:
        reader = BlockReader(store, codec, records, room, slots=2)
    else:
        reader = BlockReader(store, codec, records, room, threads=threads, begin=partial(torch.set_num_threads, 1))
        torch.set_num_threads(threads)  # of this thread and those that begin later

    def pieces(wanted: Wanted, following: Wanted | None, score: Score) -> Iterator[GradientPiece]:
        if following is not None:
            reader.expect(following[0], *wanted_arrays(store.layouts, following[1]))
        at_once = None if cuda else score
        return gradient_pieces(reader, store, wanted[1], wanted[0], run.device, wide, at_once)

    try:
        yield _behind_the_products(pieces, run.device) if cuda else pieces
    finally:
        reader.close()


def _whole_blocks(read: Read) -> Pieces:
    """Where only whole blocks are to be had: read once for all parts of one that follow one another."""
    held: list[tuple[Block, Factors, Tensor]] = []

    def pieces(wanted: Wanted, following: Wanted | None, score: Score) -> Iterator[GradientPiece]:
        block, part = wanted
        if not held or held[0][0] != block:
            held.clear()
            held.append((block, *read(block)))
        _, factors, dense = held[0]
        if part.layers:
            yield GradientPiece(slice(0, block.rows), factors)
        if part.stop > part.start:
            yield GradientPiece(slice(0, block.rows), plain=dense[:, part.start : part.stop])

    return pieces


def _behind_the_products(pieces: Pieces, device: torch.device) -> Pieces:
    """On a GPU: copied and cast in a stream of its own, so that a block is decoded while the last one is multiplied."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied: deque[torch.cuda.Event] = deque(maxlen=2)

    def read(wanted: Wanted, following: Wanted | None, score: Score) -> Iterator[GradientPiece]:
        if len(copied) > 1:  # the memory that is filled next has been copied out of
            copied[0].synchronize()
        with torch.cuda.stream(stream):
            found = list(pieces(wanted, following, score))
        copied.append(stream.record_event())
        here = torch.cuda.current_stream(device)
        here.wait_stream(stream)
        for piece in found:
            for tensor in (piece.plain, *(each for pair in (piece.factors or {}).values() for each in pair)):
                if tensor is not None:
                    tensor.record_stream(here)
        return iter(found)

    return read


def _pinned(size: int) -> NDArray[np.uint8]:
    room: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return room


def _from_store(run: Opened, forms: Forms, wide: torch.dtype) -> Read:
    store, records = run.folder.store("grads"), run.folder.records("grads")

    def read(block: Block) -> tuple[Factors, Tensor]:
        run.folder.check_block(records[block.index])
        return stored_gradients(store, forms, block, run.device, wide)

    return read


def _from_model(run: Opened, forms: Forms, wide: torch.dtype) -> Read:
    """Captured anew; every sample is compared with what stage 1 saw."""
    store, records = run.folder.store("grads"), run.folder.records("grads")
    size = batch_size(run, forms)

    def read(block: Block) -> tuple[Factors, Tensor]:
        run.folder.check_block(records[block.index])
        expected = store.read_block(block, ["digest"])["digest"]
        groups = groups_of(block.start, block.stop, size)
        parts, dense = [], []
        workers = run.options.resources.workers
        with closing(batches(run.task.train, "train", run.task.collate, groups, run.device, workers)) as loaded:
            for batch in loaded:
                at = slice(batch.indices[0] - block.start, batch.indices[-1] + 1 - block.start)
                differing = np.flatnonzero(expected[at] != batch.digests)
                if len(differing):
                    raise ForeignRun(
                        f"train[{batch.indices[int(differing[0])]}]: expected the sample that stage 1 saw, found"
                        " another; use another --run, or start over with infl-cache grads --force"
                    )
                captured = capture(run.task, forms, batch)
                parts.append(captured.factors)
                dense.append(captured.dense.to(wide))
        factors = {
            layer.key: tuple(torch.cat([part[layer.key][which] for part in parts]) for which in (0, 1))
            for layer in forms.factored
        }
        found: Factors = {
            key: (a.to(wide) if a.is_floating_point() else a, g.to(wide)) for key, (a, g) in factors.items()
        }
        _refuse_nonfinite(run, block, found, torch.cat(dense))
        return found, torch.cat(dense)

    return read


def _refuse_nonfinite(run: Opened, block: Block, factors: Factors, dense: Tensor) -> None:
    """Stop at gradients that are not finite unless they are to be skipped; then their scores are NaN by themselves."""
    if run.options.influence.nonfinite == "skip":
        return
    sums = dense.sum(1) + torch.stack(
        [g.flatten(1).sum(1) + a.flatten(1).sum(1) for a, g in factors.values()] or [dense.sum(1)]
    ).sum(0)
    bad = [block.start + row for row in torch.nonzero(~torch.isfinite(sums)).flatten().tolist()]
    if bad:
        raise IncompleteStore(
            f"gradients: expected finite numbers, found NaN or Inf at train samples {some(bad)};"
            " mend them, or leave them out by --nonfinite skip"
        )
