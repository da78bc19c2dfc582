"""Where stage 3 gets the training gradients from: the store, or, where none is kept, from the model once more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.layout import Block
from infl_cache.errors import ForeignRun, IncompleteStore
from infl_cache.maths.capture import Factors, Forms, capture
from infl_cache.maths.samples import batches, groups_of
from infl_cache.stages.blocks import batch_size, some
from infl_cache.stages.opening import Opened
from infl_cache.stages.stored import stored_gradients

Read = Callable[[Block], tuple[Factors, Tensor]]


def gradient_reader(run: Opened, forms: Forms, wide: torch.dtype) -> Read:
    """A function from a block of training samples to its factors and plain columns of type `wide`."""
    return _from_store(run, forms, wide) if run.options.grads.cache else _from_model(run, forms, wide)


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
        loaded = batches(run.task.train, "train", run.task.collate, groups, run.device, run.options.resources.workers)
        for batch in loaded:
            at = slice(batch.indices[0] - block.start, batch.indices[-1] + 1 - block.start)
            differing = np.flatnonzero(expected[at] != batch.digests)
            if len(differing):
                raise ForeignRun(
                    f"train[{batch.indices[int(differing[0])]}]: expected the sample that stage 1 saw, found another;"
                    " use another --run, or start over with infl-cache grads --force"
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
