"""What the two stores know of every sample besides its gradient or s_test: one number each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.run import RunFolder
from infl_cache.stages.selection import count_of_tests
from infl_cache.stages.standings import NO_CLASS


def stored_column(folder: RunFolder, stage: str, name: str) -> NDArray[np.float64]:
    """A number for each sample, from a store: of test samples without a row, NaN."""
    records, store, samples = folder.records(stage), folder.store(stage), folder.samples(stage)
    if stage == "grads":
        folder.require_complete(stage)
    count = folder.plan("grads")["n_rows"] if stage == "grads" else count_of_tests(folder)
    found = np.full(count, np.nan)
    for block in folder.stage_blocks(stage):
        if block.index in records:
            folder.check_block(records[block.index])
            found[samples[block.start : block.stop]] = store.read_block(block, [name])[name]
    return found


def shown_predictions(folder: RunFolder) -> NDArray[np.float64]:
    """What each test sample was predicted to be; NaN where its target is no single number, for then it is no class."""
    known = np.isfinite(stored_column(folder, "stest", "target"))
    return np.where(known, stored_column(folder, "stest", "prediction"), np.nan)


def classes_of(targets: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """The class of each sample, `NO_CLASS` where nothing is known; None unless all that is known are integer labels.

    >>> classes_of(np.array([2.0, np.nan, -1.0])).tolist() == [2, NO_CLASS, -1]
    True
    >>> classes_of(np.array([0.5, 1.0])) is None
    True
    """
    known = np.isfinite(targets)
    labels = targets[known]
    if not len(labels) or (labels != np.round(labels)).any() or np.abs(labels).max() > 2**53:
        return None
    found = np.full(len(targets), NO_CLASS, np.int64)
    found[known] = labels.astype(np.int64)
    return found
