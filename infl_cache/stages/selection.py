"""Which test samples are asked about: `--test`, `--test-per-class`, and what a run was asked for before.

It is no part of an identity: which rows are computed changes no row. A run is asked for some test samples, later for
others; it holds all that were computed, in that order, and never computes one again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from infl_cache.config import SelectionOptions, short
from infl_cache.disk.layout import Block, as_ranges
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, IncompleteStore
from infl_cache.maths.samples import batches, groups_of
from infl_cache.maths.task import Task, blaming, targets_as_numbers
from infl_cache.progress import progress

EVERY = "all"


def check_selection(options: SelectionOptions, n_test: int) -> None:
    """`BadInput` for a selection that cannot be meant, before any work."""
    if options.test is not None:
        parse_tests(options.test, n_test)
        if options.test_per_class is not None and options.test.strip() != EVERY:
            raise BadInput(
                f"test, test-per-class: expected one of them, found both ({short(options.test)},"
                f" {options.test_per_class}); --test {EVERY} chooses among all"
            )
    if options.test_start and options.test_per_class is None:
        raise BadInput(f"test-start: expected test-per-class with it, found {options.test_start} alone")


def asked_tests(options: SelectionOptions, task: Task, show: bool = True) -> list[int] | None:
    """The test samples that are asked for, each once; None if nothing is said about it."""
    if options.test_per_class is not None:
        return _tests_per_class(task, options.test_per_class, options.test_start, show)
    return None if options.test is None else parse_tests(options.test, len(task.test))


def parse_tests(text: str, n_test: int) -> list[int]:
    """Test samples by indices and Python's slices, each once, in the order in which they are named.

    Raises `BadInput` for other text, for an index that does not exist, and if nothing is selected.

    >>> parse_tests("5, 1:8:2, -1", 10), parse_tests("all", 3)
    ([5, 1, 3, 7, 9], [0, 1, 2])
    """
    found: dict[int, None] = {}
    for part in [":"] if text.strip() == EVERY else text.split(","):
        try:
            numbers = [int(each) if each.strip() else None for each in part.split(":")]
            if len(numbers) > 3 or numbers == [None]:
                raise ValueError
            chosen = range(*slice(*numbers).indices(n_test)) if len(numbers) > 1 else [_existing(numbers[0], n_test)]
        except ValueError:
            raise BadInput(
                f"test: expected indices and slices such as 0:1000 or 5,7,100:200, or {EVERY}, found {short(text)}"
            ) from None
        found.update(dict.fromkeys(chosen))
    if not found:
        raise BadInput(f"test: expected some of the {n_test} test samples, found none in {short(text)}")
    return list(found)


def _existing(index: int | None, n_test: int) -> int:
    if index is None or not -n_test <= index < n_test:
        raise BadInput(f"test: expected indices of test samples, 0 to {n_test - 1}, found {short(index)}")
    return index % n_test


def _tests_per_class(task: Task, count: int, start: int, show: bool) -> list[int]:
    """Of each class, in the order of their indices, `count` test samples after the first `start`."""
    seen: Counter[float] = Counter()
    chosen: list[int] = []
    with progress("classes", len(task.test), unit="test sample", show=show) as bar:
        groups = groups_of(0, len(task.test), 1)
        for batch in batches(task.test, "test", task.collate, groups, torch.device("cpu")):
            index = batch.indices[0]
            with blaming(f"targets, on test sample {index},"):
                target = float(targets_as_numbers(task, batch.data, 1)[0])
            if not target.is_integer():
                raise BadInput(
                    f"test-per-class: expected an integer label of each test sample, found {target:g} at"
                    f" test[{index}]; choose by --test"
                )
            if start <= seen[target] < start + count:
                chosen.append(index)
            seen[target] += 1
            bar.advance(1)
    if not chosen:
        raise BadInput(
            f"test-start: expected fewer than the {max(seen.values())} test samples of the largest class, found {start}"
        )
    return chosen


def as_text(tests: Sequence[int] | NDArray[np.int64], n_test: int) -> str:
    """Test samples in the words of `--test`: the inverse of `parse_tests`.

    >>> as_text([0, 1, 2, 7, 20, 18, 16], 30), as_text([0, 1], 2), as_text([2, 1, 0], 9)
    ('0:3,7,20:15:-2', 'all', '2::-1')
    """
    if np.array_equal(tests, np.arange(n_test)):
        return EVERY
    return ",".join(_range_text(*each) for each in as_ranges(tests))


def _range_text(start: int, stop: int, step: int) -> str:
    if len(range(start, stop, step)) == 1:
        return str(start)
    return f"{start}:{stop if stop >= 0 else ''}" + (f":{step}" if step != 1 else "")


def held_tests(folder: RunFolder) -> NDArray[np.int64]:
    """The test samples of a run, in the order of the rows of its s_test store; done or still to be done."""
    samples = folder.samples("stest")
    return samples[samples >= 0]


def count_of_tests(folder: RunFolder) -> int:
    """How many test samples the task has, whether asked for or not."""
    if "stest" not in folder.manifest.stages:
        raise IncompleteStore(f"{folder.path}: expected the stage stest, found it not begun; run infl-cache stest")
    return int(folder.manifest.stages["stest"]["identity"]["n_test"])


def remember_tests(folder: RunFolder) -> None:
    """Let `run.yaml` say all that the run was asked for, and not only what was asked last."""
    if "stest" in folder.manifest.stages and folder.records("stest"):
        say_tests(folder, held_tests(folder), count_of_tests(folder))


def say_tests(folder: RunFolder, tests: Sequence[int] | NDArray[np.int64], n_test: int) -> None:
    """The same for test samples that the run is about to hold."""
    said = {"test": as_text(tests, n_test), "test_per_class": None, "test_start": 0}
    folder.configuration = {**folder.configuration, **said}


def appended(
    kept: Sequence[Block], samples: NDArray[np.int64], new: Sequence[int], block_rows: int
) -> dict[str, list[list[int]]]:
    """The spans of a store that has the blocks `kept` and gets rows for the test samples `new`, and whose they are.

    New rows start at the next multiple of `block_rows`: a chunk file never holds rows of two blocks.
    """
    spans: list[list[int]] = []
    for start, stop in [*((block.start, block.stop) for block in kept), _span_after(kept, len(new), block_rows)]:
        if spans and spans[-1][1] == start:
            spans[-1][1] = stop
        elif stop > start:
            spans.append([start, stop])
    held = [int(sample) for block in kept for sample in samples[block.start : block.stop]]
    return {"spans": spans, "samples": as_ranges([*held, *new])}


def _span_after(kept: Sequence[Block], count: int, block_rows: int) -> tuple[int, int]:
    start = -(-kept[-1].stop // block_rows) * block_rows if kept else 0
    return start, start + count
